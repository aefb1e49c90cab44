"""Plans: what a transformed model runs, made once per spec; switching between them changes nothing else."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from depthpass.errors import SpecError
from depthpass.hf.calls.host import depth_module
from depthpass.hf.modules.context import context_of
from depthpass.hf.modules.parameters import build, check_scopes
from depthpass.ir.program import Program
from depthpass.passes.base import Pass
from depthpass.plan import Plan, compile_spec
from depthpass.spec import SpecLike, spec_hash

if TYPE_CHECKING:
    from depthpass.hf.calls.inputs import Call

KEPT = 1024
"""Plans that a model remembers, the most recently used ones."""

_MAKING = threading.Lock()


def check_runnable(plan: Plan) -> Plan:
    """Refuse a plan that can be reported but not run; returns it.

    Raises:
        SpecError: new parameters have names that no module can have.
        LoweringError: the program has an op that nothing runs yet.
    """
    from depthpass_lowering.supported import check_program

    check_program(plan.program)
    check_scopes(plan.largest)
    return plan


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

    def of(self, model: nn.Module, spec: SpecLike | Sequence[Pass], chunk: int | None) -> Plan:
        """The plan of a spec, remembered or made now.

        Raises:
            SpecError: the spec needs new parameters that the model does not have, or of other shapes.
            SpecError, PassError, LoweringError: as :func:`~depthpass.plan.compile_spec` and :func:`check_runnable`.
        """
        key = (spec_hash(spec), chunk)
        with _MAKING:
            plan = self.kept.get(key)
            if plan is None:
                plan = check_runnable(compile_spec(spec, context_of(model), chunk=chunk, stack=self.home.stack))
                check_parameters(model, plan)
                check_averages(plan)
                self.kept[key] = plan
                while len(self.kept) > KEPT:
                    self.kept.popitem(last=False)
            self.kept.move_to_end(key)
        return plan

    def running(self, model: nn.Module, call: Call) -> list[tuple[Plan, torch.Tensor | None]]:
        """What a call runs: one plan for all rows, or one for each group of rows (by index) of equal loop counts.

        The sequences of packed rows count as rows.

        A count that is drawn is drawn once per call, for all rows.
        """
        current = self.current
        if not current.varies:
            return [(current, None)]
        drawn = [p.settled(drawn=model.training) if p.varies == "drawn" else p for p in current.passes]
        if "length" not in current.varies:
            return [(self.of(model, drawn, current.chunk), None)]
        tokens = call.tensors["input_ids" if "input_ids" in call.tensors else "inputs_embeds"]
        columns = call.past + tokens.shape[1]
        if call.packing is not None:
            counts = call.packing.tokens
        else:
            counts = [columns] * len(tokens) if call.valid is None else call.valid.sum(-1).tolist()
        groups: dict[Plan, list[int]] = {}
        for row, n in enumerate(counts):
            passes = [p.settled(tokens=n) for p in drawn]
            groups.setdefault(self.of(model, passes, current.chunk), []).append(row)
        if len(groups) == 1:
            return [(next(iter(groups)), None)]
        return [(plan, torch.tensor(rows, device=tokens.device)) for plan, rows in groups.items()]


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


def _short(plan: Plan) -> str:
    return "; ".join(p.label for p in plan.passes)
