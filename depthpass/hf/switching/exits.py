"""Exit gates of a live model: train them alone, and choose at decode how certain they have to be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from torch import nn

from depthpass.annotations import checked
from depthpass.errors import SpecError
from depthpass.hf.calls.host import depth_module
from depthpass.hf.switching.loops import loop_of
from depthpass.hf.switching.switch import _SAME, Model, _adopt, _plan, transformed
from depthpass.passes.base import Pass


@checked("set_exit", SpecError)
def set_exit(
    model: Model, exit: float, *, skip: bool | None = None, kv: str | None = None, scope: str | int | None = None
) -> Model:
    """Change the value at which tokens leave the loop of a live transformed model; returns the model.

    A model that was trained with ``skip=False, taps=True`` decodes with ``skip=True``: gates and weights are the same, tokens
    that left do no further work, and nothing is tapped. Inside ``dp.using`` pass the spec instead.

    Args:
        model: a transformed model, inside a PEFT wrapper or not.
        exit: of the loop's criterion; for ``cdf`` a cumulative probability (Ouro's q).
        skip: whether tokens that left skip visits; None = as before.
        kv: keys that the iterations read, see :class:`depthpass.Loop`; None = as before.
        scope: which loop, when the spec has several, as for :func:`depthpass.set_loops`.

    Raises:
        SpecError: the model is not transformed, its loop has no exit, or the values do not fit; nothing has been changed.
    """
    inner = transformed(model, "set_exit")
    passes = list((plans := inner._depth.plans).current.passes)
    at = _gated(passes, scope, "set_exit")
    held: Any = passes[at]
    skip, kv = held.skip if skip is None else skip, held.kv if kv is None else kv
    passes[at] = replace(held, exit=exit, skip=skip, taps=held.taps and not skip, kv=kv)
    _adopt(inner, plans, _plan(inner, plans, passes, _SAME))
    return model


def only_gates(model: nn.Module, *, scope: str | int | None = None) -> list[nn.Parameter]:
    """Freeze all parameters of a transformed model but those of its exit gate, and return these: Ouro's second stage.

    Args:
        scope: which loop, where there are several: the pass's ``scope`` or its place among them.

    Raises:
        SpecError: the model is not transformed, or its loop has no learned gate.
    """
    inner = transformed(model, "only_gates")
    passes = inner._depth.plans.current.passes
    held: Any = passes[_gated(passes, scope, "only_gates")]
    if held.criterion != "cdf":
        raise SpecError(f"only_gates: expected a loop with a learned gate (criterion='cdf'), got {held.label}.")
    gate = depth_module(inner).get_submodule(f"{held.scope}.exit")
    model.requires_grad_(False)
    return list(gate.requires_grad_(True).parameters())


def _gated(passes: Sequence[Pass], scope: str | int | None, who: str) -> int:
    """Place of the loop whose tokens may leave early."""
    able = [i for i, p in enumerate(passes) if getattr(p, "exit", None) is not None]
    at = able[0] if scope is None and len(able) == 1 else loop_of(passes, scope, who)
    if at not in able or "exit" not in {f.name for f in fields(passes[at])}:
        raise SpecError(f"{who}: expected a loop with an exit, got {passes[at].label}. Transform with dp.Loop(..., exit=q).")
    return at
