"""Change the program of a live model: other loop counts, other layer programs, per request.

A switch makes no parameters, copies no weights and captures nothing: captures are of the stock blocks, which every
program shares. Parameters keep their identity, so optimizer state and ``.grad`` survive. Programs are made once per spec
and remembered.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from depthpass.errors import SpecError
from depthpass.hf.blocks import check_blocks
from depthpass.hf.calls.host import depth_module
from depthpass.hf.checkpoints.save import own_class
from depthpass.hf.model import DepthModel
from depthpass.hf.modules.context import inner_model
from depthpass.hf.plans import Plans, Using
from depthpass.hf.switching.loops import loop_of
from depthpass.passes.base import Pass
from depthpass.plan import Plan

if TYPE_CHECKING:
    from depthpass.spec import SpecLike

Model = TypeVar("Model", bound=nn.Module)

_SAME: Any = object()


def switch(model: Model, spec: SpecLike, *, chunk: int | None = _SAME) -> Model:
    """Let a transformed model run another spec from now on; returns the model.

    Caches that were filled before are refused afterwards, unless the two specs make the same program; switching back is
    free. ``save_pretrained`` saves the spec in force.

    Args:
        model: a transformed model, inside a PEFT wrapper or not.
        spec: a pass, a list of passes, or their YAML/JSON form; ``Identity()`` for the stock model.
        chunk: chunks of serial regions, as in :func:`depthpass.transform`; left out = as before where that is legal.

    Raises:
        SpecError: the model is not transformed, or the spec needs new parameters that it does not have; nothing changed.
        PassError, LoweringError: the spec cannot be applied, or not be run; nothing changed.
    """
    inner = transformed(model, "switch")
    plans = inner._depth.plans
    _adopt(inner, plans, _plan(inner, plans, spec, chunk))
    return model


def using(model: nn.Module, spec: SpecLike, *, chunk: int | None = _SAME) -> AbstractContextManager[Plan]:
    """Let a transformed model run another spec inside a ``with`` block, in this thread or task only::

        with dp.using(model, dp.LayerProgram([0, 1, 1, 2])):
            model.generate(ids)

    Blocks nest, and threads that run one model with different specs at the same time do not see each other's. A thread
    that is *started* inside a block starts with the model's own spec: open the block in the thread that runs the model.

    Arguments and errors are those of :func:`switch`; nothing is changed when they are raised.
    """
    inner = transformed(model, "using")
    plans = inner._depth.plans
    return Using(plans, _plan(inner, plans, spec, chunk))


def set_loops(model: Model, times: int | Sequence[int] | str, *, scope: str | int | None = None) -> Model:
    """Change the loop count of a live transformed model; returns the model.

    Acts on the one pass of the spec that counts iterations: ``loop``, ``repeat``, ``parallel_loop``,
    ``intra_layer_recurrence``, ``mixture_of_recursions``, ``inner_thinking``. Nothing is captured again, parameters keep
    their identity, optimizers their state.

    Args:
        model: a transformed model, inside a PEFT wrapper or not.
        times: T, at least 1, or whatever else the pass takes there. For ``intra_layer_recurrence`` one count per visit, or
            one number for all of them.
        scope: which pass, when the spec has several: its ``scope``, its name, or its index in the spec (from 0).

    Raises:
        SpecError: the model is not transformed, its spec has no loop or several, the count is not possible, or its
            per-visit parameters (a LoRA for each iteration) do not exist; nothing has been changed.
    """
    inner = transformed(model, "set_loops")
    plans = inner._depth.plans
    passes = list(plans.current.passes)
    at = loop_of(passes, scope, "set_loops")
    passes[at] = passes[at].with_loops(times)
    _adopt(inner, plans, _plan(inner, plans, passes, _SAME))
    return model


def loops_of(model: nn.Module, *, scope: str | int | None = None) -> int | Sequence[int] | str:
    """The loop count in force: an int, or what the pass was given instead of one (a list of counts, or a formula in n).

    Args:
        model: a transformed model with a pass that loops.
        scope: which loop, where there are several, as for :func:`set_loops`.

    Raises:
        SpecError: as :func:`set_loops`.
    """
    loop = loop_pass(model, scope, "loops_of")
    return getattr(loop, str(loop.loop_field))


def loop_pass(model: nn.Module, scope: str | int | None, who: str) -> Pass:
    """The pass that counts iterations, of the spec in force."""
    passes = transformed(model, who)._depth.plans.current.passes
    return passes[loop_of(passes, scope, who)]


def _plan(inner: Any, plans: Plans, spec: SpecLike | Sequence[Pass], chunk: Any) -> Plan:
    plan = _of_chunk(inner, plans, spec, chunk)
    if plan is not plans.current:
        check_blocks(inner, plan)
    return plan


def _of_chunk(inner: Any, plans: Plans, spec: SpecLike | Sequence[Pass], chunk: Any) -> Plan:
    if chunk is not _SAME:
        return plans.of(inner, spec, chunk)
    before = plans.current.chunk
    if before is not None:
        # A chunk is a choice of speed: a program whose delays are shorter runs in its own largest chunks.
        try:
            return plans.of(inner, spec, before)
        except SpecError as error:
            if not str(error).startswith("chunk:"):
                raise
    return plans.of(inner, spec, None)


def _adopt(inner: Any, plans: Plans, wanted: Plan) -> None:
    if plans.borrowed:
        raise SpecError("a switch inside a dp.using block would end with it. Open another dp.using block instead.")
    plans.default = wanted
    inner.config.depthpass = inner._depth.config() | own_class(type(inner)._stock_class)
    parameters: Any = depth_module(inner)
    parameters.text = str(wanted.program)


def transformed(model: Any, who: str) -> Any:
    """The transformed model inside PEFT's and distributed wrappers.

    Raises:
        SpecError: there is none; ``who`` asks.
    """
    inner = inner_model(model)
    if isinstance(inner, DepthModel):
        return inner
    if isinstance(held := getattr(inner, "module", None), nn.Module):
        return transformed(held, who)
    raise SpecError(f"{who}: expected a transformed model, got a stock {type(inner).__name__}. Call dp.transform(model, spec) "
                    "first.")
