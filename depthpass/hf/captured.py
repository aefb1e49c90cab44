"""The captures that a model remembers, and what is kept for each of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from depthpass.capture import Capture

if TYPE_CHECKING:
    from depthpass.hf.runtime import Runtime

KEPT = 32
"""Captures that a model remembers: call signatures times states of the model, the newest ones."""


def remember(runtime: Runtime, key: tuple, capture: Capture) -> None:
    """Keep a capture, and forget the oldest one with everything that was made for it when there are too many."""
    runtime.captures[key] = capture
    while len(runtime.captures) > KEPT:
        forget(runtime, runtime.captures.pop(next(iter(runtime.captures))))


def forget(runtime: Runtime, old: Capture) -> None:
    """Drop what is kept by a capture's identity, which another capture may get after it."""
    if any(c is old for c in runtime.captures.values()):
        return
    for owner in (old.prologue, old.__dict__.get("tables"), old.norm, old.head, *old.blocks):
        runtime.bindings.pop(id(owner), None)
    for key in [k for k in runtime.tokens if k[0] == id(old)]:
        del runtime.tokens[key]
