"""Settings of an experiment: a YAML file with overlays ``quick`` and ``gpu``."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).resolve().parents[1] / "configs"
OVERLAYS = ("quick", "gpu")


class Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number too, as everywhere but in YAML."""


Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789"))


class Settings(dict):
    """A nested mapping whose keys are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no setting {name!r}; there are {', '.join(self)}") from None


def settings(name: str, overlay: str | None = None, changes: tuple[str, ...] = ()) -> Settings:
    """Settings of ``configs/NAME.yaml``.

    Args:
        name: of the experiment.
        overlay: ``quick`` or ``gpu``: what the file says under that key goes over the rest, key by key.
        changes: more of the same as ``train.steps=100``, values in YAML.
    """
    read = yaml.load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"), Loader)
    laid = {o: read.pop(o, {}) for o in OVERLAYS}
    if overlay is not None:
        read = merge(read, laid[overlay])
    for change in changes:
        path, mark, value = change.partition("=")
        if not mark:
            raise ValueError(f"--set: expected key.key=value, got {change!r}")
        try:
            assign(read, path.split("."), yaml.load(value, Loader))
        except yaml.YAMLError:
            raise ValueError(f"--set: expected {path}=VALUE with a value in YAML, got {value!r}") from None
    return _wrapped(read)


def assign(into: dict, path: list[str], value: Any) -> None:
    """Set one known key."""
    *way, last = path
    for key in way:
        into = into[key] if isinstance(into.get(key), dict) else {}
    if last not in into:
        raise ValueError(f"--set: there is no {'.'.join(path)}; known here: {', '.join(into) or 'nothing'}")
    if not _fits(value, into[last]):
        raise ValueError(f"--set: expected {'.'.join(path)} like {into[last]!r}, got {value!r}")
    into[last] = value


def _fits(value: Any, known: Any) -> bool:
    """Whether a value is of the kind of the known one; null turns a setting off, and where null stands anything may."""
    if value is None or known is None:
        return True
    if isinstance(known, list):
        return isinstance(value, list) and all(_fits(v, known[0]) for v in value if known)
    kinds = [kind for kind in (bool, (int, float), str, Mapping) if isinstance(known, kind)]
    return isinstance(value, kinds[0]) and isinstance(value, bool) == isinstance(known, bool)


def merge(under: Mapping, over: Mapping) -> Settings:
    """``over`` laid over ``under`` key by key, as a new mapping."""
    merged = {k: v for k, v in under.items() if k not in over}
    for key, value in over.items():
        below = under.get(key)
        merged[key] = merge(below, value) if isinstance(value, Mapping) and isinstance(below, Mapping) else value
    return _wrapped(merged)


def fingerprint(*parts: Any) -> str:
    """Of plain data: runs of other settings are other runs."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _wrapped(value: Any) -> Any:
    if isinstance(value, Mapping):
        return Settings({k: _wrapped(v) for k, v in value.items()})
    return value
