"""Checkpoints: safetensors under stock keys plus ``depth.``, with the spec in ``config.json``."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from depthpass.errors import CheckpointError, DepthpassError, InputError, SpecError, did_you_mean
from depthpass.hf.auto import PREFIX as MARKED
from depthpass.hf.auto import as_stock, unmarked
from depthpass.hf.damage import find_damage, holding
from depthpass.hf.files import interrupted, recover
from depthpass.hf.model import depth_class
from depthpass.hf.plans import sizes
from depthpass.hf.runtime import PREFIX
from depthpass.hf.weights import retire
from depthpass.limits import shown
from depthpass.schedule.fixed_point import FixedPoint, load_schedule

_FIELDS = ("spec", "chunk", "parameters", "schedule", "class", "stock")

NOTICE = f"{PREFIX}.these_weights_belong_to_a_transformed_model.load_it_with_dp_from_pretrained"
"""A weight of files that stock code may load: stock code names it, loudly, among the weights that it does not use."""


def from_pretrained(path: str | os.PathLike, *, model_class: type | None = None, **kwargs) -> nn.Module:
    """Load a transformed model that ``save_pretrained`` has written.

    Args:
        path: folder or hub id.
        model_class: the stock class to load, in place of the one that was saved: a class of your own that is not
            imported under the name it had, or another head.
        kwargs: what the stock ``from_pretrained`` takes: ``dtype``, ``device_map``, ``revision``,
            ``attn_implementation``, ``output_loading_info``, ...

    Returns:
        the model (with ``output_loading_info=True``: and a dict), in eval mode, of the class that was saved.

    Raises:
        SpecError: not a depthpass checkpoint, or its weights under ``depth.`` are not those of its spec.
        CheckpointError: the files are damaged.
        InputError: ``use_safetensors=False`` was asked for.
    """
    check_safetensors(kwargs)
    settings = _settings(path, kwargs)
    spec_of(settings, str(path))
    if model_class is None:
        model_class = stock_class(settings, str(path))
    elif not (isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)):
        raise InputError(f"model_class: expected a class of transformers models, got {model_class!r}.")
    return load(depth_class(getattr(model_class, "_stock_class", model_class)), path, (), kwargs, settings)


def check_safetensors(kwargs: dict[str, Any]) -> None:
    """Ask for safetensors, and refuse anything else."""
    if kwargs.get("use_safetensors") not in (None, True):
        raise InputError(f"use_safetensors: expected True, got {kwargs['use_safetensors']!r}; transformed models are "
                         "stored as safetensors only. Leave the argument out.")
    kwargs["use_safetensors"] = True


def _settings(path: str | os.PathLike, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The fields of a checkpoint's config, with the base's model type."""
    config = kwargs.get("config")
    if isinstance(config, PreTrainedConfig):
        return config.to_dict()
    where = path if config is None else config
    folder = Path(where)
    if folder.is_dir():
        _bring_back(folder)
        if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
            raise SpecError(
                f"{str(where)!r} holds a PEFT adapter, not a model. Load the model it was trained on first, then "
                "peft.PeftModel.from_pretrained(model, path)."
            )
    try:
        settings, _ = PreTrainedConfig.get_config_dict(where, **kwargs)
    except Exception as error:  # it reads whatever the file holds as a mapping
        if folder.is_dir():
            raise CheckpointError(find_damage(folder) or f"{folder / 'config.json'}: cannot be read: {error}") from error
        raise
    if not isinstance(settings, dict):
        raise CheckpointError(f"{where}: config.json: expected a JSON object, got {shown(settings)}. Save the model again.")
    return unmarked(settings, str(where))


def _bring_back(folder: Path) -> None:
    """Undo a save that was killed while it put its files in place."""
    if not any((stage / "plan.json").exists() for stage in interrupted(folder)):
        return
    try:
        recover(folder)
    except OSError as error:
        raise CheckpointError(f"{folder}: a save into this folder was interrupted, and its old files cannot be brought back: "
                              f"{error}. Make the folder writable and load it again, or save the model again.") from error


def load(cls: type, path: str | os.PathLike, args: tuple, kwargs: dict[str, Any], settings: dict[str, Any]) -> Any:
    """Load a checkpoint as a transformed class; what every door that loads a transformed model goes through.

    Raises:
        SpecError, CheckpointError: as :func:`from_pretrained`.
    """
    where, folder = str(path), Path(path)
    wanted = kwargs.pop("output_loading_info", False)
    lenient = kwargs.pop("ignore_mismatched_sizes", False)
    try:
        # Sizes that differ are reported with the rest of what is wrong, once.
        model, info = super(_mixin(), cls).from_pretrained(
            path, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
    except DepthpassError:
        raise
    except Exception as error:
        if folder.is_dir() and (damage := find_damage(folder, cls._stock_class)):
            raise CheckpointError(damage) from error
        raise
    whole = cls._stock_class.__name__ in _names(settings) and settings.get("quantization_config") is None
    _check_keys(info, folder, where, model.base_model_prefix, whole=whole, lenient=lenient)
    retire(model.get_submodule(model._depth.layers), model.depth_program, frozen=True)
    return (model, info) if wanted else model


def load_as(cls: type, path: str | os.PathLike, args: tuple, kwargs: dict[str, Any]) -> Any:
    """``from_pretrained`` of a transformed class, as the Auto classes call it.

    A model of somebody's own class is loaded as that class, not as the class of transformers that it extends.
    """
    check_safetensors(kwargs)
    settings = _settings(path, kwargs)
    return load(own_depth_class(cls, settings, str(path)), path, args, kwargs, settings)


def own_depth_class(cls: Any, settings: dict[str, Any], where: str) -> Any:
    """The transformed class for a config: of the class of its own that it names, where that extends ``cls``."""
    spec_of(settings, where)
    if "class" not in settings["depthpass"]:
        return cls
    found = stock_class(settings, where)
    return depth_class(found) if issubclass(found, cls._stock_class) else cls


def _mixin() -> type:
    from depthpass.hf.model import DepthModel

    return DepthModel


@contextmanager
def configured(model: nn.Module, stock: bool = False) -> Iterator[None]:
    """Let a transformed model's config say what is in force here, for the time of a save.

    A model that was switched to a spec with fewer parameters keeps them all, so its config also names the spec that they
    were made for.

    Args:
        stock: write files that stock code may load, as the base.
    """
    plans, before = model._depth.plans, model.config.depthpass
    held = model._depth.config() | own_class(type(model)._stock_class)
    if sizes(model, plans.current.largest) != sizes(model, plans.home.largest):
        held["parameters"] = plans.home.spec
    model.config.depthpass = held
    try:
        if stock:
            with as_stock():
                yield
        else:
            yield
    finally:
        model.config.depthpass = before


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
    held = config.get("depthpass") if isinstance(config, dict) else getattr(config, "depthpass", None)
    if held is None:
        raise SpecError(
            f"{where}: expected a config with a depthpass spec, got one without: this is a stock model. Load it with "
            "its stock class (AutoModelForCausalLM.from_pretrained) and call dp.transform(model, spec)."
        )
    if not isinstance(held, dict) or "spec" not in held:
        raise SpecError(f"{where}: config.depthpass: expected a mapping with 'spec', got {shown(held)}.")
    for key in held:
        if key not in _FIELDS:
            raise SpecError(f"{where}: config.depthpass: unknown field {key!r}.{did_you_mean(key, _FIELDS)} "
                            f"Fields: {', '.join(_FIELDS)}. A newer depthpass may have written it: update depthpass.")
    chunk = held.get("chunk")
    if chunk is not None and (type(chunk) is not int or chunk < 1):
        raise SpecError(f"{where}: config.depthpass.chunk: expected an integer of at least 1, got {shown(chunk)}.")
    policy = load_schedule(held["schedule"]) if "schedule" in held else None
    return held["spec"], chunk, held.get("parameters"), policy


def _names(settings: Mapping[str, Any]) -> list[str]:
    """The architectures of a config, as transformers calls them."""
    names = settings.get("architectures")
    return [n.removeprefix(MARKED) for n in names if isinstance(n, str)] if isinstance(names, list | tuple) else []


def stock_class(settings: Mapping[str, Any], where: str) -> type:
    """The stock class that a checkpoint was saved from.

    Raises:
        SpecError: it is somebody's own and not imported, or no class at all. Never the class that it extends.
    """
    own = settings["depthpass"].get("class")
    if own is not None:
        return _imported(own, where)
    kind, names = settings.get("model_type"), _names(settings)
    mapped = None
    if kind in CONFIG_MAPPING and (config := CONFIG_MAPPING[kind]) in MODEL_FOR_CAUSAL_LM_MAPPING:
        mapped = MODEL_FOR_CAUSAL_LM_MAPPING[config]
    for name in names if kind in CONFIG_MAPPING else ():
        for found in (getattr(transformers, name, None), mapped):
            if isinstance(found, type) and issubclass(found, PreTrainedModel) and found.__name__ == name:
                return found
    if mapped is not None and not settings.get("architectures"):
        return mapped
    raise SpecError(
        f"{where}: config.architectures: expected the name of a transformers class of models, got "
        f"{shown(settings.get('architectures'))} (model type {shown(kind)}). If the model is of a class of your own, load it "
        "with dp.from_pretrained(path, model_class=YourClass)."
    )


def _imported(own: object, where: str) -> type:
    """A class that has been imported, by ``module:name``. A config must not be able to import anything."""
    module, _, name = own.partition(":") if isinstance(own, str) else ("", "", "")
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise SpecError(f"{where}: the model was saved from a class of its own, {name!r} of module {module!r}, which is not "
                        "imported here. Import it first, or give it: dp.from_pretrained(path, model_class=YourClass).")
    return getattr(found, "_stock_class", found)


def _check_keys(info: Mapping[str, Any], folder: Path, where: str, base: str, *, whole: bool, lenient: bool) -> None:
    """Refuse a checkpoint whose weights are not those of its config.

    Args:
        base: name of the model without its head, whose weights have to be there whatever head is loaded.
        whole: the class is the one that was saved, so its head's weights have to be there, too.
        lenient: the caller has asked for other sizes (a head with more labels): those start afresh.
    """
    for kind, mine, stock in (
        ("missing_keys", "the spec needs weights that the checkpoint does not have",
         "its config needs weights that the checkpoint does not have"),
        ("unexpected_keys", "the checkpoint has weights that the spec does not know",
         "the checkpoint has weights that its config does not know"),
        ("mismatched_keys", "weights do not have the shapes of the spec",
         "weights do not have the shapes of its config"),
    ):
        found = {str(k if isinstance(k, str) else k[0]): k for k in info.get(kind, ())}
        found.pop(NOTICE, None)
        depth = sorted(k for k in found if k.startswith(PREFIX + "."))
        others = [] if lenient and kind == "mismatched_keys" else sorted(
            k for k in found if k not in depth and (whole or k.startswith(base + "."))
        )
        if keys := depth or others:
            names = ", ".join(_described(found[k]) for k in keys[:3])
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            file = holding(folder, keys[0]) or "the weight files"
            raise CheckpointError(
                f"{where}: {mine if depth else stock}: {names}{more}. config.json and {file} do not belong together"
                f"{' (size mismatch)' if kind == 'mismatched_keys' else ''}: one of them was changed or replaced. Save the model "
                "again with save_pretrained."
            )


def _described(key: Any) -> str:
    """A key with the shapes it has and should have, as far as they are known."""
    name, *shapes = (key,) if isinstance(key, str) else key
    return f"{name} {' instead of '.join(str(tuple(s)) for s in shapes)}" if len(shapes) == 2 else str(name)
