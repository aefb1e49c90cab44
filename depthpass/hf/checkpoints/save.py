"""Saving: safetensors under stock keys plus ``depth.``, with the spec in ``config.json``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
import transformers
from transformers import PreTrainedConfig

from depthpass.errors import SpecError, did_you_mean
from depthpass.hf.checkpoints.marks import as_stock
from depthpass.hf.plans import sizes
from depthpass.hf.runtime import PREFIX
from depthpass.limits import shown
from depthpass.schedule.fixed_point import FixedPoint, load_schedule

if TYPE_CHECKING:
    from depthpass.hf.model import DepthModel

_FIELDS = ("spec", "chunk", "parameters", "schedule", "class", "stock")

NOTICE = f"{PREFIX}.these_weights_belong_to_a_transformed_model.load_it_with_dp_from_pretrained"
"""A weight of files that stock code may load: stock code names it, loudly, among the weights that it does not use."""


@contextmanager
def configured(model: DepthModel, stock: bool = False) -> Iterator[None]:
    """Let a transformed model's config say what is in force here, for the time of a save.

    A model that was switched to a spec with fewer parameters keeps them all, so its config also names the spec that they
    were made for.

    Args:
        stock: write files that stock code may load, as the base.
    """
    plans, config = model._depth.plans, cast(Any, model.config)
    before = config.depthpass
    held = model._depth.config() | own_class(type(model)._stock_class)
    if sizes(model, plans.current.largest) != sizes(model, plans.home.largest):
        held["parameters"] = plans.home.spec
    config.depthpass = held
    try:
        if stock:
            with as_stock():
                yield
        else:
            yield
    finally:
        config.depthpass = before


def own_class(stock: type) -> dict[str, str]:
    """The entry of a config that names a class which is not transformers' own; empty for those that are."""
    if getattr(transformers, stock.__name__, None) is stock:
        return {}
    return {"class": f"{stock.__module__}:{stock.__qualname__}"}


def with_notice(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights with one more, which stock code will name among those that it does not use."""
    return {**state, NOTICE: torch.zeros(1)}


def spec_of(config: PreTrainedConfig | dict, where: str) -> tuple[dict, int | None, dict | None, FixedPoint | None]:
    """The spec and the chunk that a config holds, the spec that the parameters were made for if it is another one, and the
    fixed-point schedule, if any.

    Raises:
        SpecError: it holds none, or something this version does not know.
    """
    entry = config.get("depthpass") if isinstance(config, dict) else getattr(config, "depthpass", None)
    if entry is None:
        raise SpecError(
            f"{where}: expected a config with a depthpass spec, got one without: this is a stock model. Load it with "
            "its stock class (AutoModelForCausalLM.from_pretrained) and call dp.transform(model, spec)."
        )
    if not isinstance(entry, dict) or "spec" not in entry:
        raise SpecError(f"{where}: config.depthpass: expected a mapping with 'spec', got {shown(entry)}.")
    for key in entry:
        if key not in _FIELDS:
            raise SpecError(f"{where}: config.depthpass: unknown field {key!r}.{did_you_mean(key, _FIELDS)} "
                            f"Fields: {', '.join(_FIELDS)}. A newer depthpass may have written it: update depthpass.")
    chunk = entry.get("chunk")
    if chunk is not None and (type(chunk) is not int or chunk < 1):
        raise SpecError(f"{where}: config.depthpass.chunk: expected an integer of at least 1, got {shown(chunk)}.")
    try:
        policy = load_schedule(entry["schedule"]) if "schedule" in entry else None
    except SpecError as error:
        raise SpecError(f"{where}: config.depthpass.schedule: {error}") from error
    return entry["spec"], chunk, entry.get("parameters"), policy
