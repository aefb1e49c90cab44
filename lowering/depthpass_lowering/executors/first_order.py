"""Backward passes that cannot be differentiated again say so."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from depthpass.errors import LoweringError


def first_order(backward: Callable) -> Callable:
    """A backward pass that has none of its own: it refuses to be recorded (``create_graph=True``) before it runs."""
    once = torch.autograd.function.once_differentiable(backward)

    @functools.wraps(backward)
    def refusing(ctx, *grads):
        if torch.is_grad_enabled():
            raise LoweringError(
                "create_graph=True: a serial region that is scheduled by hand or swept has no second derivatives, which "
                "Hessian-vector products and gradient penalties need. Use dp.transform(model, spec, lowering='eager') on a model "
                "loaded with attn_implementation='eager' (torch differentiates sdpa once only)."
            )
        return once(ctx, *grads)

    return refusing
