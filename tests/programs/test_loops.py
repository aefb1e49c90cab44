"""Layer programs and loops on stock models against the naive oracle: float64, outputs and all gradients."""

import oracle_program as oracle
import pytest
import torch
import zoo
from depthpass_lowering.executors.noise import noise
from depthpass_lowering.supported import check_program
from turbos import enliven

import depthpass as dp
from depthpass.ir import parse_program

LENGTHS = [8, 5]
MODELS = ["llama", "gpt2", "gemma3_text", "mixtral"]


def transformed(name, spec, layers=3):
    stock = enliven(zoo.model(name, layers, dtype=torch.float64), std=0.2)
    model = dp.transform(stock, spec)
    enliven(model.depth, seed=1, std=0.3, least=1)
    return stock, model


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("spec", "layers"),
    [
        (dp.LayerProgram([0, 1, 2, 1, 2]), [0, 1, 2, 1, 2]),
        (dp.LayerProgram([2, 0, 0, 1]), [2, 0, 0, 1]),
        (dp.IntraLayerRecurrence([2, 1, 2]), [0, 0, 1, 2, 2]),
    ],
    ids=["block_repeat", "reorder", "intra_layer"],
)
def test_layer_programs(name, spec, layers):
    stock, model = transformed(name, spec)
    oracle.compare(stock, model, zoo.batch(LENGTHS), lambda row, p: oracle.layer_program(row, layers))


LOOPS = {
    "damped": {"damped": True},
    "add": {"inject": "add"},
    "add_zeros": {"inject": "add", "state": "zeros"},
    "concat_noise": {"inject": "concat", "state": "noise", "noise_std": 0.5},
    "first_keys": {"kv": "first"},
    "norms": {"normalize": "loop", "out_norm": True},
    "fully_looped": {"inject": "attention", "normalize": "loop"},
}


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
@pytest.mark.parametrize("kind", LOOPS)
def test_loops(name, kind):
    options = LOOPS[kind]
    stock, model = transformed(name, dp.Loop(start=1, end=2, times=3, **options))
    drawn = options.get("noise_std", 1.0) * noise(0, torch.arange(max(LENGTHS)), 32).double()

    def want(row, p):
        norms = [k for k, on in (("loop", "normalize" in options), ("out", "out_norm" in options)) if on]
        given = {k: v for k, v in options.items() if k in ("damped", "inject", "state", "kv")}
        adapter = (p["loop.inject.weight"], p["loop.inject.bias"]) if "loop.inject.weight" in p else None
        return oracle.loop(row, 1, 2, 3, **given, adapter=adapter, noise=drawn, norms=norms)[-1]

    oracle.compare(stock, model, zoo.batch(LENGTHS), want)


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_identity_settings_are_bitwise_stock(name):
    stock = enliven(zoo.model(name, 3))
    batch = zoo.batch([7, 7])
    with torch.no_grad():
        want = stock(**batch).logits
        for spec in (
            dp.LayerProgram([0, 1, 2]), dp.IntraLayerRecurrence([1, 1, 1]), dp.Repeat(0, 2, times=1),
            dp.Loop(start=1, end=2, times=1, damped=True, inject="add"),
        ):
            assert torch.equal(dp.transform(stock, spec)(**batch).logits, want), spec
        # A half of s and a half of e are e where the loop starts from it.
        once = dp.transform(stock, dp.Loop(start=1, end=3, times=1, inject="bounded"))
        torch.testing.assert_close(once(**batch).logits, want, rtol=1e-6, atol=1e-6)
        # The injection adapter starts as [0, I]: every iteration is core(e), whatever the number of them.
        looped = dp.transform(stock, dp.Loop(start=1, end=3, times=3, inject="concat"))
        torch.testing.assert_close(looped(**batch).logits, want, rtol=1e-5, atol=1e-5)


def test_tap_t_is_a_run_with_t_iterations():
    stock, model = transformed("llama", dp.Loop(start=1, end=2, times=3, inject="add", taps=True))
    batch = zoo.batch(LENGTHS)
    out = model(**batch, labels=batch["input_ids"])
    assert type(out) is type(stock(**batch))
    assert list(out.taps) == ["loop.t1", "loop.t2", "loop.t3"]
    torch.testing.assert_close(out.taps["loop.t3"], out.logits, rtol=0, atol=0)
    for t in (1, 2, 3):
        alone = dp.transform(stock, dp.Loop(start=1, end=2, times=t, inject="add"))(**batch).logits
        torch.testing.assert_close(out.taps[f"loop.t{t}"], alone, rtol=1e-9, atol=1e-9)
    only = model(**batch, logits_to_keep=1)
    assert only.taps["loop.t1"].shape == only.logits.shape == (2, 1, zoo.VOCABULARY)


def test_stream_taps_and_the_logit_lens():
    stock, model = transformed("gpt2", [dp.Taps(at=[0, 2]), dp.Taps(at=[0], head=True, scope="lens")])
    batch = zoo.batch([6, 6])
    seen = []
    handle = stock.transformer.h[0].register_forward_hook(lambda m, args, out: seen.append(out))
    stock(**batch)
    handle.remove()
    hidden = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    out = model(**batch)
    torch.testing.assert_close(out.taps["taps.v0"], hidden, rtol=1e-9, atol=1e-9)
    lens = stock.lm_head(stock.transformer.ln_f(hidden))
    torch.testing.assert_close(out.taps["lens.v0"], lens, rtol=1e-9, atol=1e-9)
    assert isinstance(model(**batch, return_dict=False), tuple)
    assert not hasattr(dp.transform(stock, dp.Identity())(**batch), "taps")
    headless = dp.transform(stock.transformer, dp.Taps(at=[0], head=True))
    with pytest.raises(dp.UnsupportedModelError, match="last_hidden_state"):
        headless(**batch)


def test_grad_is_the_sum_over_visits():
    stock, model = transformed("llama", dp.LayerProgram([0, 1, 1, 2]))
    batch = zoo.batch(LENGTHS)
    model(**batch).logits.square().sum().backward()
    got = stock.model.layers[1].mlp.up_proj.weight.grad.clone()
    # The same function with a copy of the block's weights for its second visit.
    unrolled = enliven(zoo.model("llama", 4, dtype=torch.float64))
    unrolled.load_state_dict(
        {k.replace("layers.2.", "layers.3.") if "layers.2." in k else k: v for k, v in stock.state_dict().items()}
        | {k.replace("layers.1.", "layers.2."): v for k, v in stock.state_dict().items() if "layers.1." in k}
    )
    plain = dp.transform(unrolled, dp.Identity())
    plain(**batch).logits.square().sum().backward()
    parts = [unrolled.model.layers[i].mlp.up_proj.weight.grad for i in (1, 2)]
    assert min(p.abs().max() for p in parts) > 1e-3
    torch.testing.assert_close(got, parts[0] + parts[1], rtol=1e-9, atol=1e-9)


def test_exit_takes_the_first_state_whose_exit_probability_is_reached():
    stock, model = transformed("llama", dp.Loop(start=1, end=3, times=3, exit=0.6, skip=False, taps=True))
    batch = zoo.batch([8, 8])
    tapped = dp.transform(stock, dp.Loop(start=1, end=3, times=3, taps=True))
    with torch.no_grad():
        states = list(tapped(**batch).taps.values())
        seen = set()
        for bias, exit_at in ((-9.0, 3), (0.2, None), (9.0, 1)):
            model.depth.loop.exit.bias.fill_(bias)
            out = model(**batch)
            got = out.logits
            assert list(out.taps) == [f"loop.t{t}.exit" for t in (1, 2, 3)] + [f"loop.t{t}" for t in (1, 2, 3)]
            assert out.taps["loop.t1.exit"].shape == (2, 8, 1)
            nearest = torch.stack([(got - s).abs().amax(-1) for s in states]).min(0)
            assert nearest.values.max() < 1e-9
            seen |= set((nearest.indices + 1).flatten().tolist())
            assert exit_at is None or (nearest.indices + 1 == exit_at).all()
    assert seen == {1, 2, 3}


def test_what_cannot_run_is_refused_before_anything_is_made():
    text = ("program M blocks=1 width=8\n%0 = embed\n%1 = block 0 (%0) slot 0\n%2 = pad 2 (%1)\n"
            "%3 = block 0 (%2) slot 1\n%4 = trim 2 (%3)\noutput %4")
    with pytest.raises(dp.LoweringError, match=r"%2 = pad of another stream than embed; %1 = block of embed"):
        check_program(parse_program(text))


@pytest.mark.parametrize("bridge", [(1, 0), (3, 2)], ids=["writer", "reader"])
@pytest.mark.parametrize("lowering", ["eager", "auto"])
def test_keys_shared_across_the_border_of_a_token_loop(bridge, lowering):
    """A feedback edge puts the visit that writes shared keys, or one that reads them, into the token loop."""
    spec = [dp.Loop(start=1, end=2, times=3, kv="first"), dp.TurboConn(bridges=[bridge], group=2, rank=4)]
    stock, _ = transformed("llama", dp.Identity())
    model = dp.transform(stock, spec, lowering=lowering)
    enliven(model.depth, seed=1, std=0.3, least=1)
    one_by_one = dp.transform(stock, spec, chunk=1, lowering="eager")
    one_by_one.depth.load_state_dict(model.depth.state_dict())
    batch = zoo.batch(LENGTHS)
    real = batch["attention_mask"].bool()
    seen = []
    for m in (model, one_by_one):
        stock.zero_grad(), m.zero_grad()
        logits = m(**batch).logits[real]
        logits.square().sum().backward()
        seen.append([logits.detach(), *(p.grad.clone() for p in m.parameters())])
    for got, want in zip(*seen, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)
    cache = dp.DepthCache(model)
    with torch.no_grad():
        steps = [
            model(input_ids=batch["input_ids"][:, i : i + 1], attention_mask=batch["attention_mask"][:, : i + 1],
                  past_key_values=cache).logits for i in range(max(LENGTHS))
        ]
    torch.testing.assert_close(torch.cat(steps, 1)[real], seen[0][0], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_every_visit_has_a_lora_of_its_own(name):
    """Equal to a stack of separate blocks, each with its update merged: relaxed recursive transformers."""
    stock, model = transformed(name, dp.Identity())
    model = dp.transform(stock, dp.Loop(start=1, end=2, times=2, lora_rank=3))
    batch = zoo.batch(LENGTHS)
    real = batch["attention_mask"].bool()
    plain = dp.transform(stock, dp.Loop(start=1, end=2, times=2))
    torch.testing.assert_close(model(**batch).logits, plain(**batch).logits, rtol=0, atol=0)
    enliven(model.depth, seed=3, std=0.3, least=1)
    unrolled = zoo.model(name, 4, dtype=torch.float64)
    layers = oracle.blocks_of(unrolled)
    state = [dict(b.state_dict()) for b in oracle.blocks_of(stock)]
    for block, visit in zip(layers, [(0, None), (1, 0), (1, 1), (2, None)], strict=True):
        block.load_state_dict(state[visit[0]])
        if visit[1] is not None:
            updates = model.depth.get_submodule(f"loop.t{visit[1]}.v1.lora")
            for path, low in updates.named_modules():
                if hasattr(low, "low_rank"):
                    block.get_submodule(path).weight.data += low().data
    rest = {k: v for k, v in stock.state_dict().items() if ".layers." not in k and ".h." not in k}
    unrolled.load_state_dict(rest, strict=False)
    with torch.no_grad():
        want = unrolled(**batch).logits[real]
        got = model(**batch).logits
        assert (got - plain(**batch).logits)[real].abs().max() > 1e-2
        torch.testing.assert_close(got[real], want, rtol=1e-9, atol=1e-9)
    model(**batch).logits[real].square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in model.depth.parameters())
