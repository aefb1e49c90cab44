"""Loading: which class a checkpoint is of, its files read, and its weights compared with its config."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from depthpass.errors import CheckpointError, DepthpassError, InputError, SpecError
from depthpass.hf.checkpoints.damage import find_damage, holding
from depthpass.hf.checkpoints.files import interrupted, recover
from depthpass.hf.checkpoints.marks import PREFIX as MARKED
from depthpass.hf.checkpoints.marks import unmarked
from depthpass.hf.checkpoints.save import NOTICE, spec_of
from depthpass.hf.modules.weights import retire
from depthpass.hf.runtime import PREFIX
from depthpass.limits import shown


def check_safetensors(kwargs: dict[str, Any]) -> None:
    """Ask for safetensors, and refuse anything else."""
    if kwargs.get("use_safetensors") not in (None, True):
        raise InputError(f"use_safetensors: expected True, got {kwargs['use_safetensors']!r}; transformed models are "
                         "stored as safetensors only. Leave the argument out.")
    kwargs["use_safetensors"] = True


def settings_of(path: str | os.PathLike | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The fields of a checkpoint's config, with the base's model type.

    Raises:
        InputError: there is neither a checkpoint nor what stands for one: a config and a state dict.
    """
    config = kwargs.get("config")
    if path is None and (config is None or kwargs.get("state_dict") is None):
        raise InputError("from_pretrained: expected a folder or hub id, got None. Without one, give config= and state_dict=.")
    if isinstance(config, PreTrainedConfig):
        return config.to_dict()
    where: Any = path if config is None else config
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
    """Undo a save that was killed while it put its files in place, and remove what one that had not come so far has left."""
    needed = any((stage / "plan.json").exists() for stage in interrupted(folder))
    try:
        recover(folder)
    except OSError as error:
        if needed:
            raise CheckpointError(
                f"{folder}: a save into this folder was interrupted, and its old files cannot be brought back: {error}. Make the "
                "folder writable and load it again, or save the model again.") from error


@contextmanager
def naming(where: str | os.PathLike) -> Iterator[None]:
    """Let the errors of a checkpoint's spec say whose they are: a spec's own say which option is wrong, not in which file."""
    try:
        yield
    except InputError:  # the caller's mistake
        raise
    except DepthpassError as error:
        if str(where) in str(error):
            raise
        raise type(error)(f"{where}: config.json: {error}") from error


def load(
    build: Callable[..., Any], stock: type, path: str | os.PathLike | None, args: tuple, kwargs: dict[str, Any],
    settings: dict[str, Any],
) -> Any:
    """Load a checkpoint; what every door that loads a transformed model goes through.

    Args:
        build: the stock ``from_pretrained``, bound to the transformed class.
        stock: the stock class under it.
        settings: the fields of the checkpoint's config.

    Raises:
        SpecError, CheckpointError: as :func:`depthpass.from_pretrained`.
    """
    folder = Path(where := "the given state_dict" if path is None else str(path))
    with_info = kwargs.pop("output_loading_info", False)
    lenient = kwargs.pop("ignore_mismatched_sizes", False)
    try:
        # Sizes that differ are reported with the rest of what is wrong, once.
        with naming(where):
            model, info = build(path, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs)
    except DepthpassError:
        raise
    except Exception as error:
        if folder.is_dir() and (damage := find_damage(folder, stock)):
            raise CheckpointError(damage) from error
        raise
    whole = stock.__name__ in _names(settings) and settings.get("quantization_config") is None
    _check_keys(info, folder, where, model.base_model_prefix, whole=whole, lenient=lenient)
    retire(model.get_submodule(model._depth.layers), model.depth_program, frozen=True)
    return (model, info) if with_info else model


def _names(settings: Mapping[str, Any]) -> list[str]:
    """The architectures of a config, as transformers calls them."""
    names = settings.get("architectures")
    return [n.removeprefix(MARKED) for n in names if isinstance(n, str)] if isinstance(names, list | tuple) else []


def class_to_load(stock: type, settings: Mapping[str, Any], where: str) -> type:
    """The stock class of a checkpoint that is loaded as ``stock``: a class of somebody's own that it names, where it extends it.

    Raises:
        SpecError: the config holds no spec, or names a class that is not imported.
    """
    spec_of(dict(settings), where)
    if "class" not in settings["depthpass"]:
        return stock
    own = stock_class(settings, where)
    return own if issubclass(own, stock) else stock


def stock_class(settings: Mapping[str, Any], where: str) -> type:
    """The stock class that a checkpoint was saved from.

    Raises:
        SpecError: it is somebody's own and not imported, or no class at all. Never the class that it extends.
    """
    own = settings["depthpass"].get("class")
    if own is not None:
        return _imported(own, where)
    kind, names = str(settings.get("model_type")), _names(settings)
    mapped: Any = None
    if kind in CONFIG_MAPPING and (config := CONFIG_MAPPING[kind]) in MODEL_FOR_CAUSAL_LM_MAPPING:
        mapped = MODEL_FOR_CAUSAL_LM_MAPPING[config]
    for name in names if kind in CONFIG_MAPPING else ():
        for cls in (getattr(transformers, name, None), mapped):
            if isinstance(cls, type) and issubclass(cls, PreTrainedModel) and cls.__name__ == name:
                return cls
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
    value: Any = sys.modules.get(module)
    for part in name.split("."):
        value = getattr(value, part, None)
    if not (isinstance(value, type) and issubclass(value, PreTrainedModel)):
        raise SpecError(f"{where}: the model was saved from a class of its own, {name!r} of module {module!r}, which is not "
                        "imported here. Import it first, or give it: dp.from_pretrained(path, model_class=YourClass).")
    return getattr(value, "_stock_class", value)


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
        differing = {str(k if isinstance(k, str) else k[0]): k for k in info.get(kind, ())}
        differing.pop(NOTICE, None)
        depth = sorted(k for k in differing if k.startswith(PREFIX + "."))
        others = [] if lenient and kind == "mismatched_keys" else sorted(
            k for k in differing if k not in depth and (whole or k.startswith(base + "."))
        )
        if keys := depth or others:
            names = ", ".join(_described(differing[k]) for k in keys[:3])
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
