"""The registered ops, namespace `depthpass_kernels`: schemas, fake kernels, gradients.

Registered when the package is imported, with no dependency but torch, so that a graph holding them traces and
exports on a machine without triton or a GPU. Callers use the functions of the `api` modules, which check
arguments; these ops take every argument by position and trust it. Which implementation runs is decided when
an op runs (`select.resolve`).
"""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from depthpass_kernels import select
from depthpass_kernels.bridge import naive as bridge_naive
from depthpass_kernels.bridge.problem import BridgeIn
from depthpass_kernels.slot_attention import naive as attention_naive
from depthpass_kernels.slot_attention.problem import Problem

MAX_HEAD_DIM = 256
MAX_HIDDEN = 16384
BOTH = "forward and backward"


def _attention_implementation(problem: Problem, implementation: str, what: str = "forward") -> str:
    widest, limit = max(problem.q.shape[-1], problem.v.shape[-1]), None
    if widest > MAX_HEAD_DIM:
        limit = f"head dimension {widest} is above {MAX_HEAD_DIM}"
    size = problem.q.shape[0], problem.q.shape[2], problem.k.shape[2]
    return select.resolve("slot_attention", implementation, problem.q, limit, size, what)


def _own_precision(problem: Problem) -> contextlib.AbstractContextManager:
    """Without autocast, which would take the reference's products out of the accumulation dtype."""
    device = problem.q.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()


@torch.library.custom_op("depthpass_kernels::slot_attention", mutates_args=())
def slot_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor | None,
    row_start: Tensor | None,
    sinks: Tensor | None,
    q_offset: Tensor | None,
    q_start: int,
    scale: float,
    window: int | None,
    chunk: int | None,
    softcap: float | None,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    """Return out [B, Hq, C, Dv] and lse [B, Hq, C]."""
    problem = Problem(q, k, v, valid, row_start, sinks, q_offset, q_start, scale, window, chunk, softcap)
    return attention_forward(problem, implementation)


def attention_forward(problem: Problem, implementation: str) -> tuple[Tensor, Tensor]:
    """What the op runs."""
    chosen = _attention_implementation(problem, implementation)
    if problem.q.numel() == 0:
        return problem.new_output().zero_(), problem.new_lse()
    if chosen == "triton":
        from depthpass_kernels.slot_attention import triton as kernels

        return kernels.forward(problem)
    with _own_precision(problem):
        compute = attention_naive.chunk_forward if attention_naive.is_plain(problem) else attention_naive.forward
        out, lse = compute(problem)
    return problem.new_output().copy_(out), lse


@slot_attention.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    problem = Problem(*arguments[:-1])
    _attention_implementation(problem, arguments[-1])
    return problem.new_output(), problem.new_lse()


@torch.library.custom_op("depthpass_kernels::slot_attention_backward", mutates_args=())
def slot_attention_backward(
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor | None,
    row_start: Tensor | None,
    sinks: Tensor | None,
    q_offset: Tensor | None,
    q_start: int,
    scale: float,
    window: int | None,
    chunk: int | None,
    softcap: float | None,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dq, dk, dv, dsinks; dsinks is empty without sinks."""
    problem = Problem(q, k, v, valid, row_start, sinks, q_offset, q_start, scale, window, chunk, softcap)
    chosen = _attention_implementation(problem, implementation, BOTH)
    if problem.q.numel() == 0:
        dk, dv = problem.new_dkv()
        return problem.new_dq(), dk.zero_(), dv.zero_(), _sink_gradient(problem, None)
    if chosen == "triton":
        from depthpass_kernels.slot_attention import triton as kernels

        dq, dk, dv, dsinks = kernels.backward(problem, grad, out, lse)
        return dq, dk, dv, _sink_gradient(problem, dsinks)
    with _own_precision(problem):
        dq, dk_part, dv_part, dsinks, (low, high) = attention_naive.backward(problem, grad, out, lse)
    dk, dv = (x.zero_() for x in problem.new_dkv())
    dk[:, :, low:high], dv[:, :, low:high] = dk_part, dv_part
    return problem.new_dq().copy_(dq), dk, dv, _sink_gradient(problem, dsinks)


@slot_attention_backward.register_fake
def _(grad: Tensor, out: Tensor, lse: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    problem = Problem(*arguments[:-1])
    return problem.new_dq(), *problem.new_dkv(), _sink_gradient(problem, None)


@torch.library.custom_op("depthpass_kernels::slot_attention_backward_accumulate", mutates_args=("dk", "dv"))
def slot_attention_backward_accumulate(
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    dk: Tensor,
    dv: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor | None,
    row_start: Tensor | None,
    sinks: Tensor | None,
    q_offset: Tensor | None,
    q_start: int,
    scale: float,
    window: int | None,
    chunk: int | None,
    softcap: float | None,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    """Add this call's key gradients to dk and dv; return dq, dsinks."""
    problem = Problem(q, k, v, valid, row_start, sinks, q_offset, q_start, scale, window, chunk, softcap)
    return attention_backward_accumulate(problem, grad, out, lse, dk, dv, implementation)


def attention_backward_accumulate(
    problem: Problem, grad: Tensor, out: Tensor, lse: Tensor, dk: Tensor, dv: Tensor, implementation: str
) -> tuple[Tensor, Tensor]:
    """What the op runs."""
    chosen = _attention_implementation(problem, implementation, BOTH)
    if problem.q.numel() == 0:
        return problem.new_dq(), _sink_gradient(problem, None)
    if chosen == "triton":
        from depthpass_kernels.slot_attention import triton as kernels

        dq, _, _, dsinks = kernels.backward(problem, grad, out, lse, into=(dk, dv))
        return dq, _sink_gradient(problem, dsinks)
    with _own_precision(problem):
        if attention_naive.is_plain(problem):
            dq, dk_part, dv_part, (low, high) = attention_naive.chunk_backward(problem, grad, out, lse)
            dsinks = None
        else:
            dq, dk_part, dv_part, dsinks, (low, high) = attention_naive.backward(problem, grad, out, lse)
    dk[:, :, low:high] += dk_part
    dv[:, :, low:high] += dv_part
    return problem.new_dq().copy_(dq), _sink_gradient(problem, dsinks)


@slot_attention_backward_accumulate.register_fake
def _(
    grad: Tensor, out: Tensor, lse: Tensor, dk: Tensor, dv: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor]:
    problem = Problem(*arguments[:-1])
    return problem.new_dq(), _sink_gradient(problem, None)


def _sink_gradient(problem: Problem, dsinks: Tensor | None) -> Tensor:
    """Return dsinks in the sinks' dtype; an empty tensor without sinks, because an op cannot return None."""
    if problem.sinks is None:
        return problem.q.new_empty(0)
    return problem.sinks.new_zeros(problem.sinks.shape) if dsinks is None else dsinks.to(problem.sinks.dtype)


def _attention_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, *inputs[:7])
    ctx.options = inputs[7:]


def _attention_backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    if grad_lse is not None:
        raise NotImplementedError(
            "slot_attention: lse carries no gradient; differentiate through the output alone"
        )
    nothing = (None,) * len(ctx.options)
    if grad is None:
        return (None,) * 7 + nothing
    out, lse, *tensors = ctx.saved_tensors
    dq, dk, dv, dsinks = slot_attention_backward(grad, out, lse, *tensors, *ctx.options)
    return dq, dk, dv, None, None, None if tensors[5] is None else dsinks, None, *nothing


slot_attention.register_autograd(_attention_backward, setup_context=_attention_setup)


def _bridge_implementation(problem: BridgeIn, implementation: str) -> str:
    hidden, limit = problem.x.shape[-1], None
    if problem.norm_weight is not None and hidden > MAX_HIDDEN:
        limit = f"hidden size {hidden} is above {MAX_HIDDEN}"
    size = 1, problem.x.numel() // max(hidden, 1), problem.c.shape[-1]
    what = "forward" if problem.norm_weight is None else "forward and norm"
    return select.resolve("bridge_in", implementation, problem.x, limit, size, what)


@torch.library.custom_op("depthpass_kernels::bridge_in", mutates_args=())
def bridge_in(
    x: Tensor,
    c: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    present: Tensor | None,
    norm_weight: Tensor | None,
    gain: float,
    eps: float,
    norm_offset: float,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y [.., dim], z [.., dim] and rstd [..]; the last two are empty without a norm."""
    problem = BridgeIn(x, c, weight, bias, present, norm_weight, gain, eps, norm_offset)
    if _bridge_implementation(problem, implementation) == "triton" and x.numel() > 0:
        from depthpass_kernels.bridge import triton as kernels

        return kernels.forward(problem)
    return bridge_naive.forward(problem)


@bridge_in.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    problem = BridgeIn(*arguments[:-1])
    _bridge_implementation(problem, arguments[-1])
    return problem.new_outputs()


@torch.library.custom_op("depthpass_kernels::bridge_in_backward", mutates_args=())
def bridge_in_backward(
    grad_y: Tensor | None,
    grad_z: Tensor | None,
    y: Tensor,
    rstd: Tensor,
    x: Tensor,
    c: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    present: Tensor | None,
    norm_weight: Tensor | None,
    gain: float,
    eps: float,
    norm_offset: float,
    implementation: str,
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return dx, dc, dweight, dbias, dnorm_weight; those not `needed` are empty."""
    problem = BridgeIn(x, c, weight, bias, present, norm_weight, gain, eps, norm_offset)
    if _bridge_implementation(problem, implementation) == "triton" and x.numel() > 0:
        from depthpass_kernels.bridge import triton as kernels

        dy, dnorm = kernels.norm_backward(problem, grad_y, grad_z, y, rstd)
    else:
        dy, dnorm = bridge_naive.norm_backward(problem, grad_y, grad_z, y, rstd)
    return bridge_naive.projection_backward(problem, dy, dnorm, needed)


@bridge_in_backward.register_fake
def _(
    grad_y: Tensor | None, grad_z: Tensor | None, y: Tensor, rstd: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return BridgeIn(*arguments[:-2]).new_gradients(arguments[-1])


def _bridge_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    y, _, rstd = output
    ctx.save_for_backward(y, rstd, *inputs[:6])
    ctx.options = inputs[6:]


def _bridge_backward(
    ctx: Any, grad_y: Tensor | None, grad_z: Tensor | None, grad_rstd: Tensor | None
) -> tuple[Any, ...]:
    if grad_rstd is not None:
        raise NotImplementedError("bridge_in: rstd carries no gradient")
    nothing = (None,) * len(ctx.options)
    if grad_y is None and grad_z is None:
        return (None,) * 6 + nothing
    x, c, weight, bias, _, norm = (ctx.needs_input_grad[i] for i in range(6))
    needed = [x, c, weight, bias, norm]
    gradients = bridge_in_backward(grad_y, grad_z, *ctx.saved_tensors, *ctx.options, needed)
    dx, dc, dweight, dbias, dnorm = (
        g if wanted else None for g, wanted in zip(gradients, needed, strict=True)
    )
    return dx, dc, dweight, dbias, None, dnorm, *nothing


bridge_in.register_autograd(_bridge_backward, setup_context=_bridge_setup)
