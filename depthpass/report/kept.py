"""What the command line keeps of a config between calls: the facts and counts of the stock model.

Finding them takes transformers' model code, the model on the meta device and a trace of it: most of the time of a report. They
depend on the config's fields, on the code of the architecture, on ours, and on the versions of Python, torch and transformers.
All of these are in the name of the file, so a file is never stale, only unused. Files are JSON, and only names that stand here
are read from them. What cannot be read, was written by somebody else or is damaged is counted anew.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from depthpass.log import fallback, logger
from depthpass.passes.base import Context

if TYPE_CHECKING:
    from depthpass.analysis.cost import ModelCost
    from depthpass.hf.facts import ModelFacts

VARIABLE = "DEPTHPASS_CACHE"
"""Environment variable: a folder to keep files in, or ``off``."""

MOST = 256
"""Files that are kept; the oldest go first."""


@dataclass(frozen=True)
class Kept:
    """What reports need of a stock model, without the model."""

    facts: ModelFacts
    context: Context
    cost: ModelCost | None = None


def folder() -> Path | None:
    """Where files are kept; None when nothing is kept."""
    chosen = os.environ.get(VARIABLE, "")
    if chosen.lower() in ("off", "0", "no", "false"):
        return None
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "depthpass"


def usable() -> bool:
    """Whether anything is kept for this process: one that has imported model code may have registered or patched classes."""
    return folder() is not None and "transformers.modeling_utils" not in sys.modules


def key_of(config: Mapping[str, Any]) -> str | None:
    """The name of a config's file; None where the model's code may be other than transformers' own."""
    kind = config.get("model_type")
    if not usable() or not isinstance(kind, str) or "auto_map" in config:
        return None
    module = importlib.util.find_spec("transformers")
    if module is None or module.origin is None:
        return None
    library, name = Path(module.origin).parent, kind.replace("-", "_")
    # The text half of a model for images and text stands in the folder of the whole.
    code = next((f for n in (name, name.removesuffix("_text")) if (f := library / "models" / n).is_dir()), None)
    if code is None:
        return None
    versions = [sys.version, *(metadata.version(name) for name in ("torch", "transformers", "sympy"))]
    edited = [(p.name, (s := p.stat()).st_size, s.st_mtime_ns) for p in sorted(library.glob("*.py"))]
    text = json.dumps([versions, edited, _own_code(), _digest(code.glob("*.py")), config], sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def _own_code() -> str:
    root = Path(__file__).parents[1]
    return _digest(p for room in ("capture", "analysis/cost", "hf", "report") for p in (root / room).rglob("*.py"))


def _digest(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def read(key: str) -> Kept | None:
    """What was kept under a name, or None."""
    place = folder()
    file = None if place is None else place / f"{key}.json"
    if file is None or not file.is_file():
        return None
    try:
        if not _is_ours(file):
            raise ValueError("it belongs to another user, or others may write to it")
        stored = _Reader(json.loads(file.read_text(encoding="utf-8"))).value()
        if not isinstance(stored, Kept):
            raise ValueError(f"it holds a {type(stored).__name__}")
    except Exception as error:  # a file that cannot be used must never be in the way of a report
        fallback(f"{file} is not used, so the config is counted anew: {type(error).__name__}: {error}", asked=False)
        return None
    logger.debug("counts of the stock model are from %s", file)
    return stored


def write(key: str, kept: Kept) -> None:
    """Keep something under a name; where that fails nothing is kept."""
    place = folder()
    if place is None:
        return
    try:
        text = json.dumps(_Writer().whole(kept))
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=place, suffix=".part")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(name, place / f"{key}.json")
        for old in sorted(place.glob("*.json"), key=lambda p: p.stat().st_mtime)[:-MOST]:
            old.unlink(missing_ok=True)
    except (OSError, TypeError) as error:
        fallback(f"nothing is kept in {place}, so the next command counts anew: {error}", asked=bool(os.environ.get(VARIABLE)))


def _is_ours(file: Path) -> bool:
    if not hasattr(os, "getuid"):
        return True
    return all(s.st_uid == os.getuid() and not s.st_mode & 0o022 for s in (file.stat(), file.parent.stat()))


@cache
def _classes() -> dict[str, type]:
    from depthpass.analysis.cost.flops import Count
    from depthpass.analysis.cost.memory import Memory
    from depthpass.analysis.cost.stock import ModelCost, PartCost, Weights
    from depthpass.analysis.cost.symbols import AttentionSite
    from depthpass.hf.facts import ModelFacts

    known = (Kept, Context, ModelFacts, ModelCost, PartCost, Weights, Count, Memory, AttentionSite)
    return {cls.__name__: cls for cls in known}


@cache
def _terms() -> dict[str, Callable[..., Any]]:
    import sympy as sp

    return {cls.__name__: cls for cls in (sp.Add, sp.Mul, sp.Pow, sp.Min, sp.Max, sp.floor, sp.ceiling, sp.Mod)}


class _Writer:
    """Values as JSON: a list that begins with what it is. Counts, which equal blocks share, are written once."""

    def __init__(self) -> None:
        self.shared: list[Any] = []
        self.places: dict[int, int] = {}

    def whole(self, value: Any) -> dict[str, Any]:
        written = self.value(value)
        return {"shared": self.shared, "value": written}

    def value(self, value: Any) -> Any:
        import sympy as sp
        import torch

        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, sp.Basic):
            return self.term(value)
        if isinstance(value, torch.dtype):
            return ["dtype", str(value).removeprefix("torch.")]
        if isinstance(value, tuple | list):
            return ["tuple", *map(self.value, value)]
        if isinstance(value, Mapping):
            return ["map", {str(k): self.value(v) for k, v in value.items()}]
        name = type(value).__name__
        if not is_dataclass(value) or name not in _classes():
            raise TypeError(f"a {name} cannot be kept")
        if name == "Count" and id(value) in self.places:
            return ["shared", self.places[id(value)]]
        written = ["is", name, {f.name: self.value(getattr(value, f.name)) for f in fields(value) if f.name != "config"}]
        if name != "Count":
            return written
        self.places[id(value)] = len(self.shared)
        self.shared.append(written)
        return ["shared", self.places[id(value)]]

    def term(self, value: Any) -> Any:
        import sympy as sp

        if isinstance(value, sp.Rational):
            return ["number", str(value.p), str(value.q)]
        if isinstance(value, sp.Symbol) and value.name in _symbols():
            return ["symbol", value.name]
        if type(value).__name__ not in _terms():
            raise TypeError(f"a {type(value).__name__} cannot be kept")
        return ["term", type(value).__name__, *map(self.term, value.args)]


class _Reader:
    """The way back."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.data = data
        self.shared: list[Any] = []
        self.shared = [self.of(v) for v in data["shared"]]

    def value(self) -> Any:
        return self.of(self.data["value"])

    def of(self, data: Any) -> Any:
        import sympy as sp
        import torch

        if not isinstance(data, list):
            return data
        match data:
            case ["number", p, q]:
                return sp.Rational(int(p), int(q))
            case ["symbol", name]:
                return _symbols()[name]
            case ["term", name, *args]:
                return _terms()[name](*map(self.of, args))
            case ["tuple", *items]:
                return tuple(map(self.of, items))
            case ["map", items]:
                return {k: self.of(v) for k, v in items.items()}
            case ["shared", place]:
                return self.shared[place]
            case ["dtype", str(name)] if isinstance(dtype := getattr(torch, name, None), torch.dtype):
                return dtype
            case ["is", name, items]:
                return _classes()[name](**{k: self.of(v) for k, v in items.items()})
        raise ValueError(f"{data[:1]} means nothing")


@cache
def _symbols() -> dict[str, Any]:
    from depthpass.analysis.cost.symbols import B, n

    return {s.name: s for s in (B, n)}
