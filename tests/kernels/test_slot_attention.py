"""Slot attention, reference implementation: against a loop over queries and keys in float64."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from depthpass_kernels import (
    slot_attention,
    slot_attention_backward,
    slot_attention_forward,
    slot_attention_naive,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import ATTENTION, BASE, Attention, gradients, leaves, rms_error
from torch import Tensor

F64 = torch.float64
IMPLEMENTATIONS = {"op": slot_attention, "plain": slot_attention_naive}


def oracle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_start: int,
    valid: Tensor | None = None,
    row_start: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """One query at a time, from the definition; shares no code and no trick with the package."""
    batch, heads, length, width = q.shape
    out = []
    for b in range(batch):
        start = 0 if row_start is None else int(row_start[b])
        for h in range(heads):
            kv = h // (heads // k.shape[1])
            for c in range(length):
                i, seen = q_start + c, []
                for j in range(k.shape[2]):
                    ok = j <= i and (valid is None or bool(valid[b, j]))
                    ok = ok and (window is None or i - j < window)
                    if ok and (chunk is None or (j - start) // chunk == (i - start) // chunk):
                        seen.append(j)
                if not seen:
                    out.append(0 * v[b, kv, 0] + 0 * q[b, h, c].sum())
                    continue
                logits = (k[b, kv, seen] @ q[b, h, c]) * (width**-0.5 if scale is None else scale)
                if softcap is not None:
                    logits = softcap * torch.tanh(logits / softcap)
                if sinks is not None:
                    logits = torch.cat([logits, sinks[h : h + 1]])
                out.append(torch.softmax(logits, 0)[: len(seen)] @ v[b, kv, seen])
    return torch.stack(out).unflatten(0, (batch, heads, length))


def compare(
    case: Attention, function: Any, dtype: torch.dtype = F64, tolerance: float = 1e-12, **more: Any
) -> None:
    """Check values and every gradient of `function` against the oracle on the same (rounded) operands."""
    operands, options, grad = case.build(dtype)
    exact, given_ = leaves({n: x.to(F64) for n, x in operands.items()}), leaves(operands)
    want, got = oracle(**exact, **options, **more), function(**given_, **options, **more)
    assert got.shape == want.shape and got.dtype == dtype
    assert rms_error(got, want) < tolerance
    want_grads, got_grads = gradients(want, exact, grad.to(F64)), gradients(got, given_, grad)
    for name, expected in want_grads.items():
        assert got_grads[name].dtype == dtype
        assert rms_error(got_grads[name], expected) < tolerance, name


@pytest.mark.parametrize("function", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
@pytest.mark.parametrize("case", ATTENTION.values(), ids=ATTENTION)
def test_equals_loop(case: Attention, function: Any, nan_memory: None) -> None:
    compare(case, function)


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)]
)
def test_dtypes(dtype: torch.dtype, tolerance: float) -> None:
    compare(ATTENTION["everything"], slot_attention, dtype, tolerance)


def test_scale_is_used() -> None:
    compare(BASE, slot_attention, scale=0.37)


@st.composite
def problems(draw: st.DrawFn) -> Attention:
    group, key_heads, length = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 6))
    q_start = draw(st.integers(0, 12))
    keys = q_start + length + draw(st.integers(0, 4))
    small = st.none() | st.integers(1, 7)
    return Attention(
        heads=group * key_heads,
        key_heads=key_heads,
        length=length,
        keys=keys,
        width=draw(st.integers(1, 5)),
        value_width=draw(st.integers(1, 5)),
        q_start=q_start,
        starts=tuple(draw(st.lists(st.integers(0, keys), min_size=1, max_size=2))),
        validity=draw(st.booleans()),
        holes=tuple(draw(st.lists(st.integers(0, keys - 1), max_size=3))),
        window=draw(small),
        chunk=draw(small),
        softcap=draw(st.none() | st.floats(0.5, 3.0)),
        sinks=draw(st.booleans()),
    )


@settings(max_examples=60)
@given(problems())
def test_equals_loop_anywhere(case: Attention) -> None:
    compare(case, slot_attention)


def test_empty_rows_are_zero_and_finite() -> None:
    case = ATTENTION["empty_rows"]
    operands, options, grad = case.build(F64)
    empty = torch.arange(20, 25) < 23  # the second row starts at column 23
    for function in IMPLEMENTATIONS.values():
        inputs = leaves(operands)
        out = function(**inputs, **options)
        assert not out[1][:, empty].any() and out[1][:, ~empty].all()
        grads = gradients(out, inputs, grad)
        assert all(g.isfinite().all() for g in grads.values())
        assert not grads["dq"][1][:, empty].any()
    _, lse = slot_attention_forward(**operands, **options)
    assert (lse[1][:, empty] == float("-inf")).all() and lse[1][:, ~empty].isfinite().all()


@pytest.mark.parametrize("name", ["left_padding", "window", "everything", "empty_rows"])
def test_unseen_keys_may_hold_nan(name: str) -> None:
    operands, options, grad = ATTENTION[name].build(F64)
    clean = leaves(operands)
    unseen = ~options["valid"] | (torch.arange(BASE.keys) >= options["q_start"] + BASE.length)
    dirty = leaves({n: x.clone() for n, x in operands.items()})
    with torch.no_grad():
        for n in "kv":
            dirty[n].masked_fill_(unseen[:, None, :, None], float("nan"))
    want, got = slot_attention(**clean, **options), slot_attention(**dirty, **options)
    assert torch.equal(got, want)
    want_grads, got_grads = gradients(want, clean, grad), gradients(got, dirty, grad)
    assert all(torch.equal(got_grads[n], want_grads[n]) for n in want_grads)


def test_tensor_start_equals_int() -> None:
    operands, options, grad = ATTENTION["everything"].build(F64)
    a, b = leaves(operands), leaves(operands)
    want = slot_attention(**a, **options)
    got = slot_attention(**b, **options | {"q_start": torch.tensor([options["q_start"]])})
    assert rms_error(got, want) < 1e-14
    want_grads, got_grads = gradients(want, a, grad), gradients(got, b, grad)
    assert all(rms_error(got_grads[n], want_grads[n]) < 1e-13 for n in want_grads)


@pytest.mark.parametrize("size", [1, 4, 7])
def test_any_chunking_is_the_same(size: int) -> None:
    case = replace(ATTENTION["everything"], length=23, keys=23, q_start=0, starts=(0, 6), holes=())
    operands, options, _ = case.build(F64)
    whole = slot_attention(**operands, **options)
    q = operands.pop("q")
    parts = [
        slot_attention(q[:, :, at : at + size], **operands, **options | {"q_start": at})
        for at in range(0, 23, size)
    ]
    assert rms_error(torch.cat(parts, 2), whole) < 1e-14


@pytest.mark.parametrize("name", ["left_padding", "everything", "empty_rows_sinks"])
@pytest.mark.parametrize("buffers", [torch.float64, torch.float32])
def test_backward_adds_into_buffers(name: str, buffers: torch.dtype) -> None:
    operands, options, grad = ATTENTION[name].build(F64)
    out, lse = slot_attention_forward(**operands, **options)
    q, k, v = (operands[n] for n in "qkv")
    rest = {n: operands[n] for n in ("sinks",) if n in operands} | options
    dq, dk, dv, dsinks = slot_attention_backward(grad, q, k, v, out, lse, **rest)
    into = torch.randn_like(k, dtype=buffers), torch.randn_like(v, dtype=buffers)
    before = tuple(x.clone() for x in into)
    again = slot_attention_backward(grad, q, k, v, out, lse, into=into, **rest)
    tolerance = 1e-13 if buffers == F64 else 1e-6
    assert again[1] is into[0] and again[2] is into[1]
    assert torch.equal(again[0], dq) and (dsinks is None or torch.equal(again[3], dsinks))
    assert rms_error(into[0] - before[0], dk) < tolerance and rms_error(into[1] - before[1], dv) < tolerance


def test_layout_is_heads_last() -> None:
    operands, options, _ = BASE.build(F64)
    assert slot_attention(**operands, **options).transpose(1, 2).is_contiguous()


def test_sum_backward_has_expanded_gradient() -> None:
    operands, options, _ = BASE.build(F64)
    inputs = leaves(operands)
    slot_attention(**inputs, **options).sum().backward()
    want = gradients(oracle(**inputs, **options), inputs, torch.ones(2, 4, 5, 12, dtype=F64))
    assert all(rms_error(inputs[n].grad, want[f"d{n}"]) < 1e-12 for n in inputs)


BAD = {
    "q_start + C = 40 keys": dict(q_start=35, q=(2, 4, 5, 20), k=(2, 2, 38, 20), v=(2, 2, 38, 20)),
    "a multiple of k's 3 heads": dict(k=(2, 3, 44, 20), v=(2, 3, 44, 20)),
    "4 dimensions each": dict(q=(4, 5, 20)),
    "k: expected shape": dict(k=(2, 2, 44, 21)),
    "v: expected shape": dict(v=(2, 2, 43, 20)),
    "valid: expected shape": dict(valid=torch.ones(2, 3, dtype=torch.bool)),
    "valid: expected dtype": dict(valid=torch.ones(2, 44)),
    "row_start: expected shape": dict(row_start=torch.zeros(3, dtype=torch.long)),
    "row_start: expected an integer": dict(row_start=torch.zeros(2)),
    "sinks: expected shape": dict(sinks=torch.zeros(2)),
    "window: expected at least 1": dict(window=0),
    "chunk: expected at least 1": dict(chunk=-1),
    "softcap: expected a positive": dict(softcap=0.0),
    "q_start: expected a column": dict(q_start=-1),
    "q_start: expected one integer": dict(q_start=torch.tensor([1, 2])),
    "implementation: expected one of": dict(implementation="cuda"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message: str) -> None:
    shapes: dict[str, Any] = (
        dict(q=(2, 4, 5, 20), k=(2, 2, 44, 20), v=(2, 2, 44, 20), q_start=33) | BAD[message]
    )
    arguments = {n: torch.zeros(x) if n in ("q", "k", "v") else x for n, x in shapes.items()}
    with pytest.raises(ValueError, match=message.replace("+", r"\+")):
        slot_attention(**arguments)


def test_bad_dtypes_and_options() -> None:
    q, k = torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1, 4)
    with pytest.raises(ValueError, match="one floating dtype"):
        slot_attention(q, k.bfloat16(), k, q_start=0)
    with pytest.raises(TypeError, match="unknown option 'windows'"):
        slot_attention_forward(q, k, k, q_start=0, windows=3)
    with pytest.raises(TypeError, match="q_start is required"):
        slot_attention_naive(q, k, k)
    out, lse = slot_attention_forward(q, k, k, q_start=0)
    with pytest.raises(ValueError, match=r"into\[1\]: expected shape"):
        slot_attention_backward(out, q, k, k, out, lse, into=(k.clone(), k[..., :2]), q_start=0)
