"""The journal of a search: every scored program in a file, from which a search that was stopped goes on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from depthpass.errors import InputError
from depthpass.limits import shown
from depthpass.search.damped import Damped, data_of
from depthpass.search.space import Layers

SCHEMA = {"schema": "depthpass.search.journal", "version": 1}
PASSING = {"_name_or_path", "architectures", "depthpass", "dtype", "torch_dtype", "transformers_version"}
"""What a config says of where it comes from, and what the model runs outside of the search; dtypes are those of the weights."""


class Journal:
    """Scores of programs on samples in a file of JSON lines: what is searched, then a line for each, written when it is known.

    A line that a stop has cut off is dropped, all before it are whole. Numbers are read back to the bit.

    Args:
        path: of the file; a new one is made by :meth:`begin`.

    Attributes:
        known: the scores by program and places of samples.
        asked, ran: block calls behind them, as the prefix memo counts.

    Raises:
        InputError: the file is no journal, is damaged, or its folder is missing.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.known: dict[tuple[Layers, tuple[int, ...]], tuple[float, ...]] = {}
        self.asked = self.ran = 0
        if self.path.is_dir() or not self.path.parent.is_dir():
            raise InputError(f"resume: expected a file in a folder that exists, got {str(self.path)!r}.")
        content = self.path.read_bytes() if self.path.exists() else b""
        self.whole, self.cut = content[: content.rfind(b"\n") + 1], not content.endswith(b"\n")
        self.settings = self._read(self.whole.splitlines()) if content else None

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Compare what is searched with what the file was written for, or write a new file.

        Raises:
            InputError: naming the first thing that differs.
        """
        settings = json.loads(json.dumps(settings))
        if self.settings is None:
            self._replace(_line({**SCHEMA, "settings": settings}))
            return
        for name, value in settings.items():
            before = self.settings.get(name)
            if before != value:
                raise InputError(f"resume: {str(self.path)!r} is of a search with other {name}: expected {_brief(before)}, got "
                                 f"{_brief(value)}. Go on with what it was begun with (budget, memo and batch may differ), or "
                                 "name a new file.")
        if self.cut:
            self._replace(self.whole)

    def add(self, layers: Layers, rows: tuple[int, ...], values: tuple[float, ...], asked: int, ran: int) -> None:
        """Append a score; ``rows`` are neighbours, as the samples of a search are."""
        line = _line({**data_of(layers), "rows": [rows[0], rows[-1] + 1], "values": values, "asked": asked, "ran": ran})
        with self.path.open("ab", buffering=0) as file:
            file.write(line)
            os.fsync(file.fileno())

    def _read(self, lines: list[bytes]) -> dict[str, Any]:
        try:
            head = json.loads(lines[0])
            good = {name: head.get(name) for name in SCHEMA} == SCHEMA and isinstance(head["settings"], dict)
        except (IndexError, ValueError, KeyError, AttributeError):
            good, head = False, {}
        if not good:
            raise InputError(f"resume: expected a file that a search has written with resume=, or a new name, got "
                             f"{str(self.path)!r}, which holds something else. It was left as it is.")
        for number, line in enumerate(lines[1:], 2):
            try:
                entry = json.loads(line)
                layers, values = _layers(entry, head["settings"]["model"]["blocks"]), tuple(map(float, entry["values"]))
                self.known[layers, tuple(range(*entry["rows"]))] = values
                self.asked, self.ran = self.asked + entry["asked"], self.ran + entry["ran"]
            except (ValueError, KeyError, TypeError, AttributeError):
                raise InputError(f"resume: line {number} of {str(self.path)!r} is damaged: expected a scored program, got "
                                 f"{shown(line[:80])}. Take the line out, its program is run again.") from None
        return head["settings"]

    def _replace(self, content: bytes) -> None:
        draft = self.path.with_name(self.path.name + ".part")
        draft.write_bytes(content)
        os.replace(draft, self.path)


def identity(live: Any, model: Any) -> dict[str, Any]:
    """What tells a model from another one: its class, blocks, config and the bits of its weights.

    Args:
        live: the model with what is wrapped around it, adapters for example.
        model: the transformed one inside of it.
    """
    config = model.config
    text = json.dumps(_lasting(config.to_dict()), sort_keys=True, default=repr)
    code = hashlib.sha256(f"{text} {getattr(config, '_attn_implementation', None)}".encode())
    said = getattr(model, "generation_config", None)
    code.update(json.dumps(_lasting({} if said is None else said.to_dict()), sort_keys=True, default=repr).encode())
    facts = {"class": type(model).__name__, "blocks": model.depth_program.blocks, "config": code.hexdigest()}
    return {"model": facts, "weights": weights(live)}


def weights(model: Any) -> str:
    """A digest of all parameters and buffers, adapters included."""
    code = hashlib.sha256()
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()], key=lambda pair: pair[0]):
        code.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        for part in _parts(tensor.detach()):
            code.update(part.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return code.hexdigest()


def digest(rows: Iterable[Any]) -> str:
    return hashlib.sha256(json.dumps(list(rows)).encode()).hexdigest()


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors of which quantised ones consist."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _parts(getattr(tensor, name))


def _lasting(data: Any) -> Any:
    if isinstance(data, dict):
        return {str(k): _lasting(v) for k, v in data.items() if k not in PASSING}
    return data


def _layers(entry: Mapping[str, Any], blocks: int) -> Layers:
    if "damped" in entry:
        return Damped(blocks, **entry["damped"])
    return tuple(map(int, entry["layers"]))


def _line(data: Mapping[str, Any]) -> bytes:
    return json.dumps(data).encode() + b"\n"


def _brief(value: Any) -> str:
    return f"{value[:12]}.." if isinstance(value, str) and len(value) == 64 else shown(value)
