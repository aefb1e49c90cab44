"""Judging a response: the answer by itself, and the trace line by line, with the kind of the first mistake."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from depthpass.prompt import at_prompt
from depthpass.tasks.tape import Step, Trace, show

Kind = Literal["form", "transition", "fetch", "step", "missing", "extra"]


@at_prompt
@dataclass(frozen=True)
class Check:
    """What is right in a response.

    Attributes:
        answer: whether the answer is right.
        trace: whether every line of the trace is; None when the response is an answer alone.
        line: index of the first wrong line.
        kind: what is wrong with it: not of the ``form`` of a line; a ``transition`` to another state than the program's
            next one; a ``fetch`` of other operands, or of values that do not stand in prompt or trace; a ``step``, i.e. a
            local function that was worked out wrongly; the trace ends too early (``missing``) or too late (``extra``).
        message: the same in words.
    """

    answer: bool
    trace: bool | None
    line: int | None = None
    kind: Kind | None = None
    message: str = ""

    def __bool__(self) -> bool:
        return self.answer and self.trace is not False


def check(response: str, trace: Trace, answer: str) -> Check:
    """Judge a response against the run of the task's program.

    The last line gives the answer, ``answer X`` (or X alone, when there is no trace); the lines before it are the trace. The
    first mistake is named by its kind: linear transition, memory fetch or atomic state, after arXiv 2507.13332.
    """
    *lines, last = [line.strip() for line in response.strip().splitlines()] or [""]
    stated = last.removeprefix("answer ").strip()
    right = stated == answer
    if not lines:
        return Check(right, None, message="" if right else f"expected the answer {answer}, got {stated or 'nothing'}")
    for i, step in enumerate(trace.steps):
        if i >= len(lines):
            return Check(right, False, i, "missing", f"the trace ends before the state {step.cell.name}")
        if fault := _fault(lines[i], step):
            return Check(right, False, i, *fault)
    if len(lines) > len(trace.steps):
        return Check(right, False, len(trace.steps), "extra", f"expected the answer, got {lines[len(trace.steps)]!r}")
    return Check(right, True, message="" if right else f"expected the answer {answer}, got {stated or 'nothing'}")


def _fault(line: str, step: Step) -> tuple[Kind, str] | None:
    """What is wrong with a line, all lines before it being right."""
    name, colon, rest = line.partition(":")
    words = rest.split()
    if not colon or len(words) < 2:
        return "form", f"expected a line such as {step}, got {line!r}"
    *fetched, function, value = words
    if name != step.cell.name:
        return "transition", f"expected the state {step.cell.name} next, got {name}"
    if fetched != (want := list(map(str, step.fetched))):
        return "fetch", f"{name}: expected the operands {' '.join(want) or 'none'}, got {' '.join(fetched) or 'none'}"
    if function != step.name:
        return "transition", f"{name}: expected the local function {step.name}, got {function}"
    if value != show(step.cell.value):
        return "step", f"{step}: expected {show(step.cell.value)}, got {value}"
    return None
