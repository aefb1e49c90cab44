"""Functions with a backward of their own: a trace has their forward alone, whose derivative may be another one."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import function

from depthpass.errors import UnsupportedModelError

_EXACT = {("peft", "UniqueBaseGrad"), ("peft", "HadaWeight"), ("peft", "HadaWeightCP")}
"""Functions whose backward is the derivative of their forward, written out to save memory: package and name."""
_IN_TRAINING = {("transformers", "PhimoeMultiplier")}
"""Functions of which that is so in eval mode."""


@contextmanager
def own_backwards(model: torch.nn.Module) -> Iterator[list[str]]:
    """Collect the names of the ``torch.autograd.Function`` classes that run here, other than torch's own and exact ones."""
    found: list[str] = []
    held = function._is_setup_context_defined

    def asked(setup_context: Any) -> bool:
        # The first thing that ``apply`` does; ``apply`` itself may be held by name (``sign = Sign.apply``) since long ago.
        cls = sys._getframe(1).f_locals.get("cls", torch.autograd.Function)
        package, name = cls.__module__.partition(".")[0], cls.__qualname__
        exact = package == "torch" or (package, name) in _EXACT or ((package, name) in _IN_TRAINING and not model.training)
        if not exact and name not in found:
            found.append(name)
        return held(setup_context)

    setattr(function, "_is_setup_context_defined", asked)  # noqa: B010  pyright knows it as a function
    try:
        yield found
    finally:
        setattr(function, "_is_setup_context_defined", held)  # noqa: B010


def refuse_backward(functions: Sequence[str], streams: Iterable[Tensor]) -> None:
    """Let a backward pass through these streams stop: it would not be the one that the model's own code asks for.

    Args:
        functions: what :func:`own_backwards` found; nothing is refused where that is empty.

    Raises:
        UnsupportedModelError: in the backward pass.
    """
    if not functions:
        return

    def refuse(_):
        raise UnsupportedModelError(
            f"{', '.join(functions)} is a torch.autograd.Function with a backward of its own (as straight-through estimators "
            "have), which a captured graph does not know: gradients would be those of its forward. Only calls without a "
            "backward pass are right. Write it with detach() instead, as w + (q(w) - w).detach()."
        )

    for stream in streams:
        if stream.requires_grad:
            stream.register_hook(refuse)
