"""Self-speculation: the very tokens of plain decoding, and when sampling their very distribution."""

import pytest
import torch
import zoo
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessor, PreTrainedTokenizerFast, StoppingCriteria
from transformers.generation.streamers import BaseStreamer
from turbos import enliven, transformed

import depthpass as dp
from depthpass.hf.drafts import draft_of
from depthpass.hf.speculation import _redrawn

pytestmark = pytest.mark.usefixtures("one_capture")

BATCH = zoo.batch([9, 6, 7])
LOOP = dp.Loop(start=1, end=3, times=4)
CASES = {
    "loop": (LOOP, "loop:1", True),
    "layers": ([dp.LayerProgram([0, 1, 2, 1, 2, 3])], dp.LayerProgram([0, 1, 3]), True),
    "ilr": (dp.IntraLayerRecurrence([1, 3, 1, 2]), "loop:1", True),
    "first": (dp.Loop(start=1, end=3, times=3, kv="first"), "loop:1", False),
    "damped": (dp.Loop(start=1, end=3, times=3, damped=True, inject="concat"), "loop:2", False),
    "exits": (dp.Loop(times=3, exit=0.6), "{pass: loop, times: 3, exit: 0.3}", False),
    "no exits": (dp.Loop(times=3, exit=0.6, kv="latest"), "loop:1", False),
    "ouro": (dp.Loop(times=3, normalize="loop", exit=0.6, skip=False), "loop:2", False),
    "plt": (dp.ParallelLoop(loops=3, window=3), "loop:1", False),
    "bridges": ([dp.Loop(start=1, end=3, times=2), dp.TurboConn(bridges=((5, 0),), group=3, rank=5)], LOOP.with_loops(1), True),
    "routed": (dp.MixtureOfRecursions(start=1, end=3, recursions=3, mode="threshold"), dp.LayerProgram([0, 1, 2, 3]), True),
}


@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens_are_those_of_plain_decoding(case):
    spec, draft, shared = CASES[case]
    model = transformed("llama", spec)
    settings = {"max_new_tokens": 12, "do_sample": False, "repetition_penalty": 1.1}
    want = model.generate(**BATCH, **settings)
    for tokens in (3, "auto"):
        got = model.generate(**BATCH, **settings, draft=draft, draft_tokens=tokens)
        assert torch.equal(got, want)
        report = model.depth_drafted
        assert report.shared is shared and report.tokens == want.shape[1] - BATCH["input_ids"].shape[1]
        if tokens != "auto":
            assert report.drafted > 0 and max(report.chosen) == tokens
            assert 0 <= report.accepted <= report.drafted


@pytest.mark.parametrize("name", ["gemma3_text", "gpt2"])
def test_other_architectures(name):
    """Windows smaller than the row; learned positions."""
    model = transformed(name, LOOP)
    settings = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    want = model.generate(**BATCH, **settings)
    assert torch.equal(model.generate(**BATCH, **settings, draft="loop:1", draft_tokens=3), want)


def test_an_agreeing_draft_saves_visits():
    """Later iterations that change little: nearly every token is kept, and the check runs what the draft did not."""
    model = transformed("llama", LOOP)
    with torch.no_grad():
        for block in model.model.layers[1:3]:
            block.self_attn.o_proj.weight.mul_(1e-3)
            block.mlp.down_proj.weight.mul_(1e-3)
    settings = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
    ids = BATCH["input_ids"][:1]
    got = model.generate(ids, **settings, draft="loop:1")
    assert torch.equal(got, model.generate(ids, **settings))
    report = model.depth_drafted
    assert report.acceptance > 0.9 and report.visits_per_token < 0.85 * 10 and "visits per token (plain 10.0)" in str(report)


class _Tape(BaseStreamer):
    def __init__(self):
        self.seen, self.ends = [], 0

    def put(self, value):
        self.seen.append(value.tolist())

    def end(self):
        self.ends += 1


class _Counts(LogitsProcessor):
    """Favours another token at each call, so a call too many would change what follows."""

    def __init__(self):
        self.calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        scores[:, 7 * self.calls % zoo.VOCABULARY] += 3.0
        return scores


class _RowStops(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] % 3 == 0


@pytest.fixture(scope="module")
def agreeing():
    """A model whose first iteration is right about half of the time."""
    model = transformed("llama", LOOP)
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.o_proj.weight.mul_(0.1)
            block.mlp.down_proj.weight.mul_(0.1)
    return model


def _words():
    # transformers finds out what a token reads like behind this word.
    words = {"<pad>": 0, "abcdef": 1} | {f"w{i}": i for i in range(2, zoo.VOCABULARY)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")), pad_token="<pad>")


@pytest.mark.parametrize("more", [
    {"eos": 3, "return_dict_in_generate": True, "output_scores": True, "output_logits": True},
    {"eos": 5, "repetition_penalty": 1.3, "min_new_tokens": 4, "forced_eos_token_id": 9},
    {"eos": 7, "logits_processor": _Counts, "no_repeat_ngram_size": 3, "return_dict_in_generate": True, "output_scores": True},
    {"stopping_criteria": _RowStops, "return_dict_in_generate": True, "output_logits": True},
    {"stop": 6},
    {"do_sample": True, "top_k": 1, "num_return_sequences": 2, "eos": 4},
], ids=["eos", "length", "memory", "rows", "strings", "several"])
def test_every_option_means_what_it_means_in_plain_decoding(more, agreeing):
    more = dict(more)
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    free = agreeing.generate(**BATCH, **settings)[:, 9:]
    if "eos" in more:
        settings["eos_token_id"] = int(free[1, more.pop("eos")])
    if "stop" in more:
        settings |= {"stop_strings": [f"w{int(free[0, more.pop('stop')])}"], "tokenizer": _words()}
    made = {k: more.pop(k) for k in ("logits_processor", "stopping_criteria") if k in more}
    outputs, tapes = [], []
    for draft in ({}, {"draft": "loop:1", "draft_tokens": 3}, {"draft": "loop:1"}):
        tapes.append(_Tape())
        own = {k: [make()] for k, make in made.items()}
        outputs.append(agreeing.generate(**BATCH, **settings | more, **own, **draft, streamer=tapes[-1]))
    assert agreeing.depth_drafted.accepted > 0
    want, *others = outputs
    for got, tape in zip(others, tapes[1:]):
        assert tape.seen == tapes[0].seen and tape.ends == tapes[0].ends == 1
        if isinstance(want, torch.Tensor):
            assert torch.equal(got, want)
            continue
        assert torch.equal(got.sequences, want.sequences)
        assert got[zoo.CACHE].get_seq_length() == want.sequences.shape[1] - 1
        for key in ("scores", "logits"):
            found, wanted = (getattr(output, key) for output in (got, want))
            assert (found is None) is (wanted is None)
            torch.testing.assert_close(found or (), wanted or (), rtol=1e-5, atol=1e-5)


def test_a_redrawn_token_is_distributed_as_the_model_says():
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.softmax(torch.randn(7, generator=generator) * 1.5, -1) for _ in range(2))
    count = 200_000
    torch.manual_seed(1)
    guess = torch.multinomial(q.expand(count, 7), 1)[:, 0]
    own, agrees = _redrawn(p.expand(count, 7), q.expand(count, 7), guess)
    seen = torch.bincount(torch.where(agrees, guess, own), minlength=7)
    assert 0.2 < agrees.float().mean() < 0.95
    assert ((seen - count * p) ** 2 / (count * p)).sum() < 22.5  # chi-square, 6 degrees of freedom: 0.999


def test_sampled_rows_are_distributed_as_plain_ones():
    """Pairs of tokens over a vocabulary of five, against exact probabilities; rows of a batch go on together."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=5, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
                         bos_token_id=None, eos_token_id=None, pad_token_id=0)
    model = dp.transform(enliven(LlamaForCausalLM(config).eval(), std=0.6), dp.Loop(times=2))
    prompt, rows, rounds = torch.tensor([[1, 3, 2]]), 16, 60
    temperature = 1.3
    with torch.no_grad():
        first = torch.softmax(model(prompt).logits[0, -1] / temperature, -1)
        longer = torch.cat((prompt.expand(5, -1), torch.arange(5)[:, None]), 1)
        second = torch.softmax(model(longer).logits[:, -1] / temperature, -1)
        longest = torch.cat((longer.repeat_interleave(5, 0), torch.arange(5).repeat(5)[:, None]), 1)
        third = torch.softmax(model(longest).logits[:, -1] / temperature, -1).view(5, 5, 5)
    exact = first[:, None, None] * second[:, :, None] * third
    seen = torch.zeros(125)
    for seed in range(rounds):
        torch.manual_seed(seed)
        out = model.generate(prompt.expand(rows, -1), max_new_tokens=4, do_sample=True, temperature=temperature, top_k=0,
                             draft="loop:1", draft_tokens=2)[:, 3:]
        assert out.shape == (rows, 4)
        seen += torch.bincount(out[:, 0] * 25 + out[:, 1] * 5 + out[:, 2], minlength=125)
    pairs = seen.view(5, 5, 5).sum(0)
    want = rows * rounds * exact.sum(0)
    assert ((pairs - want) ** 2 / want).sum() < 51.2  # 24 degrees of freedom: 0.999
    report = model.depth_drafted
    assert 0 < report.accepted < report.drafted


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"draft": "loop:4"}, "shallower than the model's 10 visits per token, got .* with 10"),
        ({"draft": "loop:0"}, "N of at least 1"),
        ({"draft": "loup:1"}, "a spec that this model can run"),
        ({"draft": dp.Loop(start=1, end=3, times=2, lora_rank=4)}, "needs the new parameters"),
        ({"draft": dp.Loop(start=1, end=3, times=(1, 3))}, "counts vary"),
        ({"draft": dp.Loop(start=1, end=3, times=2, kv="last")}, "its KV policy"),
        ({"draft": "loop:1", "draft_tokens": 0}, "draft_tokens: expected a number of at least 1"),
        ({"draft_tokens": 3}, "expected draft beside it"),
        ({"draft": "loop:1", "num_beams": 2}, "num_beams=1"),
        ({"draft": "loop:1", "use_cache": False}, "use_cache=True"),
        ({"draft": "loop:1", "prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens"),
        ({"draft": "loop:1", "output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
        ({"draft": "loop:1", "penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha"),
        ({"draft": "loop:1", "position_ids": torch.arange(9)[None].expand(3, -1) + 1}, "position_ids"),
        ({"draft": "loop:1", "assistant_model": zoo.model("llama", 1)}, "assistant_model"),
        ({"draft": "loop:1", "cache_implementation": "static"}, "cache_implementation='static'"),
    ],
)
def test_bad_input(more, words):
    model = transformed("llama", LOOP, torch.float32)
    with pytest.raises(dp.InputError, match=words):
        model.generate(**BATCH, max_new_tokens=2, **more)


def test_other_models_caches_and_programs_are_no_drafts():
    model = transformed("llama", LOOP, torch.float32)
    with pytest.raises(dp.InputError, match="assistant_model"):
        model.generate(**BATCH, draft=zoo.model("llama", 1))
    with pytest.raises(dp.InputError, match="got a program"):
        model.generate(**BATCH, draft=model.depth_program)
    with pytest.raises(dp.CacheError, match="no cache of your own"):
        model.generate(**BATCH, draft="loop:1", **{zoo.CACHE: dp.DepthCache(model)})
    noisy = transformed("llama", dp.Loop.huginn(1, 3), torch.float32)
    with pytest.raises(dp.InputError, match="random states"):
        noisy.generate(**BATCH, draft="loop:1")


def test_the_rest_of_a_loop_reads_no_block_twice():
    made = draft_of(transformed("llama", LOOP, torch.float32), "loop:1")
    assert made.rest is not None and made.rest.cost == 7 and made.draft.cost == 4 and made.slots == {0: 0, 1: 1, 2: 2}
