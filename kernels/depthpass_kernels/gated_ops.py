"""The registered ops of gated attention (see :mod:`depthpass_kernels.ops` for the rules): the kernel with its gradient.

The torch reference is not among them: it is plain differentiable torch, which a compiler sees into.
"""

from typing import Any

import torch
from torch import Tensor

from depthpass_kernels import select
from depthpass_kernels.gated_attention.problem import Gated

MAX_HEAD_DIM = 256


def implementation(problem: Gated, asked: str) -> str:
    """Return `"naive"` or `"triton"`, or raise KernelUnavailableError."""
    widest, limit = max(problem.q.shape[-1], problem.v.shape[-1]), None
    if widest > MAX_HEAD_DIM:
        limit = f"head dimension {widest} is above {MAX_HEAD_DIM}"
    size = problem.q.shape[0], problem.q.shape[2], problem.k.shape[2]
    return select.resolve("gated_attention", asked, problem.q, limit, size)


@torch.library.custom_op("depthpass_kernels::gated_attention", mutates_args=())
def gated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    near_k: Tensor,
    near_v: Tensor,
    score: Tensor,
    valid: Tensor | None,
    q_start: int,
    scale: float,
    window: int,
    far_window: int | None,
    asked: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return out, far, near [B, C, Hq, Dv] and the log-sum-exps of both parts [B, Hq, C]."""
    from depthpass_kernels.gated_attention import triton as kernels

    problem = Gated(q, k, v, near_k, near_v, score, valid, q_start, scale, window, far_window)
    return kernels.forward(problem)


@gated_attention.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    p = Gated(*arguments[:-1])
    return p.new_output(), p.new_output(), p.new_output(), p.new_lse(), p.new_lse()


@torch.library.custom_op("depthpass_kernels::gated_attention_backward", mutates_args=())
def gated_attention_backward(
    grad: Tensor,
    far: Tensor,
    near: Tensor,
    lse_far: Tensor,
    lse_near: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    near_k: Tensor,
    near_v: Tensor,
    score: Tensor,
    valid: Tensor | None,
    q_start: int,
    scale: float,
    window: int,
    far_window: int | None,
    asked: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return dq, dk, dv, dnear_k, dnear_v, dscore."""
    from depthpass_kernels.gated_attention import triton as kernels

    problem = Gated(q, k, v, near_k, near_v, score, valid, q_start, scale, window, far_window)
    return kernels.backward(problem, grad, far, near, lse_far, lse_near)


@gated_attention_backward.register_fake
def _(grad: Tensor, far: Tensor, near: Tensor, lse_far: Tensor, lse_near: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    p = Gated(*arguments[:-1])
    batch, heads, length, width = p.q.shape
    dq = p.q.new_empty(batch, length, heads, width).transpose(1, 2)
    return dq, *(x.new_empty(x.shape) for x in (p.k, p.v, p.near_k, p.near_v, p.score))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:], *inputs[:7])
    ctx.options = inputs[7:]


def _backward(ctx: Any, grad: Tensor | None, *others: Tensor | None) -> tuple[Any, ...]:
    if any(g is not None for g in others):
        raise NotImplementedError("gated_attention: only the mixture carries a gradient")
    if grad is None:
        return (None,) * (7 + len(ctx.options))
    gradients = gated_attention_backward(grad, *ctx.saved_tensors, *ctx.options)
    return (*gradients, None, *(None,) * len(ctx.options))


gated_attention.register_autograd(_backward, setup_context=_setup)
