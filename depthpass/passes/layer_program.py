"""Layer programs: any list of visits (CoLa, SOLAR up-scaling, RYS, mergekit passthrough), and skips."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from depthpass.errors import PassError
from depthpass.ir.program import Program
from depthpass.passes.base import Context, Numerics, Pass, require
from depthpass.passes.layer_lists import flat_layers, joined_ranges, mergekit_layers
from depthpass.passes.streams import Builder, check_scope, modulation, straight


@dataclass(frozen=True)
class LayerProgram(Pass):
    """Visit blocks in the order of a list: skip, repeat, reorder. Every visit has its own cache slot.

    rewrite:
        layer_program(layers=[0, 1, 2, 1, 2, 3])
        `0 1 2 3`  ->  `0 1 2 1 2 3`

    Identity: the list 0..L-1.

    Args:
        layers: positions in the program's list of visits, which are block numbers in a stock model; any order, any
            number of times.
        scales: give every visit a learned scale of what its attention and MLP read and a gate on what they add, all
            starting as 1; parameters ``{scope}.p{index in the list}.scale``.
        scope: first part of the parameter names.
    """

    name: ClassVar[str] = "layer_program"
    numerics: ClassVar[Numerics] = "changing"

    layers: Sequence[int]
    scales: bool = False
    scope: str = "layer_program"

    def validate(self) -> None:
        require(self.scope.isidentifier(), "layer_program.scope", "a plain name of letters, digits and _", self.scope)
        require(len(self.layers) > 0, "layer_program.layers", "at least one visit", list(self.layers))
        require(min(self.layers) >= 0, "layer_program.layers", "block numbers of at least 0", min(self.layers))

    @classmethod
    def from_mergekit(cls, config: str | Mapping[str, Any]) -> LayerProgram:
        """Read a mergekit ``passthrough`` config (YAML text or the dict in it): slices of one model, half-open ranges.

        Raises:
            SpecError: another merge method, slices of several models, or a field that would change the weights.

        Example:
            >>> text = "merge_method: passthrough\\nslices:\\n"
            >>> text += "- sources: [{model: m, layer_range: [0, 3]}]\\n- sources: [{model: m, layer_range: [1, 4]}]"
            >>> LayerProgram.from_mergekit(text).layers
            (0, 1, 2, 1, 2, 3)
        """
        return cls(mergekit_layers(config))

    @classmethod
    def from_layer_replication(cls, ranges: Sequence[Any]) -> LayerProgram:
        """Read PEFT's ``layer_replication``: half-open [start, end) ranges of blocks, joined.

        Example:
            >>> LayerProgram.from_layer_replication([[0, 4], [2, 5]]).layers
            (0, 1, 2, 3, 2, 3, 4)
        """
        return cls(joined_ranges(ranges))

    @classmethod
    def from_flat_map(cls, text: str) -> LayerProgram:
        """Read a flat layer map: block numbers and half-open ``start:end`` ranges, separated by commas or spaces.

        Example:
            >>> LayerProgram.from_flat_map("0:3, 1, 2:4").layers
            (0, 1, 2, 1, 2, 3)
        """
        return cls(flat_layers(text))

    def apply(self, program: Program, ctx: Context) -> Program:
        visits = straight(program, self.name)
        if max(self.layers) >= len(visits):
            raise PassError(f"layer_program.layers: expected blocks in 0..{len(visits) - 1}, got {max(self.layers)}.")
        return visit_list(self.name, program, self.layers, range(len(self.layers)) if self.scales else (), self.scope)


@dataclass(frozen=True)
class Skip(Pass):
    """Leave out the visits [start, end).

    rewrite:
        skip(start=1, end=3)
        `0 1 2 3`  ->  `0 3`

    Args:
        start: first position that is left out.
        end: one past the last; None = only ``start``.
    """

    name: ClassVar[str] = "skip"
    numerics: ClassVar[Numerics] = "changing"

    start: int
    end: int | None = None

    def validate(self) -> None:
        require(self.start >= 0, "skip.start", "a position of at least 0", self.start)
        require(self.end is None or self.end > self.start, "skip.end", f"a position above start={self.start}", self.end,
                "Ranges are half-open.")

    def apply(self, program: Program, ctx: Context) -> Program:
        count = len(straight(program, self.name))
        end = self.start + 1 if self.end is None else self.end
        check_range("skip", self.start, end, count)
        left = tuple(i for i in range(count) if not self.start <= i < end)
        if not left:
            raise PassError(f"skip: expected a range that leaves a visit, got all {count}.")
        return LayerProgram(left).apply(program, ctx)


def visit_list(who: str, program: Program, layers: Sequence[int], scaled: Collection[int], scope: str) -> Program:
    """The program with its visits in another order; those at the places ``scaled`` of the list get learned scales."""
    visits = straight(program, who)
    if scaled:
        check_scope(who, scope, program)
    builder, x = Builder(program), visits[0].args[0]
    for place, position in enumerate(layers):
        operands = {"modulate": f"{scope}.p{place}.scale"} if place in scaled else {}
        x = builder.visit(visits[position], x, **modulation(who, visits[position], operands))
    return builder.splice(visits, x)


def check_range(who: str, start: int, end: int, visits: int) -> None:
    """Refuse a half-open range of positions that the program does not have."""
    if start >= min(end, visits):
        raise PassError(f"{who}.start: expected a position below {min(end, visits)}, got {start}: the program has {visits} "
                        "visits.")
    if end > visits:
        raise PassError(f"{who}.end: expected a position in {start + 1}..{visits}, got {end}: the program has {visits} "
                        "visits. Ranges are half-open.")
