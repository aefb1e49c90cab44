"""``verify`` accepts what runs and rejects what cannot: it agrees with running programs token by token."""

from __future__ import annotations

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from depthpass.errors import VerifyError
from depthpass.ir import Program, infer, op, verify

TOKENS = 40
"""More than the delays of one random program can add up to, so that what is absent now is absent for good."""


def presence(program: Program) -> dict[str, list[bool]]:
    """Run a program token by token, keeping only whether each value exists.

    Raises:
        LookupError: an op needs a value that is not computed yet, or one that this token does not have.
    """
    there: dict[str, list[bool]] = {o.name: [] for o in program.ops if o.name}
    for i in range(TOKENS):
        for o in program.ops:
            if o.kind == "delay":
                there[o.name].append(i >= o["tokens"] and there[o.args[0]][i - o["tokens"]])
                continue
            args = [there[a][i] for a in o.args]
            if o.kind in ("block", "norm", "output") and not all(args):
                raise LookupError
            if o.name:
                there[o.name].append(any(args) if o.kind == "add" else all(args))
    return there


@st.composite
def soups(draw: st.DrawFn) -> Program:
    """Programs of a few ops with arguments taken from anywhere, before or after: about half of them are valid."""
    count = draw(st.integers(1, 6))
    ops = [op("embed", name="0")]
    for i in range(1, count + 1):
        before, anywhere = st.integers(0, i - 1).map(str), st.integers(0, count).map(str)
        kind = draw(st.sampled_from(("delay", "delay", "add", "mul", "scale", "block", "norm")))
        # Mostly earlier arguments, or nearly every program would fail for the same dull reason.
        near = draw(st.sampled_from((True, True, True, False)))
        where = before if near and kind != "delay" else anywhere
        args = [draw(where) for _ in range(2 if kind in ("add", "mul") else 1)]
        attrs = {
            "delay": lambda: {"tokens": draw(st.integers(1, 5))},
            "scale": lambda: {"by": 0.5},
            "block": lambda i=i: {"index": 0, "slot": i},
        }.get(kind, dict)()
        ops.append(op(kind, *args, name=str(i), **attrs))
    return Program("Soup", 1, 8, (*ops, op("output", draw(st.sampled_from(("0", str(count)))))))


@settings(max_examples=600)
@given(soups())
def test_verify_agrees_with_running(program: Program) -> None:
    try:
        there = presence(program)
        runs = all(values[-1] for values in there.values())
    except LookupError:
        there, runs = {}, False
    event(f"runs: {runs}")
    if not runs:
        with pytest.raises(VerifyError):
            verify(program)
        return
    types = infer(verify(program))
    assert {name: values.index(True) for name, values in there.items()} == {n: t.absent for n, t in types.items()}
