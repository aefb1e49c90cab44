"""The bridge, reference implementation: against one token at a time in float64."""

import itertools
from typing import Any

import pytest
import torch
from depthpass_kernels import bridge_in, bridge_out, fold_streams, fold_weights
from kernel_cases import BRIDGE, Bridge, leaves, rms_error
from torch import Tensor

F64 = torch.float64


def oracle(
    x: Tensor,
    c: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    present: Tensor | None = None,
    gain: float = 1.0,
    eps: float = 1e-6,
    norm_offset: float = 0.0,
) -> tuple[Tensor, Tensor | None]:
    """One token at a time, from the definition."""
    y = []
    for at in itertools.product(*map(range, x.shape[:-1])):
        here = x[at]
        if present is None or present[at]:
            here = here + (up_weight * (gain * c[at])).sum(1)
            here = here if up_bias is None else here + up_bias
        y.append(here)
    stacked = torch.stack(y).view(x.shape)
    if norm_weight is None:
        return stacked, None
    size = stacked.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
    return stacked, stacked / (size**2 + eps).sqrt() * (norm_offset + norm_weight)


def grads(
    outputs: tuple[Tensor, Tensor | None], inputs: dict[str, Tensor], weights: list[Tensor]
) -> dict[str, Tensor]:
    """Gradients through both outputs together."""
    pairs = [(o, w) for o, w in zip(outputs, weights, strict=True) if o is not None]
    grads = torch.autograd.grad([o for o, _ in pairs], list(inputs.values()), [w for _, w in pairs])
    return dict(zip(inputs, grads, strict=True))


@pytest.mark.parametrize("dtype, tolerance", [(F64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("case", BRIDGE.values(), ids=BRIDGE)
def test_equals_loop(case: Bridge, dtype: torch.dtype, tolerance: float, nan_memory: None) -> None:
    operands, options, weights = case.build(dtype)
    exact, inputs = leaves({n: t.to(F64) for n, t in operands.items()}), leaves(operands)
    want, got = oracle(**exact, **options), bridge_in(**inputs, **options)
    for w, g in zip(want, got, strict=True):
        assert (w is None) == (g is None)
        assert w is None or (g.dtype == dtype and rms_error(g, w) < tolerance)
    want_grads, got_grads = grads(want, exact, [w.to(F64) for w in weights]), grads(got, inputs, weights)
    for name, w in want_grads.items():
        assert got_grads[name].dtype == dtype and rms_error(got_grads[name], w) < tolerance, name


@pytest.mark.parametrize("output", [0, 1])
def test_gradient_through_one_output(output: int) -> None:
    operands, options, weights = BRIDGE["plain"].build(F64)
    exact, inputs = leaves(operands), leaves(operands)
    used = [n for n in inputs if output == 1 or n != "norm_weight"]
    want = torch.autograd.grad(oracle(**exact, **options)[output], [exact[n] for n in used], weights[output])
    got = torch.autograd.grad(
        bridge_in(**inputs, **options)[output], [inputs[n] for n in used], weights[output]
    )
    assert all(rms_error(g, w) < 1e-12 for g, w in zip(got, want, strict=True))


def test_absent_adds_nothing_not_even_nan() -> None:
    operands, options, weights = BRIDGE["plain"].build(F64)
    absent = ~options["present"]
    assert absent.any() and not absent.all()
    clean = leaves(operands)
    dirty = leaves({n: t.clone() for n, t in operands.items()})
    with torch.no_grad():
        dirty["c"][absent] = float("nan")
    want, got = bridge_in(**clean, **options), bridge_in(**dirty, **options)
    assert torch.equal(got[0][absent], operands["x"][absent])
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    want_grads, got_grads = grads(want, clean, weights), grads(got, dirty, weights)
    assert all(torch.equal(got_grads[n], want_grads[n]) for n in want_grads)
    assert not got_grads["c"][absent].any()


def several(dtype: torch.dtype = F64) -> tuple[dict[str, Any], Tensor, Tensor]:
    torch.manual_seed(1)
    ranks, shape, dim = (3, 5, 4), (2, 6), 10
    streams = [torch.randn(*shape, r, dtype=dtype) for r in ranks]
    masks = [torch.rand(shape) > 0.3, None, torch.rand(shape) > 0.6]
    for stream, mask in zip(streams, masks, strict=True):
        if mask is not None:
            stream[~mask] = float("nan")
    arguments = {
        "c": [s.requires_grad_() for s in streams],
        "up_weight": [torch.randn(dim, r, dtype=dtype, requires_grad=True) for r in ranks],
        "up_bias": [torch.randn(dim, dtype=dtype, requires_grad=True), None, torch.randn(dim, dtype=dtype)],
        "gain": [0.5, torch.tensor(0.2, dtype=dtype, requires_grad=True), 1.5],
        "present": masks,
    }
    return arguments, torch.randn(*shape, dim, dtype=dtype, requires_grad=True), torch.rand(dim, dtype=dtype)


def test_several_bridges_equal_one_after_another() -> None:
    arguments, x, norm = several()
    y, z = bridge_in(x, **arguments, norm_weight=norm)
    want = x
    for c, w, b, g, p in zip(*arguments.values(), strict=True):
        safe = c if p is None else torch.where(p[..., None], c, 0)
        want, _ = oracle(want, safe, w, b, present=p, gain=g)
    assert rms_error(y, want) < 1e-12
    assert (
        rms_error(z, oracle(want, want[..., :1], torch.zeros(10, 1, dtype=F64), norm_weight=norm)[1]) < 1e-12
    )
    inputs = [x, *arguments["c"], *arguments["up_weight"], arguments["up_bias"][0], arguments["gain"][1]]
    pull = torch.randn_like(y)
    for got, expected in zip(
        torch.autograd.grad(y, inputs, pull), torch.autograd.grad(want, inputs, pull), strict=True
    ):
        assert rms_error(got, expected) < 1e-12


def test_folding_once_equals_folding_each_time() -> None:
    arguments, x, norm = several()
    weight = fold_weights(arguments["up_weight"], arguments["up_bias"])
    stream = fold_streams(arguments["c"], arguments["gain"], arguments["present"], [True, False, True])
    assert weight.shape[1] == stream.shape[-1] == 16  # 3 + 5 + 4 ranks, 2 biases, padded to a multiple of 8
    want = bridge_in(x, **arguments, norm_weight=norm)
    got = bridge_in(x, stream, weight, norm_weight=norm)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_shared_presence_and_tensor_gain() -> None:
    operands, options, _ = BRIDGE["plain"].build(F64)
    x, c, w, b = (operands[n] for n in ("x", "c", "up_weight", "up_bias"))
    gain = torch.tensor(options["gain"], dtype=F64, requires_grad=True)
    one, _ = bridge_in(x, c, w, b, gain=options["gain"], present=options["present"])
    got, _ = bridge_in(x, c, w, b, gain=gain, present=options["present"])
    listed, _ = bridge_in(x, [c], [w], [b], gain=gain, present=options["present"])
    assert rms_error(got, one) < 1e-14 and rms_error(listed, one) < 1e-14
    got.sum().backward()
    by_hand = ((c @ w.T) * options["present"][..., None]).sum()
    assert rms_error(gain.grad, by_hand) < 1e-12


def test_bridge_out_is_linear() -> None:
    y, w, b = torch.randn(2, 3, 8, dtype=F64), torch.randn(5, 8, dtype=F64), torch.randn(5, dtype=F64)
    assert rms_error(bridge_out(y, w, b), torch.einsum("bcd,rd->bcr", y, w) + b) < 1e-14


def test_frozen_weights_get_no_gradient() -> None:
    operands, options, _ = BRIDGE["plain"].build(F64)
    operands["c"].requires_grad_()
    y, z = bridge_in(**operands, **options)
    (y.sum() + z.sum()).backward()
    assert operands["c"].grad is not None
    assert all(t.grad is None for n, t in operands.items() if n != "c")


BAD = {
    "c: expected shape": dict(c=torch.zeros(2, 4, 3)),
    "up_weight: expected shape": dict(up_weight=torch.zeros(9, 3)),
    "up_bias: expected shape": dict(up_bias=torch.zeros(7)),
    "present: expected shape": dict(present=torch.ones(2, 4, dtype=torch.bool)),
    "present: expected dtype": dict(present=torch.ones(2, 5)),
    "norm_weight: expected shape": dict(norm_weight=torch.ones(5)),
    "implementation: expected one of": dict(implementation="fast"),
    "gain: expected one value": dict(gain=[0.1]),
    "up_weight: expected a sequence of 1": dict(c=[torch.zeros(2, 5, 3)]),
    "present: expected 1 entries": dict(
        c=[torch.zeros(2, 5, 3)], up_weight=[torch.zeros(8, 3)], present=[None, None]
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message: str) -> None:
    arguments: dict[str, Any] = dict(
        x=torch.zeros(2, 5, 8), c=torch.zeros(2, 5, 3), up_weight=torch.zeros(8, 3)
    )
    with pytest.raises(ValueError, match=message):
        bridge_in(**arguments | BAD[message])
