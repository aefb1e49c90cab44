"""Masked diffusion against stock models under explicit masks, in float64: logits, gradients, losses, sampling."""

import copy
import inspect
import math

import diffusion_oracle as oracle
import pytest
import torch
import zoo

import depthpass as dp
from depthpass.errors import InputError, PassError, SpecError, VerifyError
from depthpass.ir import parse_program, plain

MASK = 96


@pytest.fixture(scope="module")
def stock():
    transformed = zoo.model("llama", layers=3, dtype=torch.float64)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in transformed.parameters():
            if p.dim() > 1:
                p.copy_(torch.randn(p.shape, generator=g, dtype=p.dtype) * 0.2)
    return transformed


@pytest.fixture(scope="module")
def diffusers(stock):
    return {block: dp.transform(stock, dp.MaskedDiffusion(steps=3, mask_token=MASK, block=block)) for block in (None, 4)}


def rows(*lengths, side="left"):
    batch = zoo.batch(list(lengths), side)
    batch["input_ids"][batch["input_ids"] == MASK] = 7
    return batch["input_ids"], batch["attention_mask"].bool()


@pytest.mark.parametrize(("block", "side"), [(None, "left"), (None, "right"), (4, "left"), (4, "right")])
def test_logits_and_gradients_equal_the_stock_model_under_a_mask(stock, diffusers, block, side):
    ids, seen = rows(11, 8, 3, side=side)
    model, weight = diffusers[block], torch.randn(3, 11, zoo.VOCABULARY, dtype=torch.float64)
    got = {}
    for name, out in (("program", model(input_ids=ids, attention_mask=seen).logits),
                      ("stock", oracle.logits(stock, seen, block, input_ids=ids))):
        stock.zero_grad()
        (out * weight)[seen].sum().backward()
        got[name] = out[seen].detach(), [p.grad.clone() for p in stock.parameters()]
    torch.testing.assert_close(got["program"][0], got["stock"][0], rtol=1e-12, atol=1e-12)
    for a, b in zip(got["program"][1], got["stock"][1]):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("name", "block"), [
    ("gpt2", None), ("mistral", None), ("mistral", 5), ("gemma2", 5), ("llama4_text", 5),
])
def test_windows_chunks_and_other_architectures(name, block):
    """Windows of 4 tokens reach in both directions, chunks of 4 are seen whole; rows of 11."""
    model = zoo.model(name, layers=2, dtype=torch.float64)
    transformed = dp.transform(model, dp.Bidirectional(block=block))
    # transformers' eager attention takes its softmax in float32, where a pad that sees nothing is NaN in float64 models.
    ids, seen = rows(11, 11 if name == "gemma2" else 8)
    got = transformed(input_ids=ids, attention_mask=seen).logits
    config = model.config
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * 2
    if name == "mistral":
        kinds = ["sliding_attention"] * 2
    limits = {"full_attention": {}, "sliding_attention": {"window": zoo.WINDOW}, "chunked_attention": {"chunk": zoo.WINDOW}}
    masks = [oracle.bias(oracle.visible(seen, block=block, **limits[k]), torch.float64) for k in kinds]
    handles = [layer.register_forward_pre_hook(_with(mask), with_kwargs=True) for layer, mask in zip(_layers(model), masks)]
    at = torch.arange(11)[None].expand(2, -1)
    want = model(input_ids=ids, position_ids=at, use_cache=False).logits
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(got[seen], want[seen], rtol=1e-7, atol=1e-9)


def _layers(model):
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def _with(mask):
    def hook(module, args, kwargs):
        names = list(inspect.signature(module.forward).parameters)
        at = names.index("attention_mask")
        if at >= len(args):
            return args, {**kwargs, "attention_mask": mask}
        return (*args[:at], mask, *args[at + 1 :]), kwargs
    return hook


def test_block_of_one_token_is_causal(stock):
    """A block of one is the stock model, whatever the padding; the whole row is another function."""
    ids, seen = rows(9, 6)
    one = dp.transform(stock, dp.Bidirectional(block=1))(input_ids=ids, attention_mask=seen).logits
    torch.testing.assert_close(one[seen], stock(input_ids=ids, attention_mask=seen).logits[seen], rtol=1e-10, atol=1e-11)


def test_loops_see_ahead_as_well(stock):
    """Two iterations of the blocks, each with keys of its own: a stock model with the layers twice, under the mask."""
    ids, seen = rows(10, 7)
    looped = dp.transform(stock, [dp.Loop(times=2, taps=True), dp.Bidirectional(block=4)])
    twice = copy.deepcopy(stock)
    twice.model.layers.extend(copy.deepcopy(list(stock.model.layers)))
    for i, layer in enumerate(twice.model.layers):
        layer.self_attn.layer_idx = i
    twice.config.num_hidden_layers = 6
    out = looped(input_ids=ids, attention_mask=seen)
    torch.testing.assert_close(out.logits[seen], oracle.logits(twice, seen, 4, input_ids=ids)[seen], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(out.taps["loop.t1"][seen], oracle.logits(stock, seen, 4, input_ids=ids)[seen], rtol=1e-10,
                               atol=1e-10)


@pytest.mark.parametrize(("block", "schedule"), [(None, "linear"), (None, "cosine"), (4, "linear")])
def test_loss_and_gradients_by_hand(stock, diffusers, block, schedule):
    ids, _ = rows(10, 10)
    labels = ids.clone()
    labels[0, :3] = -100
    g = torch.Generator().manual_seed(3)
    time = torch.rand(2, 1 if block is None else 3, generator=g, dtype=torch.float64) * 0.8 + 0.1
    masked = torch.rand(2, 10, generator=g) < 0.6
    m = time if schedule == "linear" else 1 - torch.cos(math.pi / 2 * time)
    slope = torch.ones_like(time) if schedule == "linear" else math.pi / 2 * torch.sin(math.pi / 2 * time)
    weight = (slope / m).repeat_interleave(10 if block is None else block, 1)[:, :10]
    may = labels != -100
    seen = {}
    for name in ("program", "stock"):
        stock.zero_grad()
        loss = (dp.diffusion_loss(diffusers[block], ids, labels=labels, time=time, masked=masked, schedule=schedule)
                if name == "program" else oracle.elbo(stock, ids, masked & may, weight, MASK, may, block))
        loss.backward()
        seen[name] = loss.detach(), [p.grad.clone() for p in stock.parameters()]
    torch.testing.assert_close(seen["program"][0], seen["stock"][0], rtol=1e-10, atol=0)
    # Llama's norms round to float32, each partial sum of a clean block's gradient in another place.
    tight = {"rtol": 1e-8, "atol": 1e-10} if block is None else {"rtol": 1e-5, "atol": 2e-7}
    for a, b in zip(seen["program"][1], seen["stock"][1]):
        torch.testing.assert_close(a, b, **tight)


def test_early_times_keep_their_weight_in_single_precision(diffusers):
    """m'(t) / m(t) is 1/t and 2/t there; 1 - cos(pi t / 2) is 0 in float32."""
    ids, masked = rows(6, 6)[0], torch.ones(2, 6, dtype=torch.bool)
    with torch.no_grad():
        linear, cosine = (dp.diffusion_loss(diffusers[None], ids, time=torch.full((2,), 1e-4), masked=masked, schedule=s)
                          for s in ("linear", "cosine"))
    torch.testing.assert_close(cosine / linear, torch.full_like(linear, 2.0), rtol=1e-6, atol=0)


def test_right_pads_count_for_nothing_in_the_loss(diffusers):
    ids, seen = rows(10, 7, side="right")
    for block, model in diffusers.items():
        time = torch.full((2, 1 if block is None else 3), 0.5, dtype=torch.float64)
        masked = torch.arange(10)[None].expand(2, -1) % 2 == 0
        both = dp.diffusion_loss(model, ids, attention_mask=seen, time=time, masked=masked) * 17
        one = [dp.diffusion_loss(model, ids[r : r + 1, :n], time=time[r : r + 1, : -(-n // block) if block else 1],
                                 masked=masked[r : r + 1, :n]) * n for r, n in enumerate((10, 7))]
        torch.testing.assert_close(both, sum(one), rtol=1e-10, atol=0)


def test_noise_is_spread_over_the_batch_and_repeats_with_its_seed(diffusers):
    ids, _ = rows(10, 10)
    seeded = [dp.diffusion_loss(diffusers[None], ids, generator=torch.Generator().manual_seed(s)).item() for s in (0, 0, 1)]
    assert seeded[0] == seeded[1] != seeded[2]
    from depthpass.diffusion.loss import _times
    from depthpass.passes.masked_diffusion import MaskedDiffusion

    times = _times(torch.zeros(64, 5, dtype=torch.long), MaskedDiffusion(steps=1, mask_token=1), None, 1e-3, None, "")[:, 0]
    assert torch.histc(times, 8, 0, 1).tolist() == pytest.approx([8] * 8, abs=1) and times.min() >= 1e-3


@pytest.mark.parametrize(("block", "order"), [(None, "confidence"), (None, "entropy"), (None, "margin"), (4, "confidence"),
                                              (4, "left")])
def test_sampling_equals_a_loop_over_whole_rows(stock, diffusers, block, order):
    """Left-padded prompts of other lengths, with and without kept blocks, against single rows without padding."""
    prompts, new = (6, 4, 1), 9
    ids, seen = rows(*prompts)
    want = oracle.denoise(stock, [r[s].tolist() for r, s in zip(ids, seen)], new, 3, MASK, order, block)
    for reuse in (True, False):
        got = dp.denoise(diffusers[block], ids, seen, new_tokens=new, unmask=order, reuse=reuse, details=True)
        for row, n, text in zip(got.ids, prompts, want):
            assert row[-n - new :].tolist() == text
        assert bool((got.written[:, ids.shape[1] :] > 0).all()) and not got.written[:, : ids.shape[1]].any()


@pytest.mark.parametrize("block", [None, 3])
def test_rows_behind_pads_keep_their_places_in_a_table(block):
    stock = zoo.model("gpt2", layers=2, dtype=torch.float64)
    with torch.no_grad():
        stock.transformer.wpe.weight.mul_(50)
    model = dp.transform(stock, dp.MaskedDiffusion(steps=3, mask_token=MASK, block=block))
    ids, seen = rows(7, 4)
    both = dp.denoise(model, ids, seen, new_tokens=6)
    assert torch.equal(both[1, 3:], dp.denoise(model, ids[1:, 3:], new_tokens=6)[0])
    x, on_right = rows(7, 4, side="right") if block else (ids, seen)
    draws = {"masked": torch.ones_like(x).bool(), "time": torch.full((2, 1 if block is None else 3), 0.5)}
    loss = dp.diffusion_loss(model, x, attention_mask=on_right, **draws)
    alone = [dp.diffusion_loss(model, x[r : r + 1, on_right[r]], masked=torch.ones(1, n).bool(),
                               time=draws["time"][r : r + 1, : 1 if block is None else -(-n // 3)]) * n
             for r, n in enumerate((7, 4))]
    torch.testing.assert_close(loss, sum(alone) / 11, rtol=1e-6, atol=1e-6)


def test_kept_blocks_save_work(diffusers):
    ids, _ = rows(8, 8)
    kept, again = (dp.denoise(diffusers[4], ids, new_tokens=16, reuse=r, details=True) for r in (True, False))
    assert torch.equal(kept.ids, again.ids)
    # 4 blocks of 3 steps over 4 tokens, a pass over the prompt and one over each finished block but the last.
    assert kept.tokens_run == 2 * (4 * 3 * 4 + 8 + 3 * 4) < again.tokens_run == 2 * sum(3 * (8 + 4 * b) for b in (1, 2, 3, 4))


@pytest.mark.parametrize(("pads", "block", "tokens"), [(1, 2, 7), (2, 2, 8), (2, None, 7)])
def test_workspace_pads_end_the_prompt(stock, pads, block, tokens):
    """Kept keys change nothing, and padded rows are the rows alone."""
    model = dp.transform(stock, [dp.MaskedDiffusion(steps=2, mask_token=MASK, block=block), dp.Pad(pads, token=5)])
    ids, mask = torch.stack([torch.arange(6, 6 + tokens), torch.arange(9, 9 + tokens)]), torch.ones(2, tokens, dtype=torch.long)
    mask[1, :2] = 0
    denoised = dp.denoise(model, ids, mask, new_tokens=6, details=True)
    again = dp.denoise(model, ids, mask, new_tokens=6, reuse=False, details=True)
    assert torch.equal(denoised.ids, again.ids)
    assert (denoised.tokens_run < again.tokens_run) == (block == 2 and pads == 2)
    assert denoised.ids[1, 2:].tolist() == dp.denoise(model, ids[1:, 2:], new_tokens=6)[0].tolist()


def test_a_cache_counts_pads_in_its_blocks(stock):
    model = dp.transform(stock, [dp.MaskedDiffusion(steps=2, mask_token=MASK, block=2), dp.Pad(1, token=5)])
    held = model(torch.arange(6, 14)[None], use_cache=True).past_key_values
    with pytest.raises(dp.InputError, match="8 real tokens and 1 pads"):
        model(torch.arange(6, 8)[None], past_key_values=held)


def test_orders_and_draws(diffusers):
    ids, _ = rows(5, 5)

    def run(seed=0, **options):
        return dp.denoise(diffusers[None], ids, new_tokens=6, details=True, generator=torch.Generator().manual_seed(seed),
                          **options)

    for order in ("random", "ancestral"):
        a, b, c = run(unmask=order), run(unmask=order), run(1, unmask=order)
        assert torch.equal(a.written, b.written) and not torch.equal(a.written, c.written)
    assert [int((run(unmask="random", steps=3).written == s).sum()) for s in (1, 2, 3)] == [4, 4, 4]
    assert run(unmask="left", steps=6).written[:, 5:].tolist() == [[1, 2, 3, 4, 5, 6]] * 2
    assert not torch.equal(run(temperature=5.0).ids, run(2, temperature=5.0).ids)
    assert MASK not in run(temperature=5.0).ids


def test_planners_score_or_choose(diffusers):
    ids, _ = rows(5, 5)
    right = torch.arange(11).double()[None].expand(2, -1)
    tokens = dp.denoise(diffusers[None], ids, new_tokens=6, unmask="planner", planner=lambda *_: right, details=True)
    assert tokens.written[0, 5:].tolist() == [3, 3, 2, 2, 1, 1]
    seen = []

    def all_of_them(logits, ids, masked, step):
        seen.append((tuple(logits.shape), int(masked.sum()), step))
        return torch.ones_like(masked)

    again = dp.denoise(diffusers[None], ids, new_tokens=6, unmask="planner", planner=all_of_them, details=True)
    assert (again.written[:, 5:] == 3).all() and torch.equal(again.ids[:, :5], ids)  # written again at every step; prompts stay
    assert seen == [((2, 11, 97), 12, 0), ((2, 11, 97), 0, 1), ((2, 11, 97), 0, 2)]
    with pytest.raises(InputError, match="12 masks that are left"):
        dp.denoise(diffusers[None], ids, new_tokens=6, unmask="planner", planner=lambda x, i, m, s: torch.zeros_like(m))
    with pytest.raises(InputError, match="got NaN"):
        dp.denoise(diffusers[None], ids, new_tokens=6, unmask="planner", planner=lambda x, i, m, s: m * float("nan"))


def test_stopping_after_a_block(diffusers):
    ids, _ = rows(4, 4)
    whole = dp.denoise(diffusers[4], ids, new_tokens=12)
    stop = whole[0, 5].item()
    short = dp.denoise(diffusers[4], ids[:1], new_tokens=12, eos_token=stop)
    assert short.shape[1] == 8 and torch.equal(short, whole[:1, :8])


def test_generate_is_denoise(diffusers):
    ids, seen = rows(6, 4)
    for model in diffusers.values():
        got = model.generate(ids, attention_mask=seen, max_new_tokens=5)
        assert torch.equal(got, dp.denoise(model, ids, seen, new_tokens=5))
    with pytest.raises(InputError, match="num_beams means nothing"):
        diffusers[None].generate(ids, max_new_tokens=5, num_beams=3)
    with pytest.raises(InputError, match="max_new_tokens"):
        diffusers[None].generate(ids)


def test_shift_reads_the_logits_of_the_position_before(stock):
    ids, _ = rows(8, 8)
    model = dp.transform(stock, dp.MaskedDiffusion(steps=2, mask_token=MASK, shift=True))
    time, masked = torch.full((2,), 0.5, dtype=torch.float64), torch.zeros(2, 8, dtype=torch.bool)
    masked[:, 3] = masked[:, 0] = True
    noised = ids.masked_fill(masked, MASK)
    out = oracle.logits(stock, torch.ones_like(ids), input_ids=noised)
    out[..., MASK] = float("-inf")
    lp = out.log_softmax(-1)
    want = -2 * sum(lp[r, a, ids[r, b]] for r in (0, 1) for a, b in ((0, 0), (2, 3))) / 16
    torch.testing.assert_close(dp.diffusion_loss(model, ids, time=time, masked=masked), want)


def test_a_saved_model_comes_back_and_caches_are_refused(diffusers, tmp_path):
    ids, _ = rows(8, 8)
    for block, model in diffusers.items():
        model.save_pretrained(tmp_path / str(block))
        again = dp.from_pretrained(tmp_path / str(block), dtype=torch.float64)
        assert again.depth_program.without_notes() == model.depth_program.without_notes()
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
        assert model(input_ids=ids)[zoo.CACHE] is None if zoo.CACHE in model(input_ids=ids) else True
    with pytest.raises(InputError, match="sees the whole row"):
        diffusers[None](input_ids=ids, use_cache=True)
    cache = dp.DepthCache(diffusers[4])
    diffusers[4](input_ids=ids[:, :6], past_key_values=cache, use_cache=True)
    with pytest.raises(InputError, match=r"blocks of 4 tokens as a whole.*got rows of 6 real"):
        diffusers[4](input_ids=ids[:, 6:], past_key_values=cache)


def test_labels_of_next_tokens_are_refused(diffusers):
    """Every token sees the next one: the stock loss would be a measure of copying."""
    ids, _ = rows(8, 8)
    for model in diffusers.values():
        with pytest.raises(InputError, match=r"measure copying. Use dp.diffusion_loss"):
            model(input_ids=ids, labels=ids)


def test_texts_of_programs(stock):
    text = str(dp.transform(stock, dp.MaskedDiffusion(steps=3, mask_token=MASK, unmask="random", block=4)).depth_program)
    assert "ahead 4" in text and f"denoise 3 order random token {MASK}" in text
    assert str(parse_program(text)) == text


@pytest.mark.parametrize(("line", "message"), [
    ("ahead -1", "tokens of at least 0"), ("ahead 0\n  ahead 4", "once in a program"),
    ("denoise 0 token 3", "steps of at least 1"),
    ("denoise 2", "'token' is missing"), ("ahead 0\n  %9 = delay 1 (%1)", "whose tokens run together"),
])
def test_programs_that_break_a_rule(line, message):
    from depthpass.ir import verify

    text = str(plain("M", 2, 8)).replace("%0 = embed", f"%0 = embed\n  {line}")
    with pytest.raises(VerifyError, match=message):
        verify(parse_program(text))


@pytest.mark.parametrize(("make", "error", "message"), [
    (lambda m: dp.MaskedDiffusion(steps=0, mask_token=3), SpecError, "steps: expected at least 1"),
    (lambda m: dp.MaskedDiffusion(steps=2, mask_token=3, unmask="confidance"), SpecError, "unmask"),
    (lambda m: dp.MaskedDiffusion(steps=9, mask_token=3, block=4), SpecError, "one step per token"),
    (lambda m: dp.MaskedDiffusion(steps=2, mask_token=3, block=4, shift=True), SpecError, "shift"),
    (lambda m: dp.transform(m, dp.MaskedDiffusion(steps=2, mask_token=97)), PassError, "below the vocabulary of 97"),
    (lambda m: dp.transform(m, [dp.TurboConn(bridges=[(2, 0)], group=2), dp.Bidirectional()]), PassError, "run together"),
    (lambda m: dp.transform(m, [dp.Bidirectional(), dp.TurboConn(bridges=[(2, 0)], group=2)]), VerifyError, "run together"),
    (lambda m: dp.transform(m, [dp.ParallelLoop(loops=2, window=4), dp.Bidirectional()]), PassError, "run together"),
    (lambda m: dp.transform(m, [dp.Coconut(latents=2), dp.Bidirectional()]), PassError, "latents"),
    (lambda m: dp.transform(m, [dp.Bidirectional(), dp.Bidirectional()]), PassError, "already"),
    (lambda m: dp.diffusion_loss(m, torch.ones(1, 3, dtype=torch.long)), SpecError, "expected a model transformed"),
    (lambda m: dp.transform(m, dp.Bidirectional()).generate(torch.ones(1, 3, dtype=torch.long)), InputError, "MaskedDiffusion"),
    (lambda m: dp.materialize(dp.transform(m, dp.Bidirectional())), Exception, "ahead|later tokens"),
])
def test_specs_that_cannot_be_honoured(stock, make, error, message):
    with pytest.raises(error, match=message):
        make(stock)


@pytest.mark.parametrize(("options", "message"), [
    ({"new_tokens": 0}, "new_tokens"), ({"new_tokens": 2, "steps": 3}, "at most one for each of 2"),
    ({"new_tokens": 4, "unmask": "lft"}, "Did you mean 'left'"), ({"new_tokens": 4, "unmask": "planner"}, "planner"),
    ({"new_tokens": 4, "temperature": -1.0}, "temperature"), ({"new_tokens": 4, "temperature": math.inf}, "temperature"),
    ({"new_tokens": 4, "input_ids": torch.tensor([[5, MASK, MASK]])}, "prompts without the mask token 96, got 2"),
    ({"new_tokens": 4, "attention_mask": torch.tensor([[1, 1, 0]])}, "padded on the left"),
    ({"new_tokens": 4, "attention_mask": torch.tensor([[0, 0, 0]])}, "a real token"),
    ({"new_tokens": 4, "attention_mask": torch.tensor([[1, 1]])}, "expected shape"),
])
def test_calls_of_the_sampler_that_cannot_be_honoured(diffusers, options, message):
    with pytest.raises(InputError, match=message):
        dp.denoise(diffusers[None], **{"input_ids": torch.tensor([[5, 6, 7]])} | options)


@pytest.mark.parametrize(("options", "message"), [
    ({"labels": torch.full((1, 4), -100)}, "-100 alone"), ({"labels": torch.ones(1, 3)}, "labels: expected shape"),
    ({"time": torch.tensor([0.0])}, r"values in \(0, 1\]"), ({"time": torch.ones(2, 2)}, "time: expected shape"),
    ({"masked": torch.ones(1, 3)}, "masked: expected shape"), ({"schedule": "sin"}, "schedule"), ({"eps": 0.0}, "eps"),
    ({"input_ids": torch.tensor([[5, MASK, 7, 8]])}, "is the mask"), ({"input_ids": torch.tensor([5, 6])}, "input_ids"),
])
def test_calls_of_the_loss_that_cannot_be_honoured(diffusers, options, message):
    with pytest.raises(InputError, match=message):
        dp.diffusion_loss(diffusers[None], **({"input_ids": torch.tensor([[5, 6, 7, 8]])} | options))


def test_block_losses_want_pads_on_the_right(diffusers):
    with pytest.raises(InputError, match="pads on the right"):
        dp.diffusion_loss(diffusers[4], torch.tensor([[0, 6, 7, 8]]), attention_mask=torch.tensor([[0, 1, 1, 1]]))


def test_models_that_cannot_see_ahead_are_refused():
    """A block that mixes tokens outside of attention has no mask to change."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from depthpass.errors import UnsupportedModelError

    config = AutoConfig.for_model("bloom", vocab_size=97, hidden_size=32, n_layer=2, n_head=4)
    with pytest.raises(UnsupportedModelError):
        model = dp.transform(AutoModelForCausalLM.from_config(config), dp.MaskedDiffusion(steps=2, mask_token=96))
        dp.denoise(model, torch.tensor([[5, 6]]), new_tokens=3)
