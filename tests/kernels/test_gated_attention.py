"""Gated attention, reference implementation: against a loop over queries and keys in float64."""

from typing import Any

import pytest
import torch
from depthpass_kernels import KernelUnavailableError, gated_attention
from kernel_cases import GATED, Gated, gradients, leaves, rms_error
from torch import Tensor

F64 = torch.float64


def oracle(
    q: Tensor, k: Tensor, v: Tensor, near_k: Tensor, near_v: Tensor, score: Tensor, q_start: int, window: int,
    far_window: int | None, valid: Tensor | None = None,
) -> Tensor:
    """One query at a time, from the definition; shares no code and no trick with the package."""
    batch, heads, length, width = q.shape
    first, rows = q_start + length - near_k.shape[2], []
    for b in range(batch):
        for c in range(length):
            i = q_start + c
            real = [j for j in range(i + 1) if valid is None or bool(valid[b, j])]
            for h in range(heads):
                kv, parts = h // (heads // k.shape[1]), []
                for keys, values, origin, reach in ((k, v, 0, far_window), (near_k, near_v, first, window)):
                    seen = [j - origin for j in real if j >= origin and (reach is None or j > i - reach)]
                    if seen:
                        weights = torch.softmax(keys[b, kv, seen] @ q[b, h, c] * width**-0.5, 0)
                        parts.append(weights @ values[b, kv, seen])
                    else:
                        parts.append(0 * values[b, kv, 0] + 0 * q[b, h, c].sum())
                g = torch.sigmoid(score[b, c, h])
                rows.append(g * parts[0] + (1 - g) * parts[1])
    return torch.stack(rows).unflatten(0, (batch, length, heads))


@pytest.mark.parametrize("case", GATED.values(), ids=GATED)
def test_equals_loop(case: Gated) -> None:
    operands, options, grad = case.build(F64)
    exact, given = leaves(operands), leaves(operands)
    want, got = oracle(**exact, **options), gated_attention(**given, **options)
    assert got.shape == want.shape and rms_error(got, want) < 1e-12
    want_grads, got_grads = gradients(want, exact, grad), gradients(got, given, grad)
    for name, expected in want_grads.items():
        assert rms_error(got_grads[name], expected) < 1e-12, name


def test_a_saturated_gate_is_exactly_one_side() -> None:
    """The identity setting of parallel loops needs the shared side bit for bit."""
    operands, options, _ = GATED["whole_row"].build(torch.float32)
    score = operands.pop("score")
    far = gated_attention(**operands, score=torch.full_like(score, 50.0), **options)
    scaled = torch.nn.functional.scaled_dot_product_attention(
        operands["q"], *(x[:, :, :40].repeat_interleave(2, 1) for x in (operands["k"], operands["v"])), is_causal=True
    )
    assert torch.equal(far, scaled.transpose(1, 2))
    near = gated_attention(**operands, score=torch.full_like(score, -200.0), **options)
    assert not torch.equal(near, far)
    assert torch.equal(near, gated_attention(**operands | {"v": operands["v"] * 0}, score=score - 300, **options))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 0}, "window: expected at least 1 key, got 0"),
        ({"far_window": 0}, "far_window: expected at least 1 key"),
        ({"q_start": 200}, "k: expected at least q_start . C = 209 keys, got 45"),
        ({"q_start": -1}, "q_start: expected a column"),
        ({"score": torch.zeros(2, 4, 9)}, r"score: expected shape \(2, 9, 4\), got \(2, 4, 9\)"),
        ({"near_k": torch.zeros(2, 2, 3, 20, dtype=F64)}, "near_k: expected C to q_start"),
        ({"near_v": torch.zeros(2, 2, 14, 12)}, "near_v: expected q's dtype"),
        ({"valid": torch.zeros(2, 9)}, "valid: expected torch.bool of shape"),
        ({"implementation": "cuda"}, "implementation: expected one of"),
    ],
)
def test_bad_arguments_say_what_was_expected(change: dict[str, Any], message: str) -> None:
    operands, options, _ = GATED["left_padding"].build(F64)
    with pytest.raises(ValueError, match=message):
        gated_attention(**{**operands, **options, **change})


def test_the_kernel_is_never_replaced_silently() -> None:
    operands, options, _ = GATED["plain"].build(F64)
    with pytest.raises(KernelUnavailableError):
        gated_attention(**operands, **options, implementation="triton")
