"""What is wrong with the files of a checkpoint that does not load: the first thing found, with its file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from depthpass.hf.checkpoints.marks import unmarked

_INDEX = "model.safetensors.index.json"


def find_damage(folder: Path, stock: type | None = None) -> str | None:
    """A sentence that names the file and says what is wrong with it and what to do; None = nothing was found.

    Args:
        stock: the class to build, for configs that no model can be built from.
    """
    settings, damage = _json(folder / "config.json")
    if damage:
        return damage
    files, damage = _weight_files(folder)
    if damage:
        return damage
    for file in files:
        if damage := _weights(file):
            return damage
    return None if stock is None else _config(folder / "config.json", settings, stock)


def holding(folder: Path, key: str) -> str | None:
    """Name of the weight file of a local checkpoint that holds a key, or None."""
    for file in _weight_files(folder)[0]:
        try:
            with safe_open(file, "pt") as held:
                if key in held.keys():  # noqa: SIM118 (no mapping)
                    return file.name
        except (OSError, SafetensorError):
            continue
    return None


def _json(file: Path) -> tuple[Any, str | None]:
    again = "Restore the file, or save the model again."
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None, f"{file}: expected the file, there is none: it was removed, or a save has not finished. {again}"
    except (OSError, UnicodeDecodeError) as error:
        return None, f"{file}: cannot be read: {error}. {again}"
    except (ValueError, RecursionError) as error:
        return None, f"{file}: expected JSON, got text that is none ({str(error)[:200]}). {again}"
    if not isinstance(data, dict):
        return None, f"{file}: expected a JSON object, got {type(data).__name__}. {again}"
    return data, None


def _weight_files(folder: Path) -> tuple[list[Path], str | None]:
    """The weight files of a checkpoint, and what is wrong with their list."""
    index = folder / _INDEX
    if (single := folder / "model.safetensors").exists():
        return [single], None
    if not index.exists():
        return [], f"{single}: expected the file or {index.name} beside it, there is neither. Copy the weights into the folder."
    listing, damage = _json(index)
    if damage:
        return [], damage
    shards = listing.get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(v, str) for v in shards.values()):
        return [], f"{index}: expected a mapping 'weight_map' of file names, got none. Save the model again."
    return [folder / name for name in sorted(set(shards.values()))], None


def _weights(file: Path) -> str | None:
    if not file.exists():
        return f"{file}: expected the file, there is none, though {_INDEX} names it. Copy it into the folder."
    try:
        with safe_open(file, "pt") as held:
            for key in held.keys():  # noqa: SIM118 (no mapping)
                held.get_slice(key).get_shape()
    except (OSError, SafetensorError) as error:
        return (f"{file} ({file.stat().st_size} bytes): not a whole safetensors file: {str(error)[:200]}. It was cut off or "
                "changed; copy it again, or save the model again.")
    return None


def _config(file: Path, settings: dict[str, Any], stock: Any) -> str | None:
    """Whether a stock model can be built from the config at all."""
    try:
        plain = unmarked(settings, str(file))
        config = stock.config_class.from_dict({k: v for k, v in plain.items() if k != "depthpass"})
        with torch.device("meta"):
            stock._from_config(config)
    except Exception as error:  # whatever a constructor raises, the question is about the config
        return f"{file}: no {stock.__name__} can be built from it: {type(error).__name__}: {str(error)[:300]}"
    return None
