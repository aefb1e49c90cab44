"""Layer programs: any list of visits (CoLa, SOLAR up-scaling, RYS, mergekit passthrough), and skips."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import yaml
from yaml.composer import ComposerError

from depthpass.errors import PassError, SpecError, did_you_mean
from depthpass.ir.program import Program
from depthpass.limits import TEXT, check_program, shown
from depthpass.passes.base import Context, Numerics, Pass, require
from depthpass.passes.streams import Builder, check_scope, modulation, straight

_MERGEKIT = ("slices", "merge_method", "dtype", "out_dtype", "tokenizer_source", "tokenizer", "chat_template", "name")
"""Fields of a mergekit config that say which blocks are visited, or nothing about depth at all."""


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
            starting as 1; parameters ``{scope}.p{place in the list}.scale``.
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
        data = _yaml(config) if isinstance(config, str) else config
        if not isinstance(data, Mapping) or not isinstance(data.get("slices"), Sequence) or not data["slices"]:
            raise SpecError("mergekit config: expected a mapping with a list 'slices', "
                            f"got {', '.join(data) if isinstance(data, Mapping) else repr(data)}.")
        _known(data, _MERGEKIT, "mergekit config")
        if data.get("merge_method") != "passthrough":
            raise SpecError(f"mergekit config: expected merge_method passthrough, got {data.get('merge_method')!r}. "
                            "Other methods merge weights; run them in mergekit and transform the result.")
        sources = []
        for i, piece in enumerate(data["slices"]):
            where = f"mergekit config: slices[{i}]"
            listed = piece.get("sources") if isinstance(piece, Mapping) else None
            if not isinstance(listed, Sequence) or len(listed) != 1 or not isinstance(listed[0], Mapping):
                raise SpecError(f"{where}: expected 'sources' with exactly one source, got {piece!r}.")
            _known(piece, ("sources",), where)
            _known(listed[0], ("model", "layer_range"), f"{where}.sources[0]")
            sources.append(listed[0])
        models = {str(s.get("model")) for s in sources}
        if len(models) > 1:
            raise SpecError(f"mergekit config: expected slices of one model, got {', '.join(sorted(models))}. "
                            "Blocks of several models need their weights merged first.")
        return cls.from_layer_replication([s.get("layer_range") for s in sources])

    @classmethod
    def from_layer_replication(cls, ranges: Sequence[Any]) -> LayerProgram:
        """Read PEFT's ``layer_replication``: half-open [start, end) ranges of blocks, joined.

        Example:
            >>> LayerProgram.from_layer_replication([[0, 4], [2, 5]]).layers
            (0, 1, 2, 3, 2, 3, 4)
        """
        layers: list[int] = []
        for i, pair in enumerate(ranges):
            ok = isinstance(pair, list | tuple) and len(pair) == 2 and all(type(p) is int for p in pair)
            if not ok or not 0 <= pair[0] < pair[1]:
                raise SpecError(f"layer range {i}: expected [start, end) with 0 <= start < end, got {shown(pair)}.")
            check_program(len(layers) + pair[1] - pair[0], 0, f"layer range {i}")
            layers += range(*pair)
        return cls(tuple(layers))

    @classmethod
    def from_flat_map(cls, text: str) -> LayerProgram:
        """Read a flat layer map: block numbers and half-open ``start:end`` ranges, separated by commas or spaces.

        Example:
            >>> LayerProgram.from_flat_map("0:3, 1, 2:4").layers
            (0, 1, 2, 1, 2, 3)
        """
        layers: list[int] = []
        for word in re.split(r"[,\s]+", text.strip()):
            match = re.fullmatch(r"(\d+)(?::(\d+))?", word)
            if not match:
                raise SpecError(f"layer map: expected numbers and start:end ranges, got {word!r} in {text!r}.")
            if len(word) > 20:
                raise SpecError(f"layer map: expected block numbers, got {shown(word)}.")
            piece = range(int(match[1]), int(match[2]) if match[2] else int(match[1]) + 1)
            check_program(len(layers) + len(piece), 0, "layer map")
            if not piece:
                raise SpecError(f"layer map: expected a range start:end with start < end, got {word!r}.")
            layers += piece
        return cls(tuple(layers))

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


def _yaml(text: str) -> Any:
    if len(text) > TEXT:
        raise SpecError(f"mergekit config: expected at most {TEXT} characters, got {len(text)}.")
    try:
        return yaml.safe_load(text)
    except ComposerError as error:
        raise SpecError("mergekit config: expected one document, got several (separated by ---), of which each makes a model of "
                        "its own. Pass one of them.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise SpecError(f"mergekit config: expected one YAML document, got text that is none: {reason}.") from None


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
    if end > visits:
        raise PassError(f"{who}.end: expected a position in {start + 1}..{visits}, got {end}: the program has {visits} "
                        "visits. Ranges are half-open.")


def _known(data: Mapping[str, Any], fields: Sequence[str], where: str) -> None:
    for key in data:
        if key not in fields:
            raise SpecError(f"{where}: the field {key!r} is not supported.{did_you_mean(str(key), fields)} "
                            f"Supported: {', '.join(fields)}.")
