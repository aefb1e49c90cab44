"""The front end: a spec applied to a model's program, verified and scheduled, for everyone who asks what it means."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from depthpass.ir.program import Program, plain
from depthpass.ir.verify import Type, infer
from depthpass.passes.base import Context, Pass
from depthpass.passes.pipeline import OnPass, apply_spec
from depthpass.prompt import at_prompt
from depthpass.schedule.regions import Schedule, schedule
from depthpass.spec import SpecLike, dump_spec, load_spec, spec_hash


@at_prompt
@dataclass(frozen=True, eq=False)
class Plan:
    """A spec applied to one model.

    Attributes:
        key: hash of the spec and the chunk: equal for equal plans.
        passes, spec: the passes, and the same as plain data.
        program: what runs, verified; with loop counts that vary, what runs in evaluation (and at 1024 tokens).
        schedule: its regions.
        chunk: the chunk that was asked for; None = the largest legal one.
        stack: whether independent visits of one block run as one call when decoding.
        largest: the program whose new parameters serve every count that can occur.
        types: of every value.
        heads: taps by name: whether they are handed out as logits.
    """

    key: tuple[str, int | None]
    passes: tuple[Pass, ...]
    spec: dict
    program: Program
    schedule: Schedule
    chunk: int | None
    stack: bool
    largest: Program
    types: dict[str, Type] = field(init=False, repr=False)
    heads: dict[str, bool] = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "types", infer(self.program))
        object.__setattr__(self, "heads", {o["name"]: bool(o["head"]) for o in self.program.taps})

    def __reduce__(self):
        return Plan, (self.key, self.passes, self.spec, self.program, self.schedule, self.chunk, self.stack, self.largest)

    @cached_property
    def meaning(self) -> Program:
        """The program without provenance: equal for specs that make the same program."""
        return self.program.without_notes()

    @property
    def varies(self) -> frozenset[str]:
        """How loop counts vary: ``drawn`` for each call in training, or with the row's ``length``."""
        return frozenset(p.varies for p in self.passes if p.varies is not None)

    def config(self) -> dict:
        """The entry of a model's config that loads this plan again."""
        return {"spec": self.spec, **({} if self.chunk is None else {"chunk": self.chunk})}


def compile_spec(
    spec: SpecLike,
    context: Context,
    *,
    chunk: int | None = None,
    stack: bool = True,
    on_pass: OnPass | None = None,
) -> Plan:
    """Apply a spec to a model's program and schedule the result; touches no model and no weights.

    A plan may say more than can be run: :func:`depthpass.hf.plans.check_runnable` says what cannot be.

    Args:
        spec: a pass, a list of passes, or their YAML/JSON form.
        context: what passes may know of the model.
        chunk: run serial regions in smaller chunks than the largest legal one (same numbers).
        stack: run visits of one block that do not wait for each other as one call when decoding (same numbers).
        on_pass: called after each pass with the pass, the program before it and the program after it.

    Raises:
        SpecError, PassError: the spec cannot be applied, or the chunk is not legal.
    """
    passes = load_spec(spec)
    stock = plain(context.model, context.blocks, context.width)
    program = largest = apply_spec(stock, [p.settled() for p in passes], context, on_pass=on_pass)
    if any(p.varies for p in passes):
        largest = apply_spec(stock, [p.settled(most=True) for p in passes], context)
    key = (spec_hash(passes), chunk)
    return Plan(key, passes, dump_spec(passes), program, schedule(program, chunk, stack), chunk, stack, largest)
