"""Checkpoints: safetensors under stock keys plus ``depth.``, with the spec in ``config.json``."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import transformers
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from depthpass.errors import InputError, SpecError, did_you_mean
from depthpass.hf.model import PREFIX, depth_class
from depthpass.hf.plans import sizes
from depthpass.hf.transform import check_one_device
from depthpass.hf.weights import retire
from depthpass.schedule.fixed_point import FixedPoint, load_schedule

_FIELDS = ("spec", "chunk", "parameters", "schedule")
_WEIGHTS = re.compile(r"model(\.[\w-]+)?(-\d{5}-of-\d{5})?\.safetensors(\.index(\.[\w-]+)?\.json)?")


def from_pretrained(path: str | os.PathLike, **kwargs) -> nn.Module:
    """Load a transformed model that ``save_pretrained`` has written.

    Args:
        path: folder or hub id.
        kwargs: what the stock ``from_pretrained`` takes: ``dtype``, ``device_map``, ``revision``,
            ``attn_implementation``, ``output_loading_info``, ...

    Returns:
        the model (with ``output_loading_info=True``: and a dict), in eval mode, of the class that was saved.

    Raises:
        SpecError: not a depthpass checkpoint, or its weights under ``depth.`` are not those of its spec.
        InputError: ``use_safetensors=False`` was asked for.
        UnsupportedModelError: ``device_map`` spreads the model over several devices.
    """
    if kwargs.setdefault("use_safetensors", True) is not True:
        raise InputError(f"use_safetensors: expected True, got {kwargs['use_safetensors']!r}; transformed models are "
                         "stored as safetensors only. Leave the argument out.")
    config = kwargs.get("config")
    if isinstance(config, PreTrainedConfig):
        settings = config.to_dict()
    else:
        where = path if config is None else config
        if (folder := Path(where)).is_dir() and (folder / "adapter_config.json").exists() and not (
            folder / "config.json"
        ).exists():
            raise SpecError(
                f"{str(where)!r} holds a PEFT adapter, not a model. Load the model it was trained on first, then "
                "peft.PeftModel.from_pretrained(model, path)."
            )
        settings, _ = PreTrainedConfig.get_config_dict(where, **kwargs)
    spec_of(settings, str(path))
    wanted = kwargs.pop("output_loading_info", False)
    model, info = depth_class(_stock_class(settings, str(path))).from_pretrained(
        path, output_loading_info=True, **kwargs
    )
    _check_keys(info, str(path))
    retire(model.get_submodule(model._depth.layers), model.depth_program, frozen=True)
    check_one_device(model)
    return (model, info) if wanted else model


@contextmanager
def configured(model: nn.Module) -> Iterator[None]:
    """Let a transformed model's config say what is in force here, for the time of a save.

    A model that was switched to a spec with fewer parameters keeps them all, so its config also names the spec that they
    were made for.
    """
    plans, before = model._depth.plans, model.config.depthpass
    held = model._depth.config()
    if sizes(model, plans.current.largest) != sizes(model, plans.home.largest):
        held["parameters"] = plans.home.spec
    model.config.depthpass = held
    try:
        yield
    finally:
        model.config.depthpass = before


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
        raise SpecError(f"{where}: config.depthpass: expected a mapping with 'spec', got {held!r}.")
    for key in held:
        if key not in _FIELDS:
            raise SpecError(f"{where}: config.depthpass: unknown field {key!r}.{did_you_mean(key, _FIELDS)} "
                            f"Fields: {', '.join(_FIELDS)}. A newer depthpass may have written it: update depthpass.")
    policy = load_schedule(held["schedule"]) if "schedule" in held else None
    return held["spec"], held.get("chunk"), held.get("parameters"), policy


def _stock_class(settings: dict, where: str) -> type:
    """The stock class of a checkpoint: the one it names, else the causal language model of its architecture."""
    for name in settings.get("architectures") or ():
        if (found := getattr(transformers, name, None)) is not None:
            return found
    kind = settings.get("model_type")
    if kind in CONFIG_MAPPING and (config := CONFIG_MAPPING[kind]) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return MODEL_FOR_CAUSAL_LM_MAPPING[config]
    raise SpecError(
        f"{where}: config.architectures: expected the name of a transformers class, got "
        f"{settings.get('architectures')!r} (model type {kind!r}). Load the stock model yourself, "
        "then dp.transform(model, spec) and load_state_dict."
    )


def _check_keys(info: dict, where: str) -> None:
    for kind, meaning in (
        ("missing_keys", "the spec needs weights that the checkpoint does not have"),
        ("unexpected_keys", "the checkpoint has weights that the spec does not know"),
        ("mismatched_keys", "weights do not have the shapes of the spec"),
    ):
        keys = sorted(str(k if isinstance(k, str) else k[0]) for k in info.get(kind, ()))
        if mine := [k for k in keys if k.startswith(PREFIX + ".")]:
            more = f" and {len(mine) - 3} more" if len(mine) > 3 else ""
            raise SpecError(
                f"{where}: {meaning}: {', '.join(mine[:3])}{more}. config.depthpass and the weight files do not belong "
                "together; save the model again with save_pretrained."
            )


@contextmanager
def replacing(directory: str | os.PathLike) -> Iterator[Path]:
    """A folder to write a checkpoint to, whose files replace those of ``directory`` if nothing fails.

    Weight files of an earlier save that the new one does not overwrite are removed: a stale ``model.safetensors``
    would be loaded in place of new shards.

    Raises:
        InputError: ``directory`` is a file.
    """
    target = Path(directory)
    if target.exists() and not target.is_dir():
        raise InputError(f"save_directory: expected a folder, got the file {str(directory)!r}.")
    created = not target.exists()
    target.mkdir(parents=True, exist_ok=True)
    # Inside the target: surely the same file system, so that every file moves in one step.
    folder = Path(tempfile.mkdtemp(prefix=".saving-", dir=target))
    try:
        yield folder
        _move(folder, target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        if created and not any(target.iterdir()):
            target.rmdir()
        raise
    folder.rmdir()


def _move(folder: Path, target: Path) -> None:
    files = sorted((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.suffix == ".json")
    for file in files:  # weights first: what names them comes last
        goal = target / file.relative_to(folder)
        goal.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, goal)
    names = {f.name for f in files}
    if any(_WEIGHTS.fullmatch(n) for n in names):
        for old in target.iterdir():
            if old.is_file() and old.name not in names and _WEIGHTS.fullmatch(old.name):
                old.unlink()
    for empty in sorted((d for d in folder.rglob("*") if d.is_dir()), reverse=True):
        empty.rmdir()
