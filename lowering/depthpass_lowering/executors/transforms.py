"""Function transforms (``torch.func``) around a call: they differentiate what they see, and hand-written schedules hide it."""

from __future__ import annotations

from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad

from depthpass.errors import LoweringError


def check_compilable(level: str) -> None:
    """Refuse compiled graphs inside a function transform, before anything runs.

    Raises:
        LoweringError: naming the transform and what to use.
    """
    if reason := differentiated():
        raise LoweringError(f"lowering {level!r} cannot run this call: {reason}. Use lowering='auto' or 'eager'.")


def unschedulable(hidden: Tensor) -> str | None:
    """Why nothing that hides its ops from autograd can run here, or None."""
    if reason := differentiated():
        return reason
    if hidden.is_meta:
        return "the model is on the meta device, where nothing is computed"
    return None


def differentiated() -> str | None:
    """The transform that is running around this call, or None."""
    if peek_interpreter_stack() is not None:
        return "a function transform of torch.func (grad, vjp, jvp, vmap, jacrev, ...) is running, which needs to see every op"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is on, which needs to see every op"
    return None
