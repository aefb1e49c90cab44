"""``attach``: put the new parameters of a spec on a stock model, for the ``torch.compile`` backend to use."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from depthpass.errors import SpecError
from depthpass.hf.model import DepthModel
from depthpass.hf.modules.context import in_force, inner_model
from depthpass.hf.modules.parameters import build
from depthpass.hf.prepare import prepare
from depthpass.hf.runtime import PREFIX
from depthpass.ir.program import Program
from depthpass.passes.base import Pass
from depthpass.spec import dump_spec, load_spec, spec_hash

if TYPE_CHECKING:
    from depthpass.spec import SpecLike

Model = TypeVar("Model", bound=nn.Module)

_ATTACHED: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Models with attached parameters that are alive: where the backend looks for the owner of a graph's parameters."""


def attach(model: Model, spec: SpecLike) -> Model:
    """Create the new parameters of ``spec`` on a stock model, under ``model.depth``, and return the model.

    Its forward stays the stock one; ``torch.compile(model, backend="depthpass")`` runs the spec with these parameters.
    Make the optimizer afterwards, so that it sees them::

        model = dp.attach(model, dp.TurboConn(group=4))
        compiled = torch.compile(model, backend="depthpass")

    Attaching an equal spec again changes nothing.

    Args:
        model: a transformers decoder (with or without PEFT adapters); it gains the submodule ``depth``.
        spec: a pass, a list of passes, or their YAML/JSON form.

    Raises:
        SpecError, PassError: the spec cannot be applied, or another one is attached; nothing has been changed.
        UnsupportedModelError: the model cannot be treated; nothing has been changed.
    """
    inner = inner_model(model)
    if isinstance(inner, DepthModel):
        raise SpecError(
            f"attach: this {type(inner).__name__} is already transformed and runs its spec by itself. Call "
            "dp.restore(model) first to use the torch.compile backend."
        )
    passes = load_spec(spec)
    attached = attached_spec(inner)
    if attached is None:
        check_fixed(passes)
        runtime = prepare(inner, passes, None)
        check_attachable(runtime.program)
        depth: Any = build(runtime.program, next(inner.parameters()), inner).train(inner.training)
        depth.spec = runtime.plan.spec
        inner.add_module(PREFIX, depth)
    elif spec_hash(attached) != spec_hash(passes):
        raise SpecError(
            f"attach: this {type(inner).__name__} has parameters of another spec attached ({attached['passes']}, now "
            f"{dump_spec(passes)['passes']}). Delete them first: del model.{PREFIX}."
        )
    _ATTACHED.add(inner)
    return model


def check_attachable(program: Program) -> None:
    """Refuse what only a transformed model does besides running the program.

    Raises:
        SpecError: training losses, biases moved by training, averaged weights.
    """
    unmet = [f"the training loss {o['name']}" for o in program.losses]
    unmet += [f"the balancing bias {o['bias']}" for o in program if o.kind == "route" and o["rate"]]
    unmet += [f"block {o['index']} starting from an average" for o in program if o.kind == "average"]
    if unmet:
        raise SpecError(f"the spec asks for {', '.join(dict.fromkeys(unmet))}, which a compiled graph of the stock model cannot "
                        "do. Set the coefficients to 0 or choose another init, or use dp.transform(model, spec).")


def check_fixed(passes: Sequence[Pass]) -> None:
    """Refuse loop counts that a compiled graph cannot change.

    Raises:
        SpecError: naming the pass.
    """
    for p in passes:
        if p.varies is not None:
            raise SpecError(f"{p.label}: expected a fixed loop count, got one that varies; the torch.compile backend compiles "
                            "one program. Use dp.transform(model, spec).")


def attached_spec(model: nn.Module) -> dict | None:
    """The spec whose parameters are attached to a model, as plain data; None without any."""
    return getattr(in_force(getattr(model, PREFIX, None)), "spec", None)


def owners(parameters: Collection[nn.Parameter]) -> list[nn.Module]:
    """The living models with attached parameters that hold one of these very parameters."""
    wanted = {id(p) for p in parameters}
    return [m for m in _ATTACHED if any(id(p) in wanted for p in m.parameters())]
