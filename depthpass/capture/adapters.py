"""PEFT adapters that no program can run, told from their layers: by name, before a trace would stumble over their code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from depthpass.errors import UnsupportedModelError

_TUNERS = "peft.tuners."
_REASONS = {
    "lily": ("Lily", "mixes its experts by the mean over all tokens and rows of a call, which no chunk of a row knows"),
    "poly": ("Poly", "chooses its skills by the task of each row (task_ids), which its layers get beside the hidden stream"),
    "frod": ("FRoD", "multiplies by a sparse tensor, whose entries cannot be told while it is traced"),
    "waveft": ("WaveFT with use_idwt=True", "puts its weight together from those entries of a mask that lie inside, a number "
               "that depends on data"),
    "alora": ("aLoRA", "begins where the row's last invocation tokens stand, counted from the end of the row, which no chunk of "
              "it knows"),
}


def screen_adapters(model: nn.Module) -> None:
    """Refuse adapters that are in force: those that are switched off or merged do not run.

    Raises:
        UnsupportedModelError: names the layer, the kind and what it does.
    """
    for path, module in model.named_modules():
        if not type(module).__module__.startswith(_TUNERS):
            continue
        for name in _in_force(module):
            if (kind := _kind(module, name)) in _REASONS:
                what, why = _REASONS[kind]
                raise UnsupportedModelError(
                    f"{path} ({type(module).__name__}): the adapter {name!r} is PEFT's {what}, which {why}. Use LoRA, DoRA or "
                    "another adapter that treats each token by itself; merged or switched off it does not matter."
                )


def _in_force(layer: Any) -> list[str]:
    """The adapters that a layer of PEFT adds to what it wraps."""
    if getattr(layer, "disable_adapters", True) or getattr(layer, "merged", False):
        return []
    kept: list[Any] = [getattr(layer, n, None) for n in layer.adapter_layer_names]
    names = {k for table in kept if isinstance(table, Mapping | nn.ModuleDict | nn.ParameterDict) for k in list(table)}
    return [a for a in layer.active_adapters if a in names]


def _kind(layer: Any, adapter: str) -> str:
    if "ALora" in type(getattr(layer, "lora_variant", {}).get(adapter)).__name__:
        return "alora"
    tuner = type(layer).__module__.removeprefix(_TUNERS).partition(".")[0]
    # Without it the coefficients are put where they belong, and there are as many as the config says.
    return "" if tuner == "waveft" and not layer.waveft_use_idwt[adapter] else tuner
