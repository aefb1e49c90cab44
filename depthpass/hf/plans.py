"""Plans: what a transformed model runs, made once per spec; switching between them changes nothing else."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from depthpass.errors import SpecError
from depthpass.hf.parameters import build, check_scopes
from depthpass.ir.program import Program, plain
from depthpass.ir.verify import Type, infer
from depthpass.passes.base import Context, Pass
from depthpass.passes.pipeline import apply_spec
from depthpass.schedule.regions import Schedule, schedule
from depthpass.spec import dump_spec, load_spec, spec_hash

if TYPE_CHECKING:
    from depthpass.hf.inputs import Call

KEPT = 1024
"""Plans that a model remembers, the most recently used ones."""

_MAKING = threading.Lock()


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


def plan(spec, context: Context, chunk: int | None, stack: bool = True) -> Plan:
    """Apply a spec; everything that can fail happens here.

    Raises:
        SpecError, PassError: the spec cannot be applied.
        LoweringError: the program can be reported but not run yet.
    """
    from depthpass_lowering.supported import check_program

    passes = load_spec(spec)
    stock = plain(context.model, context.blocks, context.width)
    program = largest = apply_spec(stock, [p.settled() for p in passes], context)
    check_program(program)
    if any(p.varies for p in passes):
        largest = apply_spec(stock, [p.settled(most=True) for p in passes], context)
    check_scopes(largest)
    key = (spec_hash(passes), chunk)
    return Plan(key, passes, dump_spec(passes), program, schedule(program, chunk, stack), chunk, stack, largest)


def check_averages(plan: Plan) -> None:
    """Refuse a plan whose blocks start from averages: weights are made once, when a model is transformed.

    Raises:
        SpecError: naming the block.
    """
    for o in plan.program:
        if o.kind == "average":
            raise SpecError(f"block {o['index']} of this spec starts from an average of {list(o['blocks'])}, which only "
                            "dp.transform makes. Transform the stock model with it, or choose another init.")


class Plans:
    """The plans of one model: the one in force and those it remembers.

    Attributes:
        home: the plan whose new parameters the model has.
        default: the plan in force outside of every ``using`` block.
        kept: remembered plans by key, least recently used first.
    """

    def __init__(self, home: Plan):
        self.home = self.default = home
        self.kept: OrderedDict[tuple, Plan] = OrderedDict({home.key: home})

    @property
    def current(self) -> Plan:
        """The plan in force here: that of the innermost ``using`` block of this thread or task, or the default."""
        return _using.get().get(id(self), self.default)

    @property
    def borrowed(self) -> bool:
        """Whether a ``using`` block is open here."""
        return id(self) in _using.get()

    def of(self, model: nn.Module, spec, chunk: int | None) -> Plan:
        """The plan of a spec, remembered or made now.

        Raises:
            SpecError: the spec needs new parameters that the model does not have, or of other shapes.
            SpecError, PassError, LoweringError: as :func:`plan`.
        """
        from depthpass.hf.transform import context_of

        key = (spec_hash(spec), chunk)
        with _MAKING:
            found = self.kept.get(key)
            if found is None:
                found = plan(spec, context_of(model), chunk, self.home.stack)
                check_parameters(model, found)
                check_averages(found)
                self.kept[key] = found
                while len(self.kept) > KEPT:
                    self.kept.popitem(last=False)
            self.kept.move_to_end(key)
        return found


    def running(self, model: nn.Module, call: Call) -> list[tuple[Plan, torch.Tensor | None]]:
        """What a call runs: one plan for all rows, or one for each group of rows (by index) of equal loop counts.

        The sequences of packed rows count as rows.

        A count that is drawn is drawn once per call, for all rows.
        """
        now = self.current
        if not now.varies:
            return [(now, None)]
        drawn = [p.settled(drawn=model.training) if p.varies == "drawn" else p for p in now.passes]
        if "length" not in now.varies:
            return [(self.of(model, drawn, now.chunk), None)]
        tokens = call.tensors["input_ids" if "input_ids" in call.tensors else "inputs_embeds"]
        columns = call.past + tokens.shape[1]
        if call.packing is not None:
            counts = call.packing.tokens
        else:
            counts = [columns] * len(tokens) if call.valid is None else call.valid.sum(-1).tolist()
        groups: dict[Plan, list[int]] = {}
        for row, n in enumerate(counts):
            passes = [p.settled(tokens=n) for p in drawn]
            groups.setdefault(self.of(model, passes, now.chunk), []).append(row)
        if len(groups) == 1:
            return [(next(iter(groups)), None)]
        return [(made, torch.tensor(rows, device=tokens.device)) for made, rows in groups.items()]


_using: ContextVar[Mapping[int, Plan]] = ContextVar("depthpass_using", default=MappingProxyType({}))
"""Plans in force by id of :class:`Plans`, in this thread or task only; never changed in place."""


class Using:
    """Puts a plan in force for one thread or task, and takes it back."""

    def __init__(self, plans: Plans, wanted: Plan):
        self.plans, self.wanted = plans, wanted  # kept alive: their ids are keys

    def __enter__(self) -> Plan:
        self.token = _using.set({**_using.get(), id(self.plans): self.wanted})
        return self.wanted

    def __exit__(self, *error) -> None:
        _using.reset(self.token)


def sizes(model: nn.Module, program: Program) -> dict[str, torch.Size]:
    """Names and shapes of the new parameters that a program needs."""
    like = torch.empty((), device="meta", dtype=next(model.parameters()).dtype)
    return {k: t.shape for k, t in build(program, like, model).state_dict().items()}


def check_parameters(model: Any, wanted: Plan) -> None:
    """Refuse a plan whose new parameters a transformed model does not have.

    Raises:
        SpecError: naming them.
    """
    from depthpass.hf.host import depth_module

    held = {k: t.shape for k, t in depth_module(model).state_dict().items()}
    needed = sizes(model, wanted.largest)
    lacking = [k for k, shape in needed.items() if held.get(k) != shape]
    if lacking:
        more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
        raise SpecError(
            f"this program needs the new parameters {', '.join(lacking[:3])}{more}, which the model was made without (or "
            f"with other shapes). It was made with {_short(model._depth.plans.home)}. Switching makes no parameters: "
            "transform the stock model, dp.restore(model), with the spec that needs most of them, and switch down from there."
        )


def _short(made: Plan) -> str:
    return "; ".join(p.label for p in made.passes)
