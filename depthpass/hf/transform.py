"""``transform`` and ``restore``: from a stock model to a transformed one and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias, TypedDict, TypeVar, Unpack, overload

import torch
from torch import nn

from depthpass.capture.screen import block_list, screen_prompts
from depthpass.errors import SpecError, UnsupportedModelError
from depthpass.hf.blocks import check_blocks
from depthpass.hf.calls.doors import DepthDecoder
from depthpass.hf.calls.host import depth_module
from depthpass.hf.checkpoints.adapters import AdapterSave
from depthpass.hf.checkpoints.marks import mark
from depthpass.hf.checkpoints.save import own_class
from depthpass.hf.model import DepthModel, depth_class
from depthpass.hf.modules.context import inner_model
from depthpass.hf.modules.placement import copied
from depthpass.hf.modules.weights import retire, start_weights
from depthpass.hf.prepare import install, prepare
from depthpass.hf.stock import drop_wrapped_forward, stock_copy
from depthpass.schedule.fixed_point import FixedPoint, load_schedule
from depthpass.spec import SpecLike

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Lowering: TypeAlias = Literal["auto", "eager", "scheduled", "inductor", "cudagraph"]
ScheduleName: TypeAlias = Literal["sequential", "fixed_point"]
Wrapper = TypeVar("Wrapper", bound=nn.Module)
"""A PEFT model around a decoder."""


class Options(TypedDict, total=False):
    """Of :func:`transform`, which says what they are."""

    chunk: int | None
    lowering: Lowering
    stack: bool
    schedule: ScheduleName | FixedPoint
    tol: float | None
    max_sweeps: int | None
    window: int | None
    exact: bool | None


@overload
def transform(model: PreTrainedModel, spec: SpecLike, **options: Unpack[Options]) -> DepthModel: ...


@overload
def transform(model: Wrapper, spec: SpecLike, **options: Unpack[Options]) -> Wrapper: ...


def transform(
    model: nn.Module,
    spec: SpecLike,
    *,
    chunk: int | None = None,
    lowering: Lowering = "auto",
    stack: bool = True,
    schedule: ScheduleName | FixedPoint = "sequential",
    tol: float | None = None,
    max_sweeps: int | None = None,
    window: int | None = None,
    exact: bool | None = None,
) -> nn.Module:
    """Return ``model`` rewired by ``spec``: same class, same parameters, plus the new ones under ``depth.``.

    The given model is left untouched; both share every stock parameter, except those that the spec gives new values
    (averages) or retires (frozen aliases).

    Args:
        model: a transformers decoder (with or without PEFT adapters).
        spec: a pass, a list of passes, or their YAML/JSON form.
        chunk: run serial regions in smaller chunks than the largest legal one (same numbers).
        lowering: how serial regions run. ``eager``: op by op. ``scheduled``: keys and values in place, weight gradients
            in one product after the loop; an error where that is not possible. ``auto``: scheduled where possible.
        stack: run visits of one block that do not wait for each other as one call when decoding (same numbers).
        schedule: ``sequential``: serial regions chunk by chunk. ``fixed_point``, or a
            :class:`~depthpass.schedule.fixed_point.FixedPoint`: by sweeps over all tokens at once; same numbers unless
            ``tol`` or ``exact=False`` asks for others. Each output then has ``output.sweeps``: what was run, by region.
        tol, max_sweeps, window, exact: the fields of :class:`~depthpass.schedule.fixed_point.FixedPoint`, for
            ``schedule="fixed_point"``.

    Raises:
        SpecError, PassError: the spec cannot be applied to this model; nothing has been changed.
        UnsupportedModelError: the model cannot be treated; nothing has been changed.
        LoweringError: the program can be reported but not run yet; nothing has been changed.
    """
    inner = inner_model(model)
    if isinstance(inner, DepthModel | DepthDecoder):
        raise SpecError(
            f"this {type(inner).__name__} is already transformed. Call dp.restore(model) first, or pass one list with "
            "all passes."
        )
    from depthpass_lowering.executors.levels import check_level

    screen_prompts(model)
    policy = load_schedule(schedule, tol=tol, max_sweeps=max_sweeps, window=window, exact=exact)
    runtime = prepare(inner, spec, chunk, stack)
    runtime.lowering, runtime.fixed_point = check_level(lowering), policy
    new_model = copied(model)
    turbo = inner_model(new_model)
    turbo.__class__ = depth_class(type(inner))
    drop_wrapped_forward(turbo)
    install(turbo, runtime)
    start_weights(block_list(turbo, runtime.layers), runtime.program, turbo.depth)
    turbo.config.depthpass = runtime.config() | own_class(type(turbo)._stock_class)
    mark(turbo.config, depth_class)
    check_blocks(turbo, runtime.plan)
    if new_model is not turbo:
        new_model.save_pretrained = AdapterSave(new_model)
    return new_model


@overload
def restore(model: DepthModel) -> PreTrainedModel: ...


@overload
def restore(model: Wrapper) -> Wrapper: ...


def restore(model: nn.Module) -> nn.Module:
    """Return the stock model of a transformed one, sharing its stock parameters (trained ones stay trained).

    Raises:
        SpecError: the model is not transformed.
    """
    inner = inner_model(model)
    if isinstance(inner, DepthDecoder):
        raise SpecError(f"restore: expected a whole transformed model, got the decoder of one; pass the "
                        f"{type(inner.depth_model).__name__} it belongs to.")
    if not isinstance(inner, DepthModel):
        raise SpecError(f"restore: expected a transformed model, got a stock {type(inner).__name__}.")
    if inner is model:
        return _revived(stock_copy(inner), inner)
    whole = copied(model)
    stock = inner_model(whole)
    whole.__dict__.pop("save_pretrained", None)
    _replace(whole, stock, _revived(stock_copy(stock), inner))
    return whole


def _revived(stock: nn.Module, turbo: DepthModel) -> nn.Module:
    """The stock model with retired blocks that train again if the others do."""
    blocks = block_list(stock, turbo._depth.layers)
    if any(p.requires_grad for p in blocks.parameters()):
        retire(blocks, turbo.depth_program, frozen=False)
    return stock


def _replace(root: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for module in root.modules():
        for name, child in module._modules.items():
            if child is old:
                module._modules[name] = new
                return
    raise UnsupportedModelError("cannot find the transformers model inside its wrapper.")


def new_parameters(model: nn.Module) -> list[torch.nn.Parameter]:
    """The parameters that a transform has added, for an optimizer group of their own::

        torch.optim.AdamW([{"params": dp.new_parameters(turbo), "lr": 1e-3}, ...])

    Args:
        model: a transformed model, also inside the wrappers of PEFT, DDP and ``torch.compile``, or a stock one after
            :func:`depthpass.attach`.

    Returns:
        Those of all passes; none where the passes have none.

    Raises:
        SpecError: a stock model, which has none.
    """
    inner = inner_model(getattr(model, "module", model))
    if getattr(inner, "depth", None) is None:
        raise SpecError(f"new_parameters: expected a transformed model, got {type(inner).__name__}. Call dp.transform.")
    return list(depth_module(inner).parameters())
