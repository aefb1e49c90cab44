"""Drafts of a program's own: a shallower program of the same model, and what of the model's program is left to do after it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from depthpass.analysis.routing import reads_future
from depthpass.errors import DepthpassError, InputError
from depthpass.hf.calls.pads import pad_op
from depthpass.hf.switching.loops import loop_of
from depthpass.ir.program import Op, Program, op
from depthpass.ir.verify import Type, infer, verify
from depthpass.plan import Plan
from depthpass.schedule.regions import Schedule, schedule

ENTRY = "draft.entry"
"""Tap of a draft: the stream that the rest of the model's program starts from."""


@dataclass(frozen=True)
class Part:
    """A program that runs.

    Attributes:
        cost: of one token, in visits.
    """

    program: Program
    schedule: Schedule
    types: dict[str, Type]
    cost: int

    @classmethod
    def of(cls, program: Program, chunk: int | None = None, stack: bool = True) -> Part:
        return cls(program, schedule(program, chunk, stack), infer(program), len(program.visits))


@dataclass(frozen=True)
class Draft:
    """A draft beside the program that checks it.

    Attributes:
        model: the whole program.
        draft: the shallower one; with ``rest`` it taps the stream that ``rest`` starts from.
        rest: what the whole program still computes behind the draft, on that stream in place of the embedding; None =
            the whole program runs again, for more than one stream of the draft's would be needed.
        slots, lines: slots and delay lines of the draft that hold what those of the whole program hold, by their numbers and
            names there.
    """

    model: Part
    draft: Part
    rest: Part | None
    slots: dict[int, int]
    lines: dict[str, str]


def draft_of(model: Any, spec: Any) -> Draft:
    """The draft that a spec asks for.

    Args:
        model: a transformed model.
        spec: ``"loop:N"`` for N iterations of the one loop in force, or a spec as for ``dp.using``.

    Raises:
        InputError: it is no draft of this model; the message says why.
    """
    current: Plan = model._depth.plans.current
    _check_program(current)
    if isinstance(spec, nn.Module):
        raise InputError(f"draft: expected 'loop:N' or a spec of this model's own blocks, got a {type(spec).__name__}. A model "
                         "of its own, with its own tokenizer and cache, is an assistant_model.")
    if isinstance(spec, Program):
        raise InputError("draft: expected 'loop:N' or a spec (passes, or their YAML), got a program. Pass what made it.")
    plan = _plan(model, current, spec)
    if plan.varies:
        raise InputError(f"draft: expected fixed loop counts, got {_label(plan)}, whose counts vary. Give a number.")
    _check_program(plan)
    deep, shallow = len(current.program.visits), len(plan.program.visits)
    # Tokens that leave a loop early take fewer visits than stand in the program.
    leaves = any(o.kind == "route" for o in plan.program) and plan.program.without_notes() != current.program.without_notes()
    if shallow > deep or (shallow == deep and not leaves):
        raise InputError(f"draft: expected a program shallower than the model's {deep} visits per token, got {_label(plan)} with "
                         f"{shallow}. A draft pays only where it is cheaper.")
    return split(current.program, plan.program, current.chunk, current.stack)


def _label(plan: Plan) -> str:
    return "; ".join(p.label for p in plan.passes)


def _fewer(loop: Any, count: int) -> Any:
    """A loop of so many iterations; from a single one no token can leave early.

    Raises:
        DepthpassError: it cannot run so many.
    """
    if count == 1 and getattr(loop, "exit", None) is not None:
        loop = replace(loop, exit=None, criterion="cdf", skip=True, kv="own" if loop.kv == "latest" else loop.kv)
    return loop.with_loops(count)


def _plan(model: Any, now: Plan, spec: Any) -> Plan:
    plans = model._depth.plans
    if isinstance(spec, str) and spec.startswith("loop:"):
        count = spec.removeprefix("loop:")
        if not count.isdigit() or int(count) < 1:
            raise InputError(f"draft: expected 'loop:N' with N of at least 1, got {spec!r}.")
        passes = list(now.passes)
        try:
            at = loop_of(passes, None, "generate", scoped=False)
            passes[at] = _fewer(passes[at], int(count))
            return plans.of(model, passes, None)
        except DepthpassError as error:
            raise InputError(f"draft={spec!r}: {error} A spec of its own can leave out what needs more iterations.") from error
    try:
        return plans.of(model, spec, None)
    except DepthpassError as error:
        raise InputError(f"draft: expected 'loop:N' or a spec that this model can run as it is. {error}") from error


def _check_program(plan: Plan) -> None:
    reasons = {
        "its loop counts vary": bool(plan.varies),
        "its KV policy makes a token's logits depend on how tokens are split into calls": plan.program.reads_calls,
        "it inserts pads after the prompt": pad_op(plan.program) is not None,
        f"{reads_future(plan.program)} chooses tokens with scores of later ones": bool(reads_future(plan.program)),
        "it starts from random states, which a draft and its check would draw apart":
            any(o.kind == "noise" for o in plan.program),
    }
    if reason := next((r for r, holds in reasons.items() if holds), None):
        raise InputError(f"draft: self-speculation is not possible with {_label(plan)}: {reason}. Leave draft out.")


def split(whole: Program, shallow: Program, chunk: int | None = None, stack: bool = True) -> Draft:
    """Find what two programs of one model have in common."""
    twins, slots, lines = common(whole, shallow)
    theirs = {mine: name for name, mine in twins.items()}
    left = [o for o in whole if o.name not in theirs and o.kind not in ("embed", "tap", "loss", "average", "retire")]
    entries = dict.fromkeys(a for o in left for a in o.args if a in theirs)
    model = Part.of(whole, chunk, stack)
    rest = None
    if len(entries) == 1 and not _reads_slots(left, set(slots.values())):
        (entry,) = entries
        kind = model.types[entry]
        if kind == Type(whole.width):
            rest = _rest(whole, left, entry, model.types)
            if entry != whole.entry:
                tap = Op("tap", "", (theirs[entry],), (("name", ENTRY),))
                shallow = replace(shallow, ops=(*shallow.ops[:-1], tap, shallow.ops[-1]))
    return Draft(model, Part.of(shallow), rest, slots, lines)


def common(whole: Program, shallow: Program) -> tuple[dict[str, str], dict[int, int], dict[str, str]]:
    """Values, slots and delay lines of ``shallow`` that are those of ``whole``, by their names there."""
    twins: dict[str, str] = {}
    slots: dict[int, int] = {}
    lines: dict[str, str] = {}
    known: dict[tuple, Op] = {}
    for o in whole:
        if o.name:
            known.setdefault(_key(o, o.args, lambda slot: slot), o)
    for o in shallow:
        if not o.name or any(a not in twins for a in o.args):  # what is defined later is not known to be the same
            continue
        twin = known.get(_key(o, tuple(twins[a] for a in o.args), slots.get))
        if twin is None or twin.name in twins.values():
            continue
        twins[o.name] = twin.name
        if o.kind == "block":
            slots[o["slot"]] = twin["slot"]
        if o.kind == "delay":
            lines[o.name] = twin.name
    return twins, slots, lines


def _key(o: Op, args: tuple[str, ...], place: Any) -> tuple:
    """What an op computes, whatever its value and its own slot are called."""
    attrs = tuple((k, place(v) if k == "keys" else v) for k, v in o.attrs if k != "slot")
    return o.kind, args, attrs


def _reads_slots(ops: list[Op], slots: set[int]) -> bool:
    return any(o.kind == "block" and o["keys"] in slots for o in ops)


def _rest(whole: Program, left: list[Op], entry: str, types: dict[str, Type]) -> Part | None:
    """The program behind a stream, which takes the place of the embedding."""
    program = replace(whole, ops=(op("embed", name=entry), *left))
    try:
        verify(program)
    except DepthpassError:
        return None
    return Part.of(program)
