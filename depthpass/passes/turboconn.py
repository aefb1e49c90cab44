"""TurboConn (arXiv 2602.17993): learned bridges from higher blocks to lower blocks of later tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from depthpass.errors import PassError
from depthpass.ir.program import Op, Program, op
from depthpass.limits import check_program
from depthpass.passes.base import Context, Numerics, Pass, require
from depthpass.passes.streams import after_bridges, check_whole, insert_before, linear

PRESETS: dict[str, dict[str, Any]] = {
    # Llama-3.2-1B of the official code: s, d in {0, 2, .., 14}, s - d > 5, 15 bridges.
    "llama-1b": {"sources": (0, 15), "destinations": (0, 15), "min_span": 6},
    # Llama-3.1-8B: s in {6, 8, .., 30}, d in {7, 9, .., 25}, s - d > 6, 45 bridges.
    "llama-8b": {"sources": (6, 31), "destinations": (7, 26), "min_span": 7},
    # The sparse control: one bridge from the last block to the first.
    "sparse": {"bridges": ((-1, 0),)},
}
MIN_SPAN = 6


@dataclass(frozen=True)
class TurboConn(Pass):
    """Add learned bridges: token i at block d also gets what token i - g knew after block s > d.

    With m = ``gain`` = 0.01 * ``alpha`` and g = ``group``, every bridge b = (s -> d) adds on the output of block d

        h_d[i] = Block_d(..)[i] + sum_b Up_b(m * Down_b(h_s[i - g]))

    where h_s is the stream after block s *and* after any bridge that lands on s. Nothing is added at the first g
    real tokens of a row. Up starts from zero (weight and bias), so a new model equals the stock model. Tokens of one
    group of g run in parallel, groups run one after another; depth grows by the longest bridge once per group.

    rewrite:
        turboconn(bridges=((2, 0),), group=4, rank=8), on four blocks
        `%1 = block 0 (%0) slot 0`
        `%2 = block 1 (%1) slot 1`
        `%3 = block 2 (%2) slot 2`
        ->
        `%1 = block 0 (%0) slot 0`
        `%2 = delay 4 (%7)`
        `%3 = linear turboconn.s2_d0.up (%2) out 64 init 0.0`
        `%4 = add (%1, %3)`
        `%5 = block 1 (%4) slot 1`
        `%6 = block 2 (%5) slot 2`
        `%7 = linear turboconn.s2_d0.down (%6) out 8`

    Parameters (under ``depth.`` in the state dict): ``turboconn.s{source}_d{destination}.{down,up}.{weight,bias}``,
    or ``.full.`` when ``rank`` is None. Identity: any zero ``up`` (the initial state): bit for bit where the row is one
    chunk, to rounding (1e-6 in float32) where it is cut into several, whose products are those of smaller matrices.

    Args:
        bridges: explicit (source, destination) pairs, as positions in the program's list of visits: block numbers in
            a stock model, visit numbers where blocks repeat. Negative positions count from the end, so (-1, 0) is
            last to first. None = the rule: every pair of a source and a destination at least ``min_span`` apart.
        group: g, the delay of every bridge in tokens.
        rank: width of Down's output; None = one full linear map of the delayed stream instead of Down and Up.
        alpha: strength; 100 gives m = 1.
        gain: m itself, instead of ``alpha``.
        stride: rule: step of the source and the destination ranges.
        min_span: rule: smallest source - destination. None = 6 as for Llama 1B, and on stacks too shallow for a span
            of 6 the largest span there is.
        sources: rule: half-open range (start, stop) of sources; None = all visits.
        destinations: rule: half-open range (start, stop) of destinations; None = all visits.
        preset: a layout of the official code by name, instead of bridges or rule: ``llama-1b`` (16 blocks, 15
            bridges), ``llama-8b`` (32 blocks, 45 bridges), or the control ``sparse`` (last to first).
        write: add on the destination block's ``output`` (as the official code) or on its ``input``.
        wiring: ``paper``, as above; ``code``, as the public code runs, which the published numbers were made with: *every*
            bridge reads the source of the last bridge in the list (a loop variable is not unpacked), through the Down of
            that source's first, second, .. bridge for the first, second, .. bridge of its own source. Those bridges have
            an Up of their own only; Down maps of other sources do not exist here (there they get no gradient).
        init_std: standard deviation of Down's initial weight; its bias starts from zero.
        scope: first part of the parameter names; set it to apply the pass twice to one program.

    Example:
        >>> from depthpass.ir import plain
        >>> from depthpass.passes import Context, apply_spec
        >>> stock = plain("LlamaForCausalLM", blocks=16, width=64)
        >>> turbo = apply_spec(stock, TurboConn.llama_1b(group=8), Context.of(stock))
        >>> sum(o.kind == "delay" for o in turbo)
        15
    """

    name: ClassVar[str] = "turboconn"
    numerics: ClassVar[Numerics] = "changing"
    shown: ClassVar[tuple[str, ...]] = ("group",)

    bridges: Sequence[tuple[int, int]] | None = None
    group: int = 4
    rank: int | None = 120
    alpha: float = 100.0
    gain: float | None = None
    stride: int = 2
    min_span: int | None = None
    sources: tuple[int, int] | None = None
    destinations: tuple[int, int] | None = None
    preset: Literal["llama-1b", "llama-8b", "sparse"] | None = None
    write: Literal["output", "input"] = "output"
    wiring: Literal["paper", "code"] = "paper"
    init_std: float = 0.02
    scope: str = "turboconn"

    @classmethod
    def llama_1b(cls, **overrides: Any) -> TurboConn:
        """The band of Llama-3.2-1B (16 blocks, 15 bridges)."""
        return cls(**{"preset": "llama-1b", **overrides})

    @classmethod
    def llama_8b(cls, **overrides: Any) -> TurboConn:
        """The band of Llama-3.1-8B (32 blocks, 45 bridges)."""
        return cls(**{"preset": "llama-8b", **overrides})

    @classmethod
    def sparse(cls, **overrides: Any) -> TurboConn:
        """The sparse control: one bridge, from the last block to the first."""
        return cls(**{"preset": "sparse", **overrides})

    def validate(self) -> None:
        n = self.name
        require(self.group >= 1, f"{n}.group", "at least 1 token", self.group)
        require(self.rank is None or self.rank >= 1, f"{n}.rank", "at least 1", self.rank,
                "Use null (None) for one full linear map.")
        require(self.gain is None or self.alpha == 100.0, f"{n}.gain", "either gain or alpha", (self.gain, self.alpha),
                "gain is 0.01 * alpha; leave one of them out.")
        require(self.init_std > 0, f"{n}.init_std", "a positive number", self.init_std,
                "With Down and Up both zero no gradient ever flows.")
        require(self.wiring == "paper" or (self.rank is not None and self.write == "output"), f"{n}.wiring",
                "'paper' without a rank or with write='input'", self.wiring, "The public code has neither.")
        require(self.scope.isidentifier(), f"{n}.scope", "a plain name of letters, digits and _", self.scope)
        rule = {"stride": self.stride != 2, "min_span": self.min_span is not None,
                "sources": self.sources is not None, "destinations": self.destinations is not None}
        chosen = "bridges" if self.bridges is not None else "preset"
        if self.bridges is not None or self.preset is not None:
            require(not any(rule.values()), f"{n}.{next((k for k, on in rule.items() if on), '')}",
                    f"no rule beside {chosen}", [k for k, on in rule.items() if on], "Leave one of them out.")
            require(self.bridges is None or self.preset is None, f"{n}.preset", "either bridges or preset", self.preset)
        require(self.bridges != (), f"{n}.bridges", "at least one (source, destination) pair", [],
                "Leave the field out for the rule.")
        require(self.stride >= 1, f"{n}.stride", "at least 1", self.stride)
        require(self.min_span is None or self.min_span >= 1, f"{n}.min_span", "at least 1", self.min_span,
                "A bridge leads from a higher to a lower block.")
        for field in ("sources", "destinations"):
            span = getattr(self, field)
            require(span is None or 0 <= span[0] < span[1], f"{n}.{field}", "a half-open range 0 <= start < stop", span)

    @property
    def label(self) -> str:
        return f"{self.name}(group={self.group})"

    @property
    def multiplier(self) -> float:
        """m of the equations: ``gain``, or 0.01 * ``alpha``."""
        # Not 0.01 * alpha: 0.01 has no exact binary form, alpha / 100 is exact at the documented settings.
        return self.alpha / 100 if self.gain is None else self.gain

    def resolve(self, visits: int) -> tuple[tuple[int, int], ...]:
        """The bridges for a program of so many visits, all positions non-negative.

        Raises:
            PassError: a position out of range, a source that is not above its destination, a duplicate, or a rule
                that gives no bridge at all.
        """
        if self.preset is not None:
            layout = PRESETS[self.preset]
            if visits < (least := max(layout.get("sources", (0, 2)))):
                raise PassError(f"turboconn.preset: expected a program of at least {least} visits for {self.preset!r}, "
                                f"got {visits}. Leave preset out for the rule, or give bridges.")
            return replace(self, preset=None, **layout).resolve(visits)
        if self.bridges is None:
            return self._rule(visits)
        found: list[tuple[int, int]] = []
        for given in self.bridges:
            for position in given:
                if not -visits <= position < visits:
                    raise PassError(f"turboconn.bridges: expected positions in 0..{visits - 1} (or negative ones from "
                                    f"the end), got {position} in {given}: the program has {visits} visits.")
            source, destination = (p % visits for p in given)
            if source <= destination:
                raise PassError(f"turboconn.bridges: expected a source above its destination, got {given}"
                                f"{f', that is {(source, destination)}' if min(given) < 0 else ''}. "
                                "A bridge leads from a higher to a lower block.")
            if (source, destination) in found:
                raise PassError(f"turboconn.bridges: {(source, destination)} is given twice. Remove one of them.")
            found.append((source, destination))
        return tuple(found)

    def _rule(self, visits: int) -> tuple[tuple[int, int], ...]:
        for field in ("sources", "destinations"):
            if (span := getattr(self, field)) is not None and span[1] > visits:
                raise PassError(f"turboconn.{field}: expected a range within 0..{visits}, got {span}: the program has "
                                f"{visits} visits. Give bridges or ranges that fit this model.")
        sources = range(*(self.sources or (0, visits)), self.stride)
        destinations = range(*(self.destinations or (0, visits)), self.stride)
        spans = [s - d for s in sources for d in destinations if s > d]
        least = self.min_span if self.min_span is not None else min(MIN_SPAN, max(spans, default=MIN_SPAN))
        check_program(visits, 5 * sum(span >= least for span in spans), "turboconn")
        found = tuple((s, d) for s in sources for d in destinations if s - d >= least)
        if not found:
            raise PassError(
                f"turboconn: the rule (stride {self.stride}, min_span {least}, sources {list(sources)}, destinations "
                f"{list(destinations)}) gives no bridge on {visits} visits. Lower min_span"
                + (f" to at most {max(spans)}," if spans else " or stride,")
                + (" or give bridges such as [(-1, 0)]." if visits > 1 else " but a bridge needs at least two visits.")
            )
        return found

    def apply(self, program: Program, ctx: Context) -> Program:
        visits = program.visits
        bridges = self.resolve(len(visits))
        self._check_names(program, bridges)
        check_whole(self.name, program, sorted({p for bridge in bridges for p in bridge}))
        names = iter(program.fresh(5 * len(bridges)))
        rank, feeds = self.rank, self._feeds(bridges)
        maps = dict.fromkeys(feeds[b] for b in bridges)
        low = {b: next(names) for b in maps} if rank is not None else {}
        streams: dict[int | str, str] = {}
        for d in sorted({d for _, d in bridges}):
            arriving = [b for b in bridges if b[1] == d]
            ops: list[Op] = []
            for bridge in arriving:
                ops += self._arrive(program, bridge, low.get(feeds[bridge]), streams, names)
            ups = [o.name for o in ops if o.kind == "linear"]
            program = self._land(program, visits[d].name, ops, ups, next(names))
        if rank is None:
            return program
        for s in sorted({s for s, _ in low}):
            # After every landing, so that h_s includes what arrives on block s.
            stream = after_bridges(program, visits[s].name)
            program = program.insert_after(stream, [
                linear(self._parameter(b, "down"), rank, stream, name=name, note=self._note(b), init=self.init_std)
                for b, name in low.items() if b[0] == s
            ])
        return program

    def _feeds(self, bridges: tuple[tuple[int, int], ...]) -> dict[tuple[int, int], tuple[int, int]]:
        """The bridge whose Down each bridge reads: its own, or as the public code has it.

        Raises:
            PassError: the public code could not run these bridges, or would feed them within a token.
        """
        if self.wiring == "paper":
            return {b: b for b in bridges}
        last = bridges[-1][0]
        downs = [b for b in bridges if b[0] == last]
        found = {}
        for i, b in enumerate(bridges):
            order = sum(other[0] == b[0] for other in bridges[:i])
            if order >= len(downs) or b[1] > last:
                why = (f"{b} lands above the source {last} of the last bridge" if b[1] > last else
                       f"{b} is bridge {order + 1} of its source, the last one's source {last} has {len(downs)}")
                raise PassError(f"turboconn.wiring: expected bridges that the public code can run, got {why}. Put a source with "
                                "as many bridges as any other, above every destination, last; or use wiring='paper'.")
            found[b] = downs[order]
        return found

    def _arrive(
        self, program: Program, bridge: tuple[int, int], low: str | None, streams: dict[int | str, str],
        names: Iterator[str],
    ) -> list[Op]:
        """Ops that bring one bridge's value to its destination; the last one is the linear map to the width."""
        s, note = bridge[0], self._note(bridge)
        shared = note if low else f"{self.label}: bridges from {bridge[0]}"
        source, key = low or after_bridges(program, program.visits[s].name), low or s
        value = streams.get(key)
        ops = []
        if value is None:
            ops.append(op("delay", source, name=(value := next(names)), note=shared, tokens=self.group))
            if self.multiplier != 1.0:
                ops.append(op("scale", value, name=(value := next(names)), note=shared, by=self.multiplier))
            # Without Down all bridges of one source read one delayed stream: one delay line of the full width.
            streams[key] = value
        kind = "full" if low is None else "up"
        ops.append(linear(self._parameter(bridge, kind), program.width, value, name=next(names), note=note, init=0.0))
        return ops

    def _land(self, program: Program, visit: str, ops: list[Op], ups: list[str], name: str) -> Program:
        """Add the arriving values on the visit's output, or on its input."""
        if self.write == "input":
            stream = program.defs[visit].args[0]
            ops = [*ops, op("add", stream, *ups, name=name, lands="input")]
            return insert_before(program, visit, ops).map_ops(
                lambda o: replace(o, args=(name, *o.args[1:])) if o.name == visit else o
            )
        stream = after_bridges(program, visit)
        ops = [*ops, op("add", stream, *ups, name=name)]
        return program.insert_after(stream, ops).replace_uses(stream, name)

    def _check_names(self, program: Program, bridges: tuple[tuple[int, int], ...]) -> None:
        taken = {o["name"] for o in program if o.kind == "linear"}
        for bridge in bridges:
            for kind in ("down", "up", "full"):
                if (name := self._parameter(bridge, kind)) in taken:
                    raise PassError(f"turboconn.scope: the program already has a parameter {name!r}. Join both passes "
                                    "in one, or set scope='another_name' on one of them.")

    def _parameter(self, bridge: tuple[int, int], kind: str) -> str:
        return f"{self.scope}.s{bridge[0]}_d{bridge[1]}.{kind}"

    def _note(self, bridge: tuple[int, int]) -> str:
        return f"{self.label}: bridge {bridge[0]} -> {bridge[1]}"
