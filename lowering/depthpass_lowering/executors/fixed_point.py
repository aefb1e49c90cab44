"""The fixed-point schedule: serial regions by sweeps, in training with the adjoint of the fixed point.

Gradient of c = Phi(c): the sweeps run without a graph, one more sweep records it, and the backward pass repeats
``lam <- v + J^T lam`` with J the Jacobian of that sweep (arXiv 1909.01377). A chunk influences later chunks only, so lam is
exact after as many sweeps as chunks. Memory is that of one plain forward pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from depthpass.errors import LoweringError
from depthpass.ir.definitions import SWEEP
from depthpass.ir.ops import unfit
from depthpass.ir.program import reads_slots, writes_slot
from depthpass.lowered.program import LoweredRegion
from depthpass.schedule.fixed_point import FixedPoint
from depthpass.schedule.regions import Region
from depthpass_lowering.executors.base import Executor
from depthpass_lowering.executors.dropout import draws
from depthpass_lowering.executors.eager import Run
from depthpass_lowering.executors.first_order import first_order
from depthpass_lowering.executors.stand_ins import LeafHost, region_parameters
from depthpass_lowering.executors.sweeps import JacobiSweep, Solve, Solver
from depthpass_lowering.executors.transforms import unschedulable
from depthpass_lowering.state.slots import Slot, Span

SWEEPS = "sweeps"


class JacobiSchedule:
    """The fixed-point schedule of one call: the policy, and what came of it, region by region."""

    def __init__(self, policy: FixedPoint):
        self.policy = policy
        self.solves: list[Solve] = []

    def on(self, inner: Executor) -> Executor:
        """What sweeps serial regions and leaves everything else to another executor."""
        return JacobiExecutor(self.policy, self.solves, inner)


class JacobiExecutor(Executor):
    """Serial regions by sweeps; what cannot be swept is an error.

    Args:
        policy: when a sweep is the last one.
        solves: gets what came of every region.
        inner: runs what is left to the token loop.
    """

    def __init__(self, policy: FixedPoint, solves: list, inner: Executor):
        self.policy, self.solves, self.inner = policy, solves, inner
        self.name = inner.name

    def level(self, run: Run, region: Region) -> tuple[str, str | None]:
        # One chunk has nothing to wait for: decoding is sequential.
        if run.context.count <= region.size or (self.policy.window == 1 and self.policy.exact):
            return self.inner.level(run, region)
        if reason := unswept(run, region):
            raise LoweringError(f"schedule 'fixed_point' cannot run this call: {reason}. Use schedule='sequential'.")
        return SWEEPS, None

    def region(self, run: Run, region: LoweredRegion) -> dict[str, Tensor]:
        if region.level != SWEEPS:
            return self.inner.region(run, region)
        inputs = run.streams(region)
        jacobi = JacobiSweep(run, region)
        if torch.is_grad_enabled():
            return self._trained(jacobi, inputs)
        solver = Solver(jacobi, self.policy)
        self.solves.append(solver.record)
        done = solver.solve(inputs, run.state)
        pieces = {n: solver.pieces[n] for n in region.outputs}
        if not done:
            rest = self._rest(run, inputs, solver.settled, region)
            pieces = {n: [*parts, rest[n]] for n, parts in pieces.items()}
        return {n: parts[0] if len(parts) == 1 else torch.cat(parts, 1) for n, parts in pieces.items()}

    def sequential(self, run: Run, region: LoweredRegion) -> dict[str, Tensor]:
        """The region in the token loop of the other executor."""
        level, reason = self.inner.level(run, region.scheduled)
        return self.inner.region(run, replace(region, level=level, reason=reason))

    def _rest(self, run: Run, inputs: Mapping[str, Tensor], settled: int, region: LoweredRegion) -> dict[str, Tensor]:
        """Run the tokens that sweeps have not settled in the token loop."""
        left = run.context.count - settled
        rest = Run(replace(run.context, **run.context.narrowed(settled, left)), run.state, self.inner)
        rest.factors, rest.record = run.factors, run.record
        rest.env = {n: x.narrow(1, settled, left) for n, x in inputs.items()}
        return self.sequential(rest, region)

    def _trained(self, jacobi: JacobiSweep, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Solve without a graph, then one sweep with one."""
        policy, run, region = self.policy, jacobi.run, jacobi.region
        span = jacobi.span(0, run.context.count)
        with torch.no_grad():
            # The recording sweeps are the last ones.
            recorded = policy.backward or 1
            budget = None if policy.exact else (policy.max_sweeps or 1) - recorded
            solver = Solver(jacobi, policy, budget)
            self.solves.append(solver.record)
            inner = jacobi.inner(run.state.fork())
            sources = None
            if budget == 0:
                c = jacobi.first(inner, span)
            elif solver.solve(inputs, run.state.fork()):
                sources = {s: torch.cat(solver.pieces[s], 1) for s in jacobi.sources}
                c = jacobi.inject(inner, sources, span)
            else:
                solver.record.sequential = solver.record.chunks
                c = None
        if torch.is_autocast_enabled(run.hidden.device.type):
            # What was cast without a graph must not be used with one.
            torch.clear_autocast_cache()
        if c is None:
            return self.sequential(run, region)
        solver.record.sweeps += recorded
        solver.record.rows += recorded * run.context.batch * run.context.count
        job = _Job(jacobi, inputs, c, solver, _handed_on(run, region), policy)
        job.constant = sources if policy.backward else None
        outs = _RegionFunction.apply(job, *job.outer)
        return job.take(run, outs)


def _handed_on(run: Run, region: LoweredRegion) -> tuple[int, ...]:
    """Slots of a region that a later call or another region reads."""
    own = {o.writes for o in region.ops if o.writes is not None}
    if run.context.keep:
        return tuple(sorted(own))
    here = {o.name for o in region.visits}
    outside = {s for o in run.program.visits if o.name not in here for s in reads_slots(o)}
    return tuple(sorted(own & outside))


def unswept(run: Run, region: Region) -> str | None:
    """Why a region cannot be swept in this call, or None."""
    # A route would choose other tokens in every sweep.
    if reason := unschedulable(run.hidden) or unfit(region.ops, SWEEP):
        return reason
    if routed := next((a for o in region.ops for a in (*o.args, o.name) if run.types[a].tokens), None):
        return f"%{routed} in a serial region holds routed tokens"
    for o in region.calls:
        if draws(run.host, o["index"]):
            return f"block {o['index']} has dropout switched on, so that no two sweeps are the same"
        if torch.is_grad_enabled() and (reason := run.host.refuses_schedule(o["index"])):
            return reason
        if torch.is_grad_enabled() and run.host.recomputes(o["index"]):
            return "gradient checkpointing is on"
    return None


class _Job:
    """The recorded sweeps of a region: which tensors from outside they read, and what they hand out.

    Attributes:
        constant: what the delays of the first recorded sweep read, through which no gradient flows; None = its c is given.
    """

    constant: Mapping[str, Tensor] | None = None

    def __init__(self, jacobi: JacobiSweep, inputs: dict[str, Tensor], c: dict[str, Tensor], solver: Solver,
                 handed_on: Sequence[int], policy: FixedPoint):
        self.jacobi, self.inputs, self.c, self.handed_on, self.policy = jacobi, inputs, c, handed_on, policy
        self.tol, self.record = solver.tol(c), solver.record
        run = jacobi.run
        self.state = run.state
        slots = {s for o in jacobi.region.visits for s in (*reads_slots(o), writes_slot(o))}
        read = [*inputs.values(), *region_parameters(jacobi.region, run.host).values(), *run.context.side_inputs]
        read += [t for s in slots if s in run.state.slots for side in _sides(run.state.slots[s]) for t in side]
        read += [run.state.lines[d.name] for d in jacobi.region.lines if d.name in run.state.lines]
        self.outer = list({id(t): t for t in read if t.requires_grad}.values())

    def sweep(self, leaves: dict[int, Tensor]):
        """Run the recorded sweeps on detached stand-ins: (outputs, c of the first one, c anew)."""

        def leaf(t: Tensor) -> Tensor:
            return leaves.get(id(t), t)

        jacobi, run = self.jacobi, self.jacobi.run
        host, side_inputs = LeafHost(run.host, leaf), tuple(map(leaf, run.context.side_inputs))
        inputs, span = {n: leaf(x) for n, x in self.inputs.items()}, jacobi.span(0, run.context.count)
        first = after = {n: x.detach().requires_grad_() for n, x in self.c.items()}
        for number in range(self.policy.backward or 1):
            state = self.state.fork()
            state.slots = {k: s.map(leaf) for k, s in state.slots.items()}
            state.lines = {k: leaf(t) for k, t in state.lines.items()}
            inner = jacobi.inner(state, host, side_inputs)
            if number == 0:
                before = first if self.constant is None else jacobi.inject(inner, self.constant, span)
            else:
                before = after
            local = jacobi.sweep(inner, inputs, before, self.reading(span, number))
            sources = {s: local[s] for s in jacobi.sources}
            after = jacobi.inject(inner, sources, span)
        # With the sources, not only with c: a delay line handed on has a gradient of its own.
        outs = [local[n] for n in jacobi.region.outputs]
        if run.context.keep:
            outs += jacobi.push(inner, sources, span).values()
        for o in jacobi.region.visits:
            if (ring := run.ring(o)) is not None:
                state.slots[o["slot"]] = state.slots[o["slot"]].last(ring)
        outs += [t for s in self.handed_on for side in _sides(state.slots[s]) for t in side]
        self.firsts = [state.slots[s].first for s in self.handed_on]
        if not self.policy.exact:
            was = {n: x.detach() for n, x in before.items()}
            self.record.residuals.append(max(jacobi.changes(was, {n: x.detach() for n, x in after.items()}, span)))
            self.record.converged = self.record.residuals[-1] <= self.tol
        return outs, list(first.values()), list(after.values())

    def reading(self, whole: Span, number: int) -> Span:
        """The span as a recorded sweep reads it: as the plain model where it is the first sweep of all."""
        policy = self.policy
        first = number == 0 and not policy.exact and (policy.backward or 1) == policy.max_sweeps
        return self.jacobi.plain(whole) if first and policy.start == "plain" else whole

    def take(self, run: Run, outs: Sequence[Tensor]) -> dict[str, Tensor]:
        """Put lines and slots where the run keeps them; the streams that the region hands out."""
        rest, region = iter(outs), self.jacobi.region
        streams = {n: next(rest) for n in region.outputs}
        if run.context.keep:
            run.state.lines |= {d.name: next(rest) for d in region.lines}
        for number, first in zip(self.handed_on, self.firsts):
            sites = next(run.host.sites_of(o["index"]) for o in region.visits if writes_slot(o) == number)
            keys = tuple(next(rest) for _ in sites)
            run.state.slots[number] = Slot(keys, tuple(next(rest) for _ in sites), first=first)
        return streams


class _RegionFunction(torch.autograd.Function):
    """A whole serial region as one node of the outer graph, so that hooks on parameters fire once, with the total."""

    @staticmethod
    def forward(ctx, job: _Job, *outer: Tensor):
        leaves = [t.detach().requires_grad_() for t in outer]
        with torch.enable_grad():
            outs, c, after = job.sweep({id(t): leaf for t, leaf in zip(outer, leaves)})
        # The job knows the run, and the run will hold this node's outputs: keeping it would be a cycle.
        limit = job.record.chunks - 1 if job.policy.exact else min(job.policy.max_sweeps or 1, job.record.chunks) - 1
        if job.policy.backward is not None:  # what enters the recorded sweeps is a constant
            limit = 0
        ctx.graph, ctx.limit, ctx.tol, ctx.record = (outs, c, after, leaves), limit, job.tol, job.record
        ctx.cut = job.policy.backward
        ctx.set_materialize_grads(False)
        return tuple(o.detach() for o in outs)

    @staticmethod
    @first_order
    def backward(ctx, *grads):
        if ctx.graph is None:
            raise RuntimeError("backward through a swept region a second time: its activations are freed. Run forward again, or "
                               "use schedule='sequential' with lowering='eager' and retain_graph=True.")
        (outs, c, after, leaves), ctx.graph = ctx.graph, None
        pairs = [(o, g) for o, g in zip(outs, grads) if g is not None and o.requires_grad]
        if not pairs:
            return (None,) * (1 + len(leaves))
        results, cotangents = [o for o, _ in pairs], [g for _, g in pairs]
        lam, ctx.record.adjoint = [] if ctx.cut else _vjp(results, c, cotangents), ctx.cut or 1
        for _ in range(ctx.limit):
            # All of it anew rather than the next term of the sum: models round inside their blocks (norms in float32), and
            # a chunk whose lam is settled then has the very bits that the token loop's backward pass has.
            last, lam = lam, _vjp([*results, *after], c, [*cotangents, *lam])
            ctx.record.adjoint += 1
            if all(float((x - y).norm()) <= ctx.tol * float(x.norm()) for x, y in zip(lam, last)):
                break
        recorded = [] if ctx.cut else [(x, a) for x, a in zip(after, lam) if x.requires_grad]
        gradients = torch.autograd.grad(
            [*results, *(x for x, _ in recorded)], leaves, [*cotangents, *(a for _, a in recorded)], allow_unused=True
        )
        return None, *gradients


def _vjp(outs: list[Tensor], inputs: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    pairs = [(o, g) for o, g in zip(outs, grads) if o.requires_grad]
    products = torch.autograd.grad([o for o, _ in pairs], inputs, [g for _, g in pairs], retain_graph=True, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, products)]


def _sides(slot: Slot) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    return slot.keys, slot.values
