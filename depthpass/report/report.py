"""The report: one immutable object that every rendering is made from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from depthpass.analysis.depth import Depth, depth
from depthpass.errors import SpecError
from depthpass.ir.program import Program, reads_slots, writes_slot
from depthpass.ir.verify import Type, infer, parameters
from depthpass.lowered import LoweredProgram, lower
from depthpass.report.critical import Segment, segments
from depthpass.report.numbers import Number, Section
from depthpass.schedule.regions import Region, Schedule

if TYPE_CHECKING:
    import sympy

    from depthpass.analysis.complexity import Statement
    from depthpass.analysis.cost import Cost
    from depthpass.analysis.roofline import Ceilings
    from depthpass.hf.facts import ModelFacts
    from depthpass.report.lengths import Lengths
    from depthpass.schedule.fixed_point import FixedPoint
    from depthpass.tasks.dags import Sufficiency, TaskDAG

PATH_STEPS = 2000
"""Visits of the critical path that a report keeps, counted from its end."""


@dataclass(frozen=True, repr=False)
class Report:
    """What a program computes, how deep it is, how it is scheduled and what it keeps, at ``seq_len`` and ``batch``.

    ``print`` shows a summary of six numbers; :meth:`to_text`, :meth:`to_markdown`, :meth:`to_html` and :meth:`to_json` show
    all :attr:`sections`, :meth:`to_dot` the graph.

    Attributes:
        program: the rewritten program; ``str(program)`` is its text.
        schedule: regions and chunk.
        depths: depth of the output (name None) and of each tap.
        seq_len: n, real tokens of each row.
        batch: rows.
        facts: facts of the stock model; None for a program alone.
        spec: the passes that made the program, as plain data; None when not known.
        cost: cost analysis; None when it was not asked for.
        complexity: what is proven about programs like this one; None when it was not asked for.
        ceilings: of the machine that times are bounded for; None = no times.
        task: a computation held against the depth at n; None when it was not asked for.
        lengths: how loop counts vary; None when all are fixed. The program is the one at ``seq_len``, in evaluation.
        ratios: shares of tokens by route label that stand in place of the program's own.
        added: elements of all new parameters, counted on the model or sized from its config; None where neither could
            be done.
    """

    program: Program
    schedule: Schedule
    depths: Mapping[str | None, Depth]
    seq_len: int
    batch: int
    facts: ModelFacts | None = None
    spec: Mapping[str, Any] | None = None
    cost: Cost | None = None
    complexity: tuple[Statement, ...] | None = None
    ceilings: Ceilings | None = None
    task: TaskDAG | None = None
    lengths: Lengths | None = None
    fixed_point: FixedPoint | None = None
    ratios: Mapping[str, float] = field(default_factory=dict)
    added: int | None = None

    @property
    def model(self) -> str:
        """Class name of the stock model."""
        return self.program.model

    @property
    def depth(self) -> sympy.Expr:
        """Depth of the final output in block visits, closed form in n.

        Where the loop count follows n and the depth is not affine in it: the form at the loop count of ``seq_len``.
        """
        formula = None if self.lengths is None else self.lengths.formula
        return self.depths[None].formula if formula is None else formula

    def depth_at(self, n: int) -> int:
        """Depth of the final output for a row of n tokens, in block visits."""
        return self.depths[None].at(n) if self.lengths is None else self.lengths.depth_at(n)

    @property
    def visits(self) -> int:
        """Block visits of the program per token."""
        return len(self.program.visits)

    @cached_property
    def lowered(self) -> LoweredProgram:
        """What a training call runs, as far as the program alone decides it; a model's ``depth_lowered`` says what ran."""
        return lower(self.schedule)

    @property
    def serial_blocks(self) -> int:
        """Visits that lie on a delay cycle and run chunk by chunk; of a split one its feed-forward network decides."""
        return self.schedule.serial_visits

    @property
    def chunk(self) -> int | None:
        """Tokens that a serial region runs together; None when nothing is serial."""
        return self.schedule.chunk

    @property
    def recursions(self) -> int:
        """How often the row runs through one block, one time after another; 1 in a stock model.

        What the papers count: ceil(n / group) of TurboConn, the iterations of a loop, the recursions of MoR, the steps of
        ITT. Of several blocks the largest number; in a token loop every visit counts once per step.
        """
        return max(self._passes.values(), default=1)

    @property
    def most_run_block(self) -> int | None:
        """The first of the blocks that :attr:`recursions` counts; None when no block runs."""
        return min(self._passes, key=lambda b: (-self._passes[b], b), default=None)

    @property
    def token_steps(self) -> int:
        """Steps of the longest token loop: ceil(n / chunk), pads included; 1 when nothing is serial."""
        return max((self._steps(r) for r in self.schedule.regions), default=1)

    @cached_property
    def _passes(self) -> dict[int, int]:
        """Calls of each block over the whole row."""
        passes: dict[int, int] = {}
        for r in self.schedule.regions:
            for o in r.counted:
                passes[o["index"]] = passes.get(o["index"], 0) + self._steps(r)
        return passes

    @property
    def serial_block_calls(self) -> int:
        """Block calls one after another for the whole row, every chunk of a serial region counted."""
        return sum(len(r.counted) * self._steps(r) for r in self.schedule.regions)

    @cached_property
    def types(self) -> dict[str, Type]:
        """Type of every value."""
        return infer(self.program)

    @property
    def serial_pads(self) -> int:
        """Pad tokens that a token loop runs over besides the real ones."""
        loops = self.schedule.serial_regions
        return max((self.types[o.name].pads for r in loops for o in r.ops if o.name), default=0)

    def _steps(self, region: Region) -> int:
        latents = self.program.latents
        if region.chunk is None:
            return 1 + latents
        pads = max(self.types[o.name].pads for o in region.ops if o.name) - latents
        return latents - (-(self.seq_len + pads) // region.chunk)

    @cached_property
    def new_parameters(self) -> int:
        """Elements of the parameters that passes added; at least so many where :attr:`unsized_parameters` names more."""
        if self.added is not None:
            return self.added
        return sum(math.prod(p.shape) for p in parameters(self.program).values() if p.trained)

    @property
    def unsized_parameters(self) -> tuple[str, ...]:
        """Names of gates and per-visit LoRA that could not be sized: without a model or config nothing says how large."""
        keys = () if self.added is not None else ("gate", "lora")
        return tuple(dict.fromkeys(o[k] for o in self.program.visits for k in keys if o[k] is not None))

    @cached_property
    def delay_lines(self) -> dict[str, tuple[int, int]]:
        """Delayed streams: name to (tokens kept, width). Delays of one stream share one line."""
        lines: dict[str, tuple[int, int]] = {}
        for o in self.program.ops:
            if o.kind == "delay":
                tokens, width = lines.get(o.args[0], (0, self.types[o.args[0]].width))
                lines[o.args[0]] = max(tokens, o["tokens"]), width
        return lines

    @property
    def delay_line_values(self) -> int:
        """Values that all delay lines hold, for one row."""
        return sum(tokens * width for tokens, width in self.delay_lines.values())

    @cached_property
    def slot_tokens(self) -> dict[int, int]:
        """Tokens that each slot keeps at n: all, or the widest window when every reader looks through one."""
        written = {writes_slot(o): self.seq_len + self.types[o.name].pads for o in self.program.visits}
        kept: dict[int, int] = {}
        for o in self.program.visits:
            for slot in reads_slots(o):
                windowed = o["gate"] is not None and slot == o["slot"]
                tokens = min(written[slot], o["window"]) if windowed else written[slot]
                kept[slot] = max(kept.get(slot, 0), tokens)
        return {s: t for s, t in kept.items() if s in self.program.slots}

    @cached_property
    def kv_bytes(self) -> int | None:
        """Bytes of all KV slots at n for the whole batch; None when the model's head facts are not known."""
        if self.cost is not None:
            return int(self.cost.at("KV bytes", self.seq_len, self.batch))
        if self.facts is None or self.facts.kv_widths is None:
            return None
        widths, size = self.facts.kv_widths, self.facts.itemsize
        writers = {writes_slot(o): o["index"] for o in self.program.visits}
        return self.batch * size * sum(t * widths[writers[s]] for s, t in self.slot_tokens.items())

    @cached_property
    def critical_path(self) -> tuple[Segment, ...]:
        """The end of one longest path at n, at most ``PATH_STEPS`` visits, token by token."""
        return segments(self.depths[None].critical_path(self.seq_len, last=PATH_STEPS))

    @property
    def path_is_whole(self) -> bool:
        """Whether :attr:`critical_path` starts at the path's beginning."""
        return sum(len(s.visits) for s in self.critical_path) == self.depth_at(self.seq_len)

    @cached_property
    def sufficiency(self) -> Sufficiency | None:
        """Whether the depth and the tokens at n cover the task's DAG; None without a task."""
        if self.task is None:
            return None
        from depthpass.tasks.dags import sufficient

        pads = max(t.pads for t in self.types.values())
        return sufficient(self.task, self.depth_at(self.seq_len), tokens=self.seq_len + pads)

    @cached_property
    def sections(self) -> tuple[Section, ...]:
        """Every number of the report, with unit and note, in the order in which it is shown."""
        from depthpass.report.sections import sections

        return sections(self)

    def number(self, key: str) -> Number:
        """A number by its JSON key, e.g. ``depth_at_n``."""
        return next(x for s in self.sections for x in s.numbers if x.key == key)

    @cached_property
    def not_counted(self) -> tuple[str, ...]:
        """What the numbers leave out."""
        from depthpass.report.sections import not_counted

        return not_counted(self)

    def __str__(self) -> str:
        from depthpass.report.text import to_summary

        return to_summary(self)

    __repr__ = __str__

    def to_text(self) -> str:
        """Every number in plain text, the summary first."""
        from depthpass.report.text import to_text

        return to_text(self)

    def __rich__(self) -> object:
        from depthpass.report.terminal import summary

        return summary(self)

    def to_rich(self) -> object:
        """Every number for a terminal, as a renderable of rich."""
        from depthpass.report.terminal import to_rich

        return to_rich(self)

    def _repr_html_(self) -> str:
        from depthpass.report.html import to_fragment

        return to_fragment(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain data with a versioned schema; see ``docs/report.md``."""
        from depthpass.report.data import to_dict

        return to_dict(self)

    def to_json(self, indent: int | None = 2) -> str:
        """:meth:`to_dict` as JSON text."""
        import json

        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    def to_markdown(self) -> str:
        """Markdown with tables and the program text."""
        from depthpass.report.text import to_markdown

        return to_markdown(self)

    def to_dot(self) -> str:
        """The program as a Graphviz graph: delays dashed, serial regions boxed, the critical path bold."""
        from depthpass.report.dot import to_dot

        return to_dot(self)

    def to_html(self) -> str:
        """One self-contained HTML page with a picture of the program, tables and charts; needs no network."""
        from depthpass.report.html import to_page

        return to_page(self)


def build_report(
    program: Program,
    schedule: Schedule,
    facts: ModelFacts | None,
    seq_len: int,
    batch: int,
    cost: Cost | None = None,
    complexity: Sequence[Statement] | None = None,
    *,
    spec: Mapping[str, Any] | None = None,
    ceilings: Ceilings | None = None,
    task: TaskDAG | None = None,
    lengths: Lengths | None = None,
    fixed_point: FixedPoint | None = None,
    ratios: Mapping[str, float] | None = None,
    added: int | None = None,
) -> Report:
    """Analyse a program and collect the results.

    Args:
        program: a verified program.
        schedule: its schedule.
        facts: facts of the stock model, or None for a program alone.
        seq_len: n, real tokens of each row.
        batch: rows.
        cost, complexity: optional sections, analysed by the caller.
        spec: the passes that made the program, as plain data.
        ceilings: of a machine, for lower bounds of times; needs ``cost``.
        task: a computation to hold against the depth.
        lengths: how loop counts vary, for a spec in which they do.
        fixed_point: how serial regions are swept; None = token loop.
        ratios: shares of tokens by route label, as ``cost`` was counted with.
        added: elements of all new parameters, when the caller knows them.

    Raises:
        SpecError: a length or batch below 1, or facts of another model.
        PassError: no closed form of the depth exists; see :func:`depthpass.analysis.depth.depth`.
    """
    for name, value in (("seq_len", seq_len), ("batch", batch)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise SpecError(f"{name}: expected an integer of at least 1, got {value!r}.")
    if facts is not None and (facts.blocks, facts.width) != (program.blocks, program.width):
        raise SpecError(
            f"report: the program is for {program.blocks} blocks of width {program.width}, the model has "
            f"{facts.blocks} of width {facts.width}. Build the program for this model."
        )
    if ceilings is not None and cost is None:
        raise SpecError("ceilings: times need the cost analysis; leave ceilings out or ask for cost.")
    outputs = [None, *(o["name"] for o in program.taps)]
    depths = {name: depth(program, name) for name in outputs}
    proven = None if complexity is None else tuple(complexity)
    return Report(
        program, schedule, depths, seq_len, batch, facts, spec, cost, proven, ceilings, task, lengths, fixed_point, ratios or {},
        added,
    )
