"""Depth: the longest path, counted in block visits, of a program unrolled over the tokens of a row.

The unrolled graph has a node per value and token and an edge per dependence; :mod:`depthpass.analysis.stages` says how
it is solved, :mod:`depthpass.analysis.maxplus` how the closed form is proved. What is counted is graph depth over every
choice that routes may make: an upper bound on the depth of one input's run.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Literal

from depthpass.analysis.growth import Growth
from depthpass.analysis.maxplus import Recurrence
from depthpass.analysis.stages import PathVisit, Stages
from depthpass.errors import SpecError, did_you_mean
from depthpass.ir.ops import OPS
from depthpass.ir.program import Op, Program
from depthpass.prompt import at_prompt

if TYPE_CHECKING:
    import sympy

Weight = Literal["visits", "attention", "mlp", "sublayers"] | Mapping[int, int]
WEIGHTS: dict[str, tuple[int, int]] = {"visits": (0, 1), "attention": (1, 0), "mlp": (0, 1), "sublayers": (1, 1)}
"""What the attention and the MLP of a visit add to a path: they follow each other, so a path takes both."""


@at_prompt
@dataclass(frozen=True)
class Certificate:
    """Why the closed form holds for all n: one proved recurrence per delay cycle that the output depends on.

    Attributes:
        recurrences: see :class:`depthpass.analysis.maxplus.Recurrence`.
        cycle_ratio: largest visits per token over all delay cycles, computed on the graph alone. It equals the rate
            unless a top-k route lies between two cycles, whose rates then add up.
        cycle: values on a cycle of that ratio.
    """

    recurrences: tuple[Recurrence, ...]
    cycle_ratio: Fraction
    cycle: tuple[str, ...]


@at_prompt
@dataclass(frozen=True)
class Depth:
    """Depth of one output of a program as a function of n, the number of real tokens of a row.

    Attributes:
        program: the program.
        output: name of a tap, or None for the stream that goes to the model's head.
        weight: what is counted: ``visits``, ``attention``, ``mlp``, ``sublayers``, or weights by physical block.
        growth: depth at n as ``growth.at(n - 1)``.
        certificate: proof objects.
        notes: in which sense the number is to be taken, beyond what the module says.
    """

    program: Program
    output: str | None
    weight: Weight
    growth: Growth
    certificate: Certificate
    notes: tuple[str, ...] = ()
    _stages: Stages = field(repr=False, compare=False, default=None)  # type: ignore[assignment]

    @property
    def rate(self) -> Fraction:
        """Growth per token in the long run."""
        return self.growth.rate

    @cached_property
    def formula(self) -> sympy.Expr:
        """Closed form in the positive integer symbol n, exact for every n."""
        from depthpass.analysis.closed_form import closed_form

        return closed_form(self.growth)

    def at(self, n: int) -> int:
        """Depth for a row of n real tokens.

        Raises:
            SpecError: n is not an integer of at least 1.
        """
        if not isinstance(n, int) or isinstance(n, bool) or n < 1:
            raise SpecError(f"n: expected a number of tokens of at least 1, got {n!r}.")
        return int(self.growth.at(n - 1))

    def critical_path(self, n: int, last: int | None = None) -> list[PathVisit]:
        """The visits of one longest path for a row of n tokens, in order of execution.

        Args:
            n: real tokens of the row.
            last: only so many visits at the path's end; None = all, as many as the depth.
        """
        self.at(n)
        steps = self._stages.path(_output_value(self.program, self.output), n)
        return [*islice(steps, last)][::-1]

    def __str__(self) -> str:
        from depthpass.analysis.closed_form import format_formula

        return format_formula(self.formula)


def depth(program: Program, output: str | None = None, weight: Weight = "visits", calls: bool = False) -> Depth:
    """Exact depth of a program, for all n.

    Args:
        program: a verified program.
        output: name of a tap; None for the final stream.
        weight: what a visit counts; a mapping gives weights by physical block.
        calls: count n *calls* of one token each instead of one call of n tokens. Only programs whose visits read the
            ``past`` of another slot (KV policies ``last`` and ``mod:k``) can tell the difference. In a program without
            delays a first call of any length counts as one, so a prompt and m decoded tokens are ``at(m + 1)``.

    Raises:
        SpecError: no such tap, or no such weight; ``calls`` for a program with pad tokens and delays.
        PassError: a top-k route lies on a delay cycle, or no closed form could be proved.

    >>> from depthpass.ir import plain
    >>> depth(plain("LlamaForCausalLM", blocks=16, width=64)).at(155)
    16
    """
    if calls and {"delay", "pad"} <= {o.kind for o in program}:
        raise SpecError("calls: expected a program without pads or without delays; the pads of the first call lengthen "
                        "delays over them in a way that one-token calls do not show.")
    stages = Stages(_unpadded(program) if calls else program, _weigh(program, weight), calls)
    target = _output_value(stages.program, output)
    growth = denoised(program, stages.row(target))
    certificate = _certificate(stages.recurrences(target))
    behind = stages.ancestors(target)
    routed = any(o.kind == "route" for o in program.ops if o.name in behind)
    notes = ("routes: longest path over all choices of tokens",) if routed else ()
    if program.denoise is not None:
        notes += ("denoising: n masked tokens, of which every step writes at least one; a step reads what those before it wrote",)
    placed = next((o for o in program if o.kind == "pad" and (o["at"] or o["behind"] is not None)), None)
    if placed is not None and stages.pads_apart:
        notes += ("pads: n tokens stand in front of them; tokens that follow them inside a row add depth that is not counted",)
    return Depth(program, output, weight, growth, certificate, notes, stages)


def denoised(program: Program, once: Growth) -> Growth:
    """Depth of all denoising steps, given that of one, which is the same for every n.

    A step starts from the tokens that the steps before it have written, so depths add up. A row (or block) of fewer masks
    than steps is filled after as many steps as it has masks.
    """
    if program.denoise is None:
        return once
    steps, each = program.denoise["steps"], once.at(0)
    if not program.ahead:
        return Growth(tuple(each * n for n in range(1, steps + 1))).normal()
    block = program.ahead
    return Growth(tuple(each * min(steps, n) for n in range(1, block + 1)), block, int(each * min(steps, block))).normal()


def _unpadded(program: Program) -> Program:
    """The program without its pads: they belong to the first call, in which attention adds no depth along the row."""
    gone = {o.name: o.args[0] for o in program if o.kind in ("pad", "trim")}

    def source(name: str) -> str:
        while name in gone:
            name = gone[name]
        return name

    kept = (o for o in program if o.name not in gone)
    return replace(program, ops=tuple(replace(o, args=tuple(map(source, o.args))) for o in kept))


def _output_value(program: Program, output: str | None) -> str:
    if output is None:
        return program.output
    taps = {o["name"]: o.args[0] for o in program.taps}
    if output not in taps:
        known = f"The program has taps {', '.join(taps)}." if taps else "The program has no taps."
        raise SpecError(f"output: expected the name of a tap, got {output!r}.{did_you_mean(output, taps)} {known}")
    return taps[output]


def _certificate(recurrences: tuple[Recurrence, ...]) -> Certificate:
    steepest = max(recurrences, key=lambda r: r.cycle_ratio, default=None)
    if steepest is None:
        return Certificate((), Fraction(0), ())
    return Certificate(recurrences, steepest.cycle_ratio, tuple(str(v) for v in steepest.cycle))


def _weigh(program: Program, weight: Weight) -> Callable[[Op], int]:
    """What an op adds to a path."""
    if isinstance(weight, str):
        if weight not in WEIGHTS:
            raise SpecError(
                f"weight: expected one of {', '.join(WEIGHTS)}, or weights by block, got {weight!r}."
                f"{did_you_mean(weight, WEIGHTS)}"
            )
        attention, mlp = WEIGHTS[weight]
        return lambda o: sum(map(operator.mul, OPS[o.kind].depth(o), (attention, mlp)))
    for block in range(program.blocks):
        value = weight.get(block)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise SpecError(f"weight[{block}]: expected an integer of at least 0 for every block, got {value!r}.")
    return lambda o: weight[o["index"]] if OPS[o.kind].depth(o)[1] else 0
