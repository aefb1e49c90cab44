"""What is reported on: a model or config, read and captured once, with as many specs as wanted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from depthpass.errors import SpecError, UnsupportedModelError
from depthpass.ir import Program, parse_program, plain, verify
from depthpass.ir.shares import Ratios, by_route, checked_ratios
from depthpass.passes.base import Context
from depthpass.plan import compile_spec
from depthpass.prompt import at_prompt
from depthpass.report.report import Report, build_report
from depthpass.schedule import schedule

if TYPE_CHECKING:
    from torch import nn

    from depthpass.analysis.complexity import Statement
    from depthpass.analysis.cost import ModelCost
    from depthpass.analysis.roofline import Ceilings
    from depthpass.hf.facts import ModelFacts
    from depthpass.report.kept import Kept
    from depthpass.report.lengths import Lengths
    from depthpass.schedule.fixed_point import FixedPoint
    from depthpass.spec import SpecLike
    from depthpass.tasks.dags import TaskDAG


@at_prompt
@dataclass(frozen=True)
class Subject:
    """A stock model to report on.

    Attributes:
        stock: the model, on the meta device when it comes from a config; None for programs without a model.
        own: program, plan and chunk of a model that was given transformed; it takes no other spec.
        added: elements of that model's new parameters.
        fixed_point: how that model sweeps its serial regions; None = token loop.
        ratios: those that are set on it.
        origin: what the model is built from where it is not given.
        key: name under which its counts are kept between processes; None = not kept.
        kept: what was kept of it.
    """

    stock: nn.Module | None
    own: tuple[Program, dict[str, Any], int | None] | None = None
    added: int | None = None
    fixed_point: FixedPoint | None = None
    ratios: Mapping[str, float] = field(default_factory=dict)
    origin: Any = None
    key: str | None = None
    kept: Kept | None = None

    @classmethod
    def of(cls, source: Any) -> Subject:
        """Read a model or config; see :func:`depthpass.report.report` for the forms."""
        if source is None:
            return cls(None)
        from depthpass.hf.facts import stock_model

        if getattr(source, "depth_program", None) is None:
            return cls(stock_model(source))
        from depthpass.hf.calls.host import depth_module
        from depthpass.hf.modules.context import inner_model
        from depthpass.hf.modules.parameters import counted
        from depthpass.hf.transform import restore

        added = counted(depth_module(inner_model(source)))
        own = source.depth_program, source.depth_spec, source.depth_schedule.chunk
        return cls(stock_model(restore(source)), own, added, source._depth.fixed_point, dict(source._depth.ratios))

    @classmethod
    def of_config(cls, source: str, keep: bool = True) -> Subject:
        """The same for the path of a config or a hub id, keeping what is counted between processes; see :mod:`.kept`."""
        from depthpass.hf.facts import config_fields
        from depthpass.report import kept

        if not keep or not kept.usable():
            return cls.of(source)
        fields = config_fields(source)
        key = kept.key_of(fields) if isinstance(fields, Mapping) else None
        if key is None:
            return cls.of(source)
        return cls(None, origin=source, key=key, kept=kept.read(key))

    @property
    def nothing(self) -> bool:
        """Whether there is a program alone."""
        return self.stock is None and self.origin is None

    @cached_property
    def model(self) -> nn.Module | None:
        """The stock model, built when it is first needed; None for programs without one."""
        if self.stock is not None or self.origin is None:
            return self.stock
        from depthpass.hf.facts import stock_model

        return stock_model(self.origin)

    @cached_property
    def facts(self) -> ModelFacts | None:
        """Facts of the stock model."""
        if self.kept is not None:
            return self.kept.facts
        from depthpass.hf.facts import model_facts

        return None if self.model is None else model_facts(self.model)

    @cached_property
    def cost(self) -> ModelCost | None:
        """Cost of the stock model's parts; captures it on the meta device."""
        if self.kept is not None and self.kept.cost is not None:
            return self.kept.cost
        from depthpass.analysis.cost import model_cost

        cost = None if self.model is None else model_cost(self.model)
        if self.key is not None and self.facts is not None:
            from depthpass.report import kept

            kept.write(self.key, kept.Kept(self.facts, self.context, cost))
        return cost

    @cached_property
    def context(self) -> Context:
        """What passes may know of the stock model."""
        if self.kept is not None:
            return self.kept.context
        from depthpass.hf.modules.context import context_of

        if self.model is None:
            raise SpecError("report: expected a model or a config, got a program alone.")
        return context_of(self.model)

    def program(self, spec: SpecLike | None, program: Program | str | None) -> tuple[Program, dict[str, Any] | None]:
        """The program to report on, and its passes as plain data."""
        if spec is not None and program is not None:
            raise SpecError("program: expected a spec or a program, got both.")
        if self.own is not None:
            if spec is not None or program is not None:
                raise SpecError("spec: expected none, the model is already transformed and has its own. Report on the "
                                "stock model, dp.restore(model), to try another spec.")
            return self.own[0], self.own[1]
        if program is not None:
            return verify(parse_program(program) if isinstance(program, str) else program), None
        if self.nothing:
            raise SpecError("report: expected a model, a config or a program, got none of them.")
        if spec is None:
            return plain(self.context.model, self.context.blocks, self.context.width), None
        plan = compile_spec(spec, self.context)
        return plan.program, plan.spec

    def report(
        self,
        spec: SpecLike | None = None,
        *,
        program: Program | str | None = None,
        seq_len: int = 1024,
        batch: int = 1,
        chunk: int | None = None,
        cost: bool = True,
        ceilings: Ceilings | None = None,
        task: TaskDAG | None = None,
        ratios: Ratios | None = None,
    ) -> Report:
        """Report on one spec or program; arguments as for :func:`depthpass.report.report`."""
        for name, value in (("seq_len", seq_len), ("batch", batch)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise SpecError(f"{name}: expected an integer of at least 1, got {value!r}.")
        program, plan = self.program(spec, program)
        varying = None if plan is None or self.nothing else self._lengths(plan)
        if varying is not None:
            program = varying.at(seq_len)
        chunk = chunk if chunk is not None or self.own is None else self.own[2]
        regions, counted = schedule(program, chunk), None
        chosen = dict(self.ratios) if ratios is None else checked_ratios(program, ratios, expected=True)
        if cost and self.cost is not None:
            from depthpass.analysis.cost import cost as count

            counted = count(program, self.cost, chunk=chunk, capacities=by_route(program, chosen))
        precision = self.facts.dtype if self.facts is not None else "fixed"
        claims = proven(program, precision, 1 if varying is None else varying.loops)
        return build_report(
            program, regions, self.facts, seq_len, batch, counted, claims, spec=plan, ceilings=ceilings, task=task,
            lengths=varying, fixed_point=self.fixed_point, ratios=chosen, added=self._added(program, plan),
        )

    def _added(self, program: Program, plan: dict[str, Any] | None) -> int | None:
        """Elements of the new parameters: counted on a transformed model, else sized from the stock one; None = neither."""
        if self.added is not None or self.nothing:
            return self.added
        from depthpass.hf.modules.parameters import sizes

        largest = self._largest(program, plan)
        # Sizes of gates and of updates of stock matrices are the model's to tell.
        asks = self.kept is None or any(o["gate"] or o["lora"] for o in largest.visits)
        try:
            return sum(sizes(largest, self.model if asks else None).values())
        except UnsupportedModelError:
            # A model that has no such sizes is told so by transform; here they are left out, and the report says so.
            return None

    def _largest(self, program: Program, plan: dict[str, Any] | None) -> Program:
        """The program that a transform makes parameters for: that of the largest loop counts."""
        return program if plan is None else compile_spec(plan, self.context).largest

    def _lengths(self, plan: dict[str, Any]) -> Lengths | None:
        from depthpass.report.lengths import lengths
        from depthpass.spec import load_spec

        return lengths(load_spec(plan), lambda passes: compile_spec(passes, self.context).program)


def proven(program: Program, precision: str, loops: Any = 1) -> list[Statement]:
    """What is proven about programs of this kind.

    Args:
        loops: loop count in n; any constant is as good as 1.
    """
    from depthpass.analysis.complexity import complexity
    from depthpass.analysis.dependence import cycles
    from depthpass.ir import infer

    fed = {v for cycle in cycles(program) for v in cycle}
    delays = {o.name for o in program if o.kind == "delay"}
    routes = [o for o in program if o.kind == "route"]
    steps = program.denoise
    ranked = any(o["rule"] == "topk" and o["capacity"] < 1 for o in routes)
    return complexity(
        loops, max(t.pads for t in infer(program).values()), precision, delay_edges=bool(delays & fed), shifts=bool(delays - fed),
        token_routing="topk" if ranked else bool(routes),
        diffusion_steps=steps["steps"] if steps is not None and not program.ahead and not steps["carry"] else None,
    )
