"""Thresholds of routers set on data, so that decoding keeps the share of tokens that training had."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from depthpass.annotations import checked
from depthpass.errors import InputError, SpecError
from depthpass.hf.switching.switch import switch, transformed, using
from depthpass.ir.program import Op, Program
from depthpass.passes.base import Pass
from depthpass.passes.mixture_of_depths import MixtureOfDepths
from depthpass.passes.mixture_of_recursions import MixtureOfRecursions
from depthpass.plan import Plan
from depthpass.prompt import at_prompt

_LOWEST = -1e30
"""A threshold that every score reaches."""

Batch = Mapping[str, Tensor] | Tensor


@at_prompt
@dataclass(frozen=True)
class Calibration:
    """Thresholds that a calibration has found. ``print`` it.

    Attributes:
        spec: the passes, with mode ``threshold`` and these thresholds.
        labels: of the routes, in program order.
        thresholds: one for each.
        wanted: shares of all real tokens that were asked for.
        before: shares that the pass's usual threshold takes.
        found: shares that these thresholds take, on the same tokens.
        tokens: real tokens of the calibration.
    """

    spec: tuple[Pass, ...]
    labels: tuple[str, ...]
    thresholds: tuple[float, ...]
    wanted: tuple[float, ...]
    before: tuple[float, ...]
    found: tuple[float, ...]
    tokens: int

    def __str__(self) -> str:
        head = f"thresholds from {self.tokens} tokens\n{'route':<16}{'threshold':>12}{'wanted':>9}{'before':>9}{'now':>9}"
        rows = zip(self.labels, self.thresholds, self.wanted, self.before, self.found, strict=True)
        return "\n".join([head, *(f"{n:<16}{t:>12.6g}{w:>9.3f}{b:>9.3f}{f:>9.3f}" for n, t, w, b, f in rows)])


@checked("calibrate")
@torch.no_grad()
def calibrate(
    model: nn.Module, batches: Iterable[Batch] | Batch, *, shares: Mapping[str, float] | Sequence[float] | None = None,
) -> Calibration:
    """Set the thresholds of a routed model so that each route takes its share of the tokens; switches the model to them.

    Top-k routing looks at later tokens and cannot decode; with mode ``threshold`` the share that a router takes is whatever
    its scores happen to be. Here routes are gone through in program order: with the thresholds found so far, the scores of the
    tokens that a route chooses from are collected over all batches, and its threshold is put where its share is met. Every
    route costs one pass over the data. For Mixture-of-Recursions (expert choice) and Mixture-of-Depths.

    Args:
        model: a transformed model, in mode ``topk`` as it was trained or in mode ``threshold``; inside a PEFT wrapper or not.
        batches: calls of the model: mappings with ``input_ids`` and, where there is padding, ``attention_mask``; or tensors of
            ids. Several hundred tokens for each share that matters.
        shares: of all real tokens, by label of the route or in program order; None = the capacities of mode ``topk``.

    Raises:
        SpecError: the model is not transformed, or its spec does not have one such pass.
        InputError: no batch, batches without ids, or shares that do not fit; nothing has been changed.
    """
    inner = transformed(model, "calibrate")
    passes = list(inner._depth.plans.current.passes)
    at = _routed(passes)
    inputs = _batches(batches)
    open_: Any = replace(passes[at], **_threshold_mode(passes[at]), taps=True)
    plans = inner._depth.plans

    def planned(thresholds: tuple[float, ...] | None) -> Plan:
        one = open_ if thresholds is None else replace(open_, threshold=thresholds)
        return plans.of(inner, [*passes[:at], one, *passes[at + 1 :]], plans.current.chunk)

    routes = _routes(planned(None), open_.scope)
    wanted = _wanted(inner, passes, at, routes, shares)
    modes = {m: m.training for m in inner.modules()}
    inner.eval()
    try:
        usual = tuple(o["threshold"] for o in routes)
        before, tokens = _shares(model, planned(None), open_.scope, inputs)
        thresholds = list(usual)
        for i in range(len(routes)):
            plan = planned(tuple(thresholds))
            # Everyone is everyone, whatever the scores of other tokens will be.
            all_in = 0.0 if isinstance(open_, MixtureOfRecursions) else _LOWEST
            thresholds[i] = all_in if wanted[i] == 1 else _cut(
                _scores(model, plan, i, open_.scope, inputs), round(wanted[i] * tokens))
        now, _ = _shares(model, planned(tuple(thresholds)), open_.scope, inputs)
    finally:
        for part, training in modes.items():
            part.training = training
    passes[at] = replace(passes[at], **{**_threshold_mode(passes[at]), "threshold": tuple(thresholds)})
    switch(model, passes)
    return Calibration(tuple(passes), tuple(o["label"] for o in routes), tuple(thresholds), wanted, before, now, tokens)


def _routed(passes: Sequence[Pass]) -> int:
    """Place of the one pass whose routers can be calibrated."""
    able = [
        i for i, p in enumerate(passes)
        if isinstance(p, MixtureOfDepths) or (isinstance(p, MixtureOfRecursions) and p.router == "expert")
    ]
    if len(able) != 1:
        raise SpecError("calibrate: expected a spec with one MixtureOfDepths or one MixtureOfRecursions with expert choice, got "
                        f"{', '.join(p.label for p in passes)}. (A token that chooses its depth has no threshold.)")
    return able[0]


def _threshold_mode(held: Pass) -> dict[str, Any]:
    """What changes when a pass routes by threshold: nothing that has parameters."""
    if isinstance(held, MixtureOfDepths):
        return {"mode": "threshold", "capacity": 0.125, "threshold": 0.0}
    return {"mode": "threshold", "capacity": None, "threshold": 0.5}


def _wanted(
    inner: Any, passes: Sequence[Pass], at: int, routes: Sequence[Op], shares: Mapping[str, float] | Sequence[float] | None
) -> tuple[float, ...]:
    """The share that each route is to take."""
    labels = [o["label"] for o in routes]
    if shares is None or isinstance(shares, Mapping):
        held: Any = passes[at]
        trained = held if held.mode == "topk" else replace(held, mode="topk", **(
            {"threshold": 0.0} if isinstance(held, MixtureOfDepths) else {"threshold": 0.5}))
        plans = inner._depth.plans
        program: Program = plans.of(inner, [*passes[:at], trained, *passes[at + 1 :]], None).program
        capacities = {o["label"]: o["capacity"] for o in program if o.kind == "route" and o["rule"] == "topk"}
        if unknown := [n for n in shares or () if n not in labels]:
            raise InputError(f"shares: no route has the label {unknown[0]!r}; expected some of "
                             f"{', '.join(dict.fromkeys(labels))}.")
        # A recursion that top-k does not route takes everyone.
        told: dict[str, Any] = {**capacities, **(shares or {})}
        wanted = [float(told.get(n, 1.0)) for n in labels]
    else:
        wanted = [float(s) for s in shares]
        if len(wanted) != len(labels):
            raise InputError(f"shares: expected {len(labels)} shares, one for each route ({', '.join(labels)}), got "
                             f"{len(wanted)}.")
    if any(not 0 <= s <= 1 for s in wanted):
        raise InputError(f"shares: expected shares in [0, 1], got {wanted}.")
    return tuple(wanted)


def _batches(batches: Iterable[Batch] | Batch) -> list[dict[str, Tensor]]:
    listed: list[Any] = [batches] if isinstance(batches, Mapping | Tensor) else list(batches)
    calls = []
    for i, batch in enumerate(listed):
        call = {"input_ids": batch} if isinstance(batch, Tensor) else {
            n: batch[n] for n in ("input_ids", "attention_mask") if n in batch and batch[n] is not None}
        if not isinstance(call.get("input_ids"), Tensor):
            raise InputError(f"batches[{i}]: expected input_ids or a mapping with them, got {type(batch).__name__}.")
        calls.append(call)
    if not calls:
        raise InputError("batches: expected at least one batch, got none.")
    return calls


def _run(model: nn.Module, plan: Plan, calls: Iterable[dict[str, Tensor]]):
    """Taps of every call by the values that they hand out, and which tokens are real."""
    names = {o.args[0]: o["name"] for o in plan.program.taps}
    for call in calls:
        with using(model, list(plan.passes), chunk=plan.chunk):
            taps = model(**call, use_cache=False).taps
        mask = call.get("attention_mask")
        valid = torch.ones(call["input_ids"].shape, dtype=torch.bool) if mask is None else mask.bool()
        yield {value: taps[name] for value, name in names.items() if name in taps}, valid


def _routes(plan: Plan, scope: str) -> list[Op]:
    return [o for o in plan.program if o.kind == "route" and o["rule"] == "threshold" and o["label"].partition(".")[0] == scope]


def _scores(model: nn.Module, plan: Plan, place: int, scope: str, calls: Iterable[dict[str, Tensor]]) -> Tensor:
    """What a route compares with its threshold, of the tokens that it chooses from, ``[tokens]``."""
    route = _routes(plan, scope)[place]
    scored = plan.program.defs[_untrimmed(plan.program, route.args[0])]
    scores = []
    for taps, valid in _run(model, plan, calls):
        tapped = {_untrimmed(plan.program, value): x for value, x in taps.items()}
        score = torch.sigmoid(tapped[scored.args[0]]) if scored.kind == "act" else tapped[scored.name]
        among = valid.to(score.device)
        if len(route.args) == 2:
            among = among & tapped[route.args[1]]
        scores.append(score[..., 0][among])
    return torch.cat(scores)


def _untrimmed(program: Program, value: str) -> str:
    """Taps of a program with pads are those of its trimmed values."""
    o = program.defs[value]
    return o.args[0] if o.kind == "trim" else value


def _cut(scores: Tensor, count: int) -> float:
    """A threshold that so many of the scores reach (and those equal to the last one): halfway between the last one in and the
    first one out, in the scores' own precision, in which they are compared."""
    if count >= len(scores):
        return float(scores.min()) if len(scores) else 0.0
    ordered = scores.sort(descending=True).values
    if count == 0:
        return float(torch.nextafter(ordered[0], torch.full_like(ordered[0], torch.inf)))
    middle = (ordered[count - 1] + ordered[count]) / 2
    return float(ordered[count - 1] if middle <= ordered[count] else middle)


def _shares(model: nn.Module, plan: Plan, scope: str, calls: Iterable[dict[str, Tensor]]) -> tuple[tuple[float, ...], int]:
    """The share of all real tokens that each route takes, and how many real tokens there are."""
    names = [o.name for o in _routes(plan, scope)]
    taken, tokens = [0] * len(names), 0
    for taps, valid in _run(model, plan, calls):
        tokens += int(valid.sum())
        for i, name in enumerate(names):
            taken[i] += int((taps[name] & valid.to(taps[name].device)).sum())
    return tuple(n / tokens for n in taken), tokens
