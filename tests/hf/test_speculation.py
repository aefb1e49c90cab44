"""Self-speculation: the very tokens of plain decoding, and when sampling their very distribution."""

import pytest
import torch
import zoo
from tokenizers import Tokenizer, models
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    PreTrainedTokenizerFast,
    StoppingCriteria,
)
from transformers.generation.streamers import BaseStreamer
from turbos import enliven, transformed

import depthpass as dp
from depthpass.hf.decoding.drafts import draft_of
from depthpass.hf.decoding.speculation import _redrawn

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
    own_lists = {k: more.pop(k) for k in ("logits_processor", "stopping_criteria") if k in more}
    outputs, tapes = [], []
    for draft in ({}, {"draft": "loop:1", "draft_tokens": 3}, {"draft": "loop:1"}):
        tapes.append(_Tape())
        own = {k: [make()] for k, make in own_lists.items()}
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
            actual, wanted = (getattr(output, key) for output in (got, want))
            assert (actual is None) is (wanted is None)
            torch.testing.assert_close(actual or (), wanted or (), rtol=1e-5, atol=1e-5)


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


DISTRIBUTED = {
    "loop": (dp.Loop(times=2), "loop:1"),
    "plt": (dp.ParallelLoop(loops=2, window=2), "loop:1"),
    "bridges": ([dp.Loop(times=2), dp.TurboConn(bridges=((6, 0),), group=2, rank=4)], dp.LayerProgram([0, 1, 3])),
    "mor": (dp.MixtureOfRecursions(recursions=2, mode="threshold"), dp.LayerProgram([0, 1, 3])),
    "mor by token": (dp.MixtureOfRecursions(recursions=2, router="token"), dp.LayerProgram([0, 1, 3])),
    "mod": (dp.MixtureOfDepths(mode="threshold"), dp.LayerProgram([0, 1])),
    "exits": (dp.Loop(times=3, exit=0.5), "{pass: loop, times: 3, exit: 0.3}"),
}


@pytest.mark.parametrize("case", DISTRIBUTED)
def test_sampled_rows_are_distributed_as_plain_ones(case):
    """The last three of five tokens over a vocabulary of five, against exact probabilities; many rows go on together."""
    spec, draft = DISTRIBUTED[case]
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=5, hidden_size=16, intermediate_size=16, num_hidden_layers=4, num_attention_heads=2,
                         bos_token_id=None, eos_token_id=None, pad_token_id=0)
    model = dp.transform(enliven(LlamaForCausalLM(config).eval(), std=0.4), spec)
    enliven(model.depth, seed=1, std=0.6, least=1)
    prompt, rows, temperature = torch.tensor([[1, 3, 2]]), 8000, 1.5
    every = torch.cartesian_prod(*[torch.arange(5)] * 5)
    with torch.no_grad():
        logits = model(torch.cat((prompt.expand(len(every), -1), every), 1)).logits[:, 2:7]
    chances = torch.softmax(logits.double() / temperature, -1).gather(2, every[..., None])
    want = rows * chances.prod(1).view(25, 125).sum(0)
    torch.manual_seed(0)
    out = model.generate(prompt.expand(rows, -1), max_new_tokens=5, do_sample=True, temperature=temperature, top_k=0, draft=draft,
                         draft_tokens=2)
    report = model.depth_drafted
    assert 0 < report.accepted < report.drafted and max(report.chosen) == 2
    seen = torch.bincount(out[:, 5:] @ torch.tensor([25, 5, 1]), minlength=125)
    rare = want < 8  # too few for the approximation: counted as one
    actual, wanted = (torch.cat((x[~rare], x[rare].sum()[None])) for x in (seen, want))
    freedom = len(wanted) - 1
    assert freedom > 40 and ((actual - wanted) ** 2 / wanted).sum() < freedom + 3.5 * (2 * freedom) ** 0.5  # 0.999


@pytest.mark.parametrize(("spec", "draft"), [
    (LOOP, "loop:1"),
    (dp.Loop(start=1, end=3, times=3, kv="first"), "loop:2"),
    (dp.ParallelLoop(loops=3, window=3), "loop:1"),
    (dp.MixtureOfRecursions(start=1, end=3, recursions=3, mode="threshold"), dp.LayerProgram([0, 1, 3])),
], ids=["loop", "first", "plt", "mor"])
def test_drafts_that_do_not_pay_cost_next_to_nothing(spec, draft):
    model = transformed("llama", spec, torch.float32)
    for tokens in (16, 72):
        model.generate(BATCH["input_ids"][:1], max_new_tokens=tokens, do_sample=False, eos_token_id=None, draft=draft)
        report = model.depth_drafted
        assert report.visits <= 1.05 * report.plain_visits
    assert report.drafted > 0 and report.chosen.count(0) > 40


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
        ({"draft": "loop:1", "assistant_tokenizer": _words()}, "assistant_tokenizer=None"),
        ({"draft": "loop:1", "cache_implementation": "static"}, "cache_implementation='static'"),
        ({"draft": "loop:1", "cache_implementation": "quantized"}, "cache_implementation='quantized'"),
        ({"draft": "loop:9"}, "shallower than the model's 10 visits per token, got .* with 20"),
        ({"draft": dp.LayerProgram([0, 1, 7])}, "blocks in 0..3, got 7"),
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
    for cache in (dp.DepthCache(model), DynamicCache()):
        with pytest.raises(dp.CacheError, match=f"no cache of your own, got a {type(cache).__name__}"):
            model.generate(**BATCH, draft="loop:1", **{zoo.CACHE: cache})
    noisy = transformed("llama", dp.Loop.huginn(1, 3), torch.float32)
    with pytest.raises(dp.InputError, match="random states"):
        noisy.generate(**BATCH, draft="loop:1")


def test_the_rest_of_a_loop_reads_no_block_twice():
    draft = draft_of(transformed("llama", LOOP, torch.float32), "loop:1")
    assert draft.rest is not None and draft.rest.cost == 7 and draft.draft.cost == 4 and draft.slots == {0: 0, 1: 1, 2: 2}
