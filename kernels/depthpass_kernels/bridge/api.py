"""`bridge_in` and `bridge_out`, as callers see them: argument checks and folding, then the registered op."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from depthpass_kernels import ops
from depthpass_kernels.select import check_name

ALIGNMENT = 8

Operands = tuple[Tensor, Tensor, Tensor | None, float, Tensor | None]


def bridge_in(
    x: Tensor,
    c: Tensor | Sequence[Tensor],
    up_weight: Tensor | Sequence[Tensor],
    up_bias: Tensor | Sequence[Tensor | None] | None = None,
    *,
    gain: float | Tensor | Sequence[float | Tensor] = 1.0,
    present: Tensor | Sequence[Tensor | None] | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    norm_offset: float = 0.0,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Add delayed low-rank streams to the hidden stream, and apply the RMS norm that follows.

        y = x + Σ_b present_b · (gain_b · c_b W_bᵀ + bias_b)
        z = y · rsqrt(mean(y²) + eps) · (norm_offset + norm_weight)

    An absent token gets nothing: neither the projected value nor the bias, whatever `c` holds there (NaN
    included). Differentiable in x, c, up_weight, up_bias, norm_weight, and in a tensor gain. The norm reads y
    as rounded to x's dtype, as the separate norm would.

    Several bridges that land on one destination are given as sequences and become **one** product: streams
    concatenated along the rank, masked and scaled on the way, and each bias as the weight of one more column
    that holds the presence flag. Weights are concatenated on every call; in a loop call `fold_weights` once
    and `fold_streams` per step instead.

    Args:
        x: [..., dim].
        c: [..., r], or a sequence of them (ranks may differ).
        up_weight: [dim, r], or a sequence.
        up_bias: [dim], or a sequence whose entries may be None.
        gain: a number or a one-element tensor; or a sequence, one for each bridge.
        present: [...] bool; or a sequence, one for each bridge, entries may be None (always present).
        norm_weight: [dim]; None for no norm (a model with another kind of norm applies its own to y).
        eps: of the norm.
        norm_offset: 1 for norms that scale by `1 + weight` (Gemma).
        implementation: `"auto"`, `"naive"` or `"triton"` (see `depthpass_kernels.select`).

    Returns:
        `(y, z)`, each shaped and typed as x; z is None without a norm.

    Example:
        >>> import torch
        >>> x, c = torch.randn(2, 4, 8), torch.randn(2, 4, 3)
        >>> y, z = bridge_in(x, c, torch.randn(8, 3), torch.randn(8), norm_weight=torch.ones(8))
        >>> y.shape, z.shape
        (torch.Size([2, 4, 8]), torch.Size([2, 4, 8]))
    """
    check_name("bridge_in", implementation)
    if isinstance(c, Tensor):
        stream, weight, bias, factor, mask = _one(c, up_weight, up_bias, gain, present)
    else:
        stream, weight, bias, factor, mask = _folded(c, up_weight, up_bias, gain, present)
    _check(x, stream, weight, bias, mask, norm_weight)
    y, z, _ = ops.bridge_in(
        x, stream, weight, bias, mask, norm_weight, factor, float(eps), float(norm_offset), implementation
    )
    return y, None if norm_weight is None else z


def bridge_out(y: Tensor, down_weight: Tensor, down_bias: Tensor | None = None) -> Tensor:
    """Return the low-rank stream c = y W_downᵀ + bias, [..., r], from the hidden stream [..., dim].

    A plain linear layer, on purpose: one skinny product that reads y and the weight once, and nothing
    elementwise before or after it to fuse (y is already in memory for the next block, gain and presence
    belong to the reader). Several bridges that leave one block should stack their weights along r: still one
    call.
    """
    return linear(y, down_weight, down_bias)


def fold_weights(weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
    """Concatenate up-weights [dim, r_b] along the rank, each bias that is not None as one more column.

    Zero columns pad the rank to a multiple of 8, so that rows stay aligned to 16 bytes in half precision.
    """
    columns = [*weights, *(bias[:, None] for bias in biases if bias is not None)]
    return _padded(torch.cat(columns, -1))


def fold_streams(
    streams: Sequence[Tensor],
    gains: Sequence[float | Tensor],
    presents: Sequence[Tensor | None],
    has_bias: Sequence[bool],
) -> Tensor:
    """Concatenate streams along the rank, masked and scaled, with a column of presence for each bias.

    The counterpart of `fold_weights`: `bridge_in(x, fold_streams(...), fold_weights(...))` adds all bridges.
    """
    parts = [_absent_to_zero(c, p) * g for c, g, p in zip(streams, gains, presents, strict=True)]
    for c, p, biased in zip(streams, presents, has_bias, strict=True):
        if biased:
            parts.append(c.new_ones(*c.shape[:-1], 1) if p is None else p[..., None].to(c.dtype))
    return _padded(torch.cat(parts, -1))


def _padded(x: Tensor) -> Tensor:
    return pad(x, (0, -x.shape[-1] % ALIGNMENT))


def _absent_to_zero(c: Tensor, present: Tensor | None) -> Tensor:
    return c if present is None else torch.where(present[..., None], c, 0)


def _one(c: Tensor, weight: Any, bias: Any, gain: Any, present: Any) -> Operands:
    """Return the operands of one bridge; a tensor gain moves into the stream, where autograd sees it."""
    named = {"up_weight": weight, "up_bias": bias, "gain": gain, "present": present}
    for name, value in named.items():
        if isinstance(value, Sequence):
            raise ValueError(f"bridge_in: {name}: expected one value, as c is one tensor, got a sequence")
    if isinstance(gain, Tensor):
        c, gain = _absent_to_zero(c, present) * gain, 1.0
    return c, weight, bias, float(gain), present


def _folded(c: Sequence[Tensor], weight: Any, bias: Any, gain: Any, present: Any) -> Operands:
    """Return several bridges as the operands of one."""
    biases = _per_bridge("up_bias", bias, len(c))
    gains, presents = _per_bridge("gain", gain, len(c)), _per_bridge("present", present, len(c))
    folded = fold_weights(_per_bridge("up_weight", weight, len(c)), biases)
    return fold_streams(c, gains, presents, [bias is not None for bias in biases]), folded, None, 1.0, None


def _per_bridge(name: str, value: Any, count: int) -> list[Any]:
    """Return one entry per bridge; a gain, a mask or None may be shared, a weight or a bias cannot."""
    if isinstance(value, Sequence):
        if len(value) != count:
            raise ValueError(f"bridge_in: {name}: expected {count} entries, as many as c, got {len(value)}")
        return list(value)
    if name == "up_weight" or (name == "up_bias" and value is not None):
        raise ValueError(f"bridge_in: {name}: expected a sequence of {count}, as c is one, got one value")
    return [value] * count


def _check(
    x: Tensor,
    c: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    present: Tensor | None,
    norm_weight: Tensor | None,
) -> None:
    dim, rank = x.shape[-1], c.shape[-1]
    rows = tuple(x.shape[:-1])
    expected = {
        "c": (c, (*rows, rank)),
        "up_weight": (weight, (dim, rank)),
        "up_bias": (bias, (dim,)),
        "present": (present, rows),
        "norm_weight": (norm_weight, (dim,)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"bridge_in: {name}: expected shape {shape}, got {tuple(tensor.shape)}")
    if present is not None and present.dtype != torch.bool:
        raise ValueError(f"bridge_in: present: expected dtype torch.bool, got {present.dtype}")
    if not x.is_floating_point():
        raise ValueError(f"bridge_in: x: expected a floating dtype, got {x.dtype}")
