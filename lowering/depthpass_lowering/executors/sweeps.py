"""Sweeps: a serial region over many chunks at once, its delays reading what the sweep before has computed.

The Jacobi iteration of arXiv 2002.03629 on the chunks of a row. A chunk reads earlier chunks only, so after k sweeps the
first k chunks are exact, and sweeps start behind the chunks that are settled: keys, values and delay lines of those are a
cache like any other.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from depthpass.analysis.dependence import back_delays
from depthpass.ir.ops import OPS
from depthpass.ir.program import Op, writes_slot
from depthpass.log import fallback
from depthpass.lowered.program import LoweredRegion
from depthpass.prompt import at_prompt
from depthpass.schedule.fixed_point import FixedPoint
from depthpass_lowering.executors.eager import Run
from depthpass_lowering.state.slots import Span, State, push_delay, spans
from depthpass_lowering.visits.attention import Masks

RIDGE = {"cpu": 22.0}
"""Rows above which products are bound by arithmetic, where nothing is said: measured on two x86 cores."""

RIDGE_ELSEWHERE = 184.0
"""The same for other devices: an H200 in bfloat16."""


@at_prompt
@dataclass
class Solve:
    """How one serial region was run in one call.

    Attributes:
        blocks: physical blocks of the region's visits.
        tokens, chunk, chunks: columns of the call, columns of a chunk, and how many chunks that makes.
        sweeps: sweeps run, the one that records the graph included.
        rows: token rows that all sweeps together ran over; ``tokens`` times the batch is one plain forward pass.
        residuals: of each sweep the largest relative change of c in any chunk that was not settled.
        rate: geometric mean of the ratios by which the changes of unsettled chunks shrank; None below two sweeps.
        sequential: chunks that ran in the token loop after all.
        reason: why they did; None = no fallback.
        converged: False = the last sweep was taken as it is (``exact=False``).
        adjoint: sweeps of the backward pass, once it has run.
    """

    blocks: tuple[int, ...]
    tokens: int
    chunk: int
    chunks: int
    sweeps: int = 0
    rows: int = 0
    residuals: list[float] = field(default_factory=list)
    rate: float | None = None
    sequential: int = 0
    reason: str | None = None
    converged: bool = True
    adjoint: int | None = None

    def __str__(self) -> str:
        text = f"blocks {', '.join(map(str, self.blocks))}: {self.tokens} tokens in {self.chunks} chunks of {self.chunk}, "
        text += f"{self.sweeps} sweeps"
        if self.rate is not None:
            text += f", rate {self.rate:.3g}"
        if self.residuals:
            text += f", last change {self.residuals[-1]:.3g}"
        if not self.converged:
            text += ", not converged (cut off as asked for)"
        if self.reason:
            text += f"; {self.sequential} chunks in the token loop: {self.reason}"
        return text


class JacobiSweep:
    """The sweeps of one region in one call of a run.

    Attributes:
        sources: values that the region's delays read.
        frontier: c by name: what the delays inject. Ops that depend on delays alone belong to the injection, so that a
            bridge whose upper map is zero injects zero.
    """

    def __init__(self, run: Run, region: LoweredRegion):
        self.run, self.region, self.wanted = run, region, region.outputs
        # Groups that begin in other columns in every row: a token is only sure not to read itself.
        self.size = region.size if aligned(run, region) else 1
        self.sources = tuple(dict.fromkeys(line.source for line in region.lines))
        self.ops = region.program_ops
        back = back_delays(run.program, frozenset(o.name for o in region.ops))
        self.injection: dict[str, Op] = {}
        for o in self.ops:
            if o.name in back or (OPS[o.kind].token_local and o.args and all(a in self.injection for a in o.args)):
                self.injection[o.name] = o
        read = {a for o in self.ops if o.name not in self.injection for a in o.args}
        read |= set(self.wanted) | set(self.sources)
        self.frontier = tuple(n for n in self.injection if n in read)

    def span(self, start: int, count: int) -> Span:
        """Columns ``start .. start+count-1`` of this call's new tokens."""
        c, end = self.run.context, start + count
        if c.valid is None:
            return Span(c.start + start, count, None, None)
        rank = (c.valid.long().cumsum(-1) - c.valid.long())[:, c.start :]
        return Span(c.start + start, count, c.valid[:, c.start :][:, start:end], rank[:, start:end])

    def inner(self, state: State, host=None, side_inputs=None) -> Run:
        """The run on a state of its own; its host and side inputs may be stand-ins."""
        c = self.run.context
        # Keys are kept whole while it is open where the settled chunks end.
        tables = c.side_inputs if side_inputs is None else side_inputs
        return Run(replace(c, host=host or c.host, side_inputs=tables, whole_slots=True), state)

    def inject(self, inner: Run, sources: Mapping[str, Tensor], span: Span) -> dict[str, Tensor]:
        """c of a span's tokens from the delay lines and the sources at the span's own tokens."""
        local: dict[str, Tensor] = {}
        for o in self.injection.values():
            if o.kind == "delay":
                local[o.name] = inner.delayed(o, sources[o.args[0]], span)
            else:
                local[o.name] = inner.op(o, [local[a] for a in o.args], span, None, (), False)
        return {name: local[name] for name in self.frontier}

    def first(self, inner: Run, span: Span) -> dict[str, Tensor]:
        """c of the first sweep: nothing, but what the first chunk reads from the delay lines."""
        zeros = self.zeros(span.count)
        injected = self.inject(inner, zeros, span)
        own = torch.arange(span.count, device=self.run.hidden.device)[:, None] < self.size
        return {name: torch.where(own, x, x.new_zeros(())) for name, x in injected.items()}

    def plain(self, span: Span) -> Span:
        """A span behind whose first chunk nothing has passed a delay: its tokens count as the row's first ones."""
        count, device = span.count, self.run.hidden.device
        rank = torch.arange(span.start, span.start + count, device=device)[None] if span.rank is None else span.rank
        return replace(span, rank=torch.where(torch.arange(count, device=device) < self.size, rank, 0))

    def zeros(self, count: int) -> dict[str, Tensor]:
        hidden = self.run.hidden
        return {s: hidden.new_zeros(hidden.shape[0], count, self.run.types[s].width) for s in self.sources}

    def sweep(self, inner: Run, inputs: Mapping[str, Tensor], c: Mapping[str, Tensor], span: Span) -> dict[str, Tensor]:
        """Run the region over a span's tokens; keys and values go to the inner run's state, delay lines stay."""
        context = inner.context
        start = span.start - context.start
        local = {name: x.narrow(1, start, span.count) for name, x in inputs.items()} | dict(c)
        masks = Masks(span.start, span.count, context.valid_until(span.start + span.count), self.run.hidden.device)
        tables = context.narrowed(start, span.count)["side_inputs"]
        for o in self.ops:
            if o.name in self.injection:
                continue
            if o.kind == "delay":
                local[o.name] = inner.delayed(o, local[o.args[0]], span)
            else:
                local[o.name] = inner.op(o, [local[a] for a in o.args], span, masks, tables, True)
        return local

    def push(self, inner: Run, sources: Mapping[str, Tensor], span: Span) -> dict[str, Tensor]:
        """The delay lines after a span."""
        return {
            d.name: push_delay(inner.line(d.name, d.tokens), sources[d.source], d.tokens, span, inner.state.record)
            for d in self.region.lines
        }

    def changes(self, c: Mapping[str, Tensor], after: Mapping[str, Tensor], span: Span) -> list[float]:
        """Of each chunk the largest relative change of c over lines and rows."""
        ratios: list[Tensor] = []
        for name, x in after.items():
            dtype = torch.promote_types(x.dtype, torch.float32)
            moved, size = (self._norms(t.to(dtype), span) for t in (x.to(dtype) - c[name], x))
            ratio = torch.where(moved == 0, moved, moved / size).nan_to_num(math.inf).amax(0)
            ratios.append(ratio)
        return functools.reduce(torch.maximum, ratios).tolist()

    def _norms(self, x: Tensor, span: Span) -> Tensor:
        """Norms over the real tokens of each chunk, ``[batch, tokens, width]`` -> ``[batch, chunks]``."""
        squares = x.square().sum(-1)
        if span.valid is not None:
            squares = torch.where(span.valid, squares, squares.new_zeros(()))
        short = -span.count % self.size
        return torch.nn.functional.pad(squares, (0, short)).unflatten(1, (-1, self.size)).sum(-1).sqrt()


def aligned(run: Run, region: LoweredRegion) -> bool:
    """Whether chunks that are counted from the call's first column reach across no group of a row."""
    c = run.context
    ends = [s.start for s in spans(c.start, c.count, c.valid, None, region.chunk, region.groups)]
    return not region.groups or ends == list(range(c.start, c.start + c.count, region.size))


class Solver:
    """Runs a region by sweeps, without a graph.

    Args:
        budget: sweeps at most; None = the policy's own.
    """

    def __init__(self, jacobi: JacobiSweep, policy: FixedPoint, budget: int | None = None):
        self.jacobi, self.policy, run = jacobi, policy, jacobi.run
        self.chunk, self.count = jacobi.size, run.context.count
        self.budget = policy.max_sweeps if budget is None else budget
        self.record = Solve(tuple(o["index"] for o in jacobi.region.calls), self.count, self.chunk, -(-self.count // self.chunk))
        self.settled = 0
        # Of each chunk the sweeps that were over when it was first swept.
        self.entered: list[int] = []
        self.ratios: list[float] = []
        self.pieces: dict[str, list[Tensor]] = {n: [] for n in dict.fromkeys((*jacobi.wanted, *jacobi.sources))}

    def solve(self, inputs: Mapping[str, Tensor], state: State) -> bool:
        """Settle tokens by sweeps, moving the state along; False = the rest belongs into the token loop.

        Afterwards ``settled`` says how many columns are done and ``pieces`` holds their values.
        """
        jacobi, record, policy = self.jacobi, self.record, self.policy
        width = self.count if policy.window is None else policy.window * self.chunk
        c = guess = None
        previous: list[float] = []
        while self.settled < self.count:
            at, end = self.settled, min(self.count, self.settled + width)
            span = jacobi.span(at, end - at)
            self.entered += [record.sweeps] * (-(-end // self.chunk) - len(self.entered))
            inner, reading = jacobi.inner(state.fork()), span
            if guess is None:
                c = jacobi.first(inner, span)
                reading = jacobi.plain(span) if policy.start == "plain" else span
            elif c is None:
                known = next(iter(guess.values())).shape[1]
                fresh = jacobi.zeros(end - at - known)
                guess = {s: torch.cat((x, fresh[s].to(x.dtype)), 1) for s, x in guess.items()}
                c = jacobi.inject(inner, guess, span)
            local = jacobi.sweep(inner, inputs, c, reading)
            sources = {s: local[s] for s in jacobi.sources}
            after = jacobi.inject(inner, sources, span)
            changes = jacobi.changes(c, after, span)
            if reading is not span:  # nothing is not the same as zeros, whatever c has become
                changes = [1.0] * len(changes)
            # The first chunk reads what is settled only: it is right, up to rounding of another product's shape.
            changes[0] = 0.0
            record.sweeps += 1
            record.rows += self.jacobi.run.hidden.shape[0] * (end - at)
            good = self._settles(changes, after)
            record.residuals.append(max(changes))
            columns = min(end - at, good * self.chunk)
            self._settle(inner, state, local, span, columns)
            guess = {s: x[:, columns:] for s, x in sources.items()}
            # With new chunks in the window, c has to be made anew.
            c = {n: x[:, columns:] for n, x in after.items()} if end == self.count else None
            now, before = max(changes[good : len(previous)], default=0.0), max(previous[good:], default=0.0)
            if before:
                self.ratios.append(now / before)
            if self.settled < self.count and (reason := self._gives_up(now)):
                record.reason, record.sequential = reason, -(-(self.count - self.settled) // self.chunk)
                fallback(f"schedule 'fixed_point' went on in the token loop: {reason}; outputs.sweeps tells of every call",
                         asked=True)
                break
            previous = changes[good:]
        record.rate = geometric_mean(self.ratios)
        return self.settled >= self.count

    def tol(self, c: Mapping[str, Tensor]) -> float:
        if self.policy.tol is not None:
            return self.policy.tol
        return 4 * max(torch.finfo(x.dtype).eps for x in c.values())

    def _settles(self, changes: list[float], c: Mapping[str, Tensor]) -> int:
        """How many chunks of a sweep are done."""
        if not self.policy.exact and self.budget is not None and self.record.sweeps >= self.budget:
            self.record.converged = all(x <= self.tol(c) for x in changes)
            return len(changes)
        tol, good = self.tol(c), 1
        self.floor = tol
        while good < len(changes) and changes[good] <= tol:
            good += 1
        return good

    def _settle(self, inner: Run, state: State, local: Mapping[str, Tensor], span: Span, columns: int) -> None:
        """Take over the first columns of a sweep."""
        jacobi = self.jacobi
        done = jacobi.span(self.settled, columns)
        state.lines |= jacobi.push(inner, {s: local[s][:, :columns] for s in jacobi.sources}, done)
        end = done.start + done.count
        for o in jacobi.region.visits:
            if (number := writes_slot(o)) is not None:
                slot = inner.state.slots[number]
                if columns < span.count:
                    slot = slot.map(functools.partial(_until, count=end - slot.first))
                ring = jacobi.run.ring(o)
                state.slots[number] = slot if ring is None else slot.last(ring)
        for name, parts in self.pieces.items():
            parts.append(local[name][:, :columns])
        self.settled += columns

    def _gives_up(self, change: float) -> str | None:
        """Why the token loop should run what is left, or None; ``change`` is that of the chunks swept twice or more."""
        record, policy = self.record, self.policy
        first = self.settled // self.chunk
        if not policy.exact:
            return None
        if self.budget is not None:
            if first < len(self.entered) and record.sweeps - self.entered[first] >= self.budget:
                return f"max_sweeps={self.budget} are over and c still changed by {record.residuals[-1]:.3g}"
            return None
        if not self.ratios or not change:
            return None
        # What lies ahead: sweeps until the window has converged, at worst one for each of its chunks.
        left = -(-(self.count - self.settled) // self.chunk)
        window, rate = min(left, policy.window or left), self.ratios[-1]
        sweeps: float = window
        if 0 < rate < 1 and self.floor:
            sweeps = min(window, max(1.0, math.log(self.floor / change) / math.log(rate)))
        cost = sweeps * self._steps(window - sweeps / 2) * left / window
        if cost <= left:
            return None
        return (f"at the observed rate {rate:.3g} the {sweeps:.0f} sweeps ahead cost about {cost:.0f} steps of the token loop, "
                f"which has {left} left")

    def _steps(self, chunks: float) -> float:
        """Cost of a sweep over some chunks in steps of the token loop, by the roofline."""
        run = self.jacobi.run
        ridge = self.policy.ridge or RIDGE.get(run.hidden.device.type, RIDGE_ELSEWHERE)
        rows = run.hidden.shape[0] * self.chunk
        return max(rows * chunks, ridge) / max(rows, ridge)


def _until(t: Tensor, count: int) -> Tensor:
    return t[:, :, :count]


def geometric_mean(ratios: Sequence[float]) -> float | None:
    """None of no ratios; 0 if one vanishes."""
    if not ratios:
        return None
    return math.exp(sum(map(math.log, ratios)) / len(ratios)) if all(r > 0 for r in ratios) else 0.0
