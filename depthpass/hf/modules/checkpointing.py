"""Activation checkpointing of a transformed model: never the reentrant kind, which loses gradients of the recurrence."""

from __future__ import annotations

import functools
from collections.abc import Callable

from depthpass.errors import InputError


def not_reentrant(function: Callable) -> Callable:
    """A checkpoint function that keeps the gradients of the recurrence.

    Raises:
        InputError: ``use_reentrant=True`` was asked for.
    """
    chosen = getattr(function, "keywords", {}).get("use_reentrant")
    if chosen:
        raise InputError(
            "gradient_checkpointing_kwargs: use_reentrant=True would lose the gradient through keys, values and delays, "
            "which leave a block besides its output. Use {'use_reentrant': False}."
        )
    return functools.partial(function, use_reentrant=False) if chosen is None else function
