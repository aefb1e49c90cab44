"""Timestep encodings and per-visit scales against the stock modules with hooks: float64, outputs and all gradients."""

import math
from contextlib import contextmanager, nullcontext

import oracle_program as oracle
import pytest
import torch
import zoo
from turbos import enliven

import depthpass as dp

LENGTHS = [6, 4]
PLACES = {  # attention module, MLP module, and the modules whose results the residual stream takes
    "llama": ("self_attn", "mlp", "self_attn", "mlp"),
    "qwen2": ("self_attn", "mlp", "self_attn", "mlp"),
    "mixtral": ("self_attn", "mlp", "self_attn", "mlp"),
    "gpt2": ("attn", "mlp", "attn", "mlp"),
    "gpt_neox": ("attention", "mlp", "attention", "mlp"),  # parallel branches, a norm each
    "phi": ("self_attn", "mlp", "self_attn", "mlp"),  # parallel branches, one norm
    "gemma3_text": ("self_attn", "mlp", "post_attention_layernorm", "post_feedforward_layernorm"),  # sandwich norms
    "olmo2": ("self_attn", "mlp", "post_attention_layernorm", "post_feedforward_layernorm"),  # no norm in front
}


@contextmanager
def modulated(block, name, factors, base):
    """Stock block whose branches read ``(1 + s)`` times and add ``(base + g)`` times what they do."""
    gate_a, gate_m, scale_a, scale_m = factors
    attention, mlp, end_a, end_m = (block.get_submodule(p) for p in PLACES[name])

    def reads(scale):
        def hook(module, args, kwargs):
            if args:
                return (args[0] * (1 + scale), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": kwargs["hidden_states"] * (1 + scale)}

        return hook

    def adds(gate):
        def hook(module, args, out):
            return (out[0] * (base + gate), *out[1:]) if isinstance(out, tuple) else out * (base + gate)

        return hook

    handles = [
        attention.register_forward_pre_hook(reads(scale_a), with_kwargs=True),
        mlp.register_forward_pre_hook(reads(scale_m), with_kwargs=True),
        end_a.register_forward_hook(adds(gate_a)), end_m.register_forward_hook(adds(gate_m)),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def encoded(p, t):
    """TE(t), from the equations."""
    phase = torch.tensor([t / 10000 ** (i / 128) for i in range(128)], dtype=torch.float64)
    wave = torch.cat((phase.cos(), phase.sin()))
    inner = p["loop.clock.rise.weight"] @ wave + p["loop.clock.rise.bias"]
    return p["loop.clock.mix.weight"] @ (inner * torch.sigmoid(inner)) + p["loop.clock.mix.bias"]


def transformed(name, spec):
    overrides = {"layer_types": "alternate", "sliding_window": zoo.WINDOW, "use_sliding_window": True}
    stock = enliven(zoo.model(name, 3, dtype=torch.float64, **(overrides if name == "qwen2" else {})), std=0.2)
    model = dp.transform(stock, spec)
    enliven(model.depth, seed=1, std=0.3, least=1)
    return stock, model


@pytest.mark.parametrize("name", PLACES)
def test_timestep_encoding(name):
    stock, model = transformed(name, dp.Loop(start=1, end=3, times=3, timestep=True))

    def want(row, p):
        def around(t, b):
            te = encoded(p, t)
            te = te * torch.sigmoid(te)
            factors = (p[f"loop.v{b}.time.weight"] @ te + p[f"loop.v{b}.time.bias"]).view(4, -1)
            return modulated(row.blocks[b], name, factors, 1.0 if t == 0 else 0.0)

        return oracle.loop(row, 1, 3, 3, around=around)[-1]

    oracle.compare(stock, model, zoo.batch(LENGTHS), want)


@pytest.mark.parametrize(("name", "options"), [
    ("llama", {"residual": "1/n", "inject": "bounded"}), ("gpt2", {"residual": "1/n"}),
    ("gemma3_text", {"inject": "bounded", "state": "zeros"}),
])
def test_bounded_injection_and_scaled_residuals(name, options):
    stock, model = transformed(name, dp.Loop(start=1, end=3, times=3, **options))

    def want(row, p):
        def around(t, b):
            if "residual" not in options:
                return nullcontext()
            return modulated(row.blocks[b], name, p[f"loop.v{b}.scale.weight"], 1 / 3)

        bounded = "inject" in options
        adapter = (p["loop.keep.weight"], p["loop.inject.weight"]) if bounded else None
        return oracle.loop(row, 1, 3, 3, inject="bounded" if bounded else None, adapter=adapter, around=around,
                           state=options.get("state", "input"))[-1]

    oracle.compare(stock, model, zoo.batch(LENGTHS), want)
    greedy = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    batch, scaled = zoo.batch([5, 3]), "residual" in options
    assert torch.equal(model.generate(**batch, **greedy), model.generate(**batch, **greedy, use_cache=False))
    # The factor follows the loop count that runs.
    dp.set_loops(model, 2)
    assert {o["base"] for o in model.depth_program.visits[1:-1]} == {0.5 if scaled else 1.0}


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_scales_of_every_visit(name):
    stock, model = transformed(name, dp.LayerProgram([0, 1, 1, 2], scales=True))

    def want(row, p):
        slots, out = [oracle.Keys() for _ in range(4)], []
        for i in range(row.tokens):
            x = row.embed[i]
            for place, (b, keys) in enumerate(zip([0, 1, 1, 2], slots, strict=True)):
                with modulated(row.blocks[b], name, p[f"layer_program.p{place}.scale.weight"], 1.0):
                    x = row.block(b, x, i, oracle.own(keys))
            out.append(x)
        return torch.stack(out)

    oracle.compare(stock, model, zoo.batch(LENGTHS), want)


@pytest.mark.parametrize("name", ["llama", "gpt2", "cohere", "gemma2", "gpt_oss", "opt"])
@pytest.mark.parametrize("spec", [
    dp.Loop(start=0, end=2, times=3, timestep=True), dp.Loop(start=1, end=2, times=1, scales=True),
    dp.Loop(start=1, end=2, times=1, residual="1/n"),
    dp.LayerProgram([0, 1, 2], scales=True), dp.Repeat(1, 2, times=1, scales=True),
    dp.IntraLayerRecurrence([1, 1, 1], scales=True),
], ids=lambda s: s.name + str(getattr(s, "times", "")))
def test_starts_as_the_stock_model(name, spec):
    stock = enliven(zoo.model(name, 3))
    if name == "gpt_oss":
        stock.set_attn_implementation("eager")
    batch = zoo.batch([7, 7])
    with torch.no_grad():
        assert torch.equal(dp.transform(stock, spec)(**batch).logits, stock(**batch).logits)


def test_zero_form_starts_with_a_core_that_does_nothing():
    stock = enliven(zoo.model("llama", 3))
    batch = zoo.batch([7, 7])
    with torch.no_grad():
        zero = dp.transform(stock, dp.Loop(start=1, end=3, times=2, timestep="zero"))(**batch).logits
        assert torch.equal(zero, dp.transform(stock, dp.LayerProgram([0]))(**batch).logits)


def test_new_parameters_do_not_grow_with_the_iterations():
    stock = zoo.model("llama", 3)
    few, many = (dp.transform(stock, dp.Loop(1, 3, times=t, timestep=True)) for t in (2, 5))
    assert {n: p.shape for n, p in few.depth.named_parameters()} == {n: p.shape for n, p in many.depth.named_parameters()}
    report = dp.report(many, seq_len=8)
    assert f"{sum(p.numel() for p in many.depth.parameters()):,}" in str(report)
    assert math.isclose(few.depth.loop.clock.rise.weight.std().item(), 0.02, rel_tol=0.1)


def test_modulated_generation_and_checkpointing():
    bridge = dp.TurboConn(bridges=[(3, 2)], group=2, rank=4)
    _, model = transformed("llama", [dp.Loop(start=1, end=3, times=3, timestep=True), bridge])
    ids = zoo.batch([7, 5])
    cached = model.generate(**ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(cached, model.generate(**ids, max_new_tokens=6, do_sample=False, use_cache=False))
    seen = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable()
        model.train().zero_grad()
        model(**ids).logits.square().sum().backward()
        seen.append([p.grad.clone() for p in model.parameters()])
    for plain, again in zip(*seen, strict=True):
        torch.testing.assert_close(plain, again)


def test_two_sets_of_scales_are_refused():
    stock = zoo.model("llama", 3)
    with pytest.raises(dp.SpecError, match=r"loop\.scales"):
        dp.Loop(times=2, timestep=True, scales=True)
    with pytest.raises(dp.PassError, match="already modulated"):
        dp.transform(stock, [dp.LayerProgram([0, 1, 2], scales=True), dp.Loop(0, 2, times=2, timestep=True)])
    with pytest.raises(dp.PassError, match="scope"):
        dp.transform(stock, [dp.Repeat(1, 2, scales=True), dp.Repeat(0, 1, scales=True)])


def test_a_block_of_another_shape_is_refused_by_name():
    model = zoo.model("opt", 2, do_layer_norm_before=False)
    for spec, what in ((dp.LayerProgram([0, 1], scales=True), "modulated"), (dp.SameLayerState(), "cut between")):
        with pytest.raises(dp.LoweringError, match=rf"block 0 cannot be {what}.*a norm after the sum"):
            dp.transform(model, spec)
