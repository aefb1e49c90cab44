"""What a value holds that a forward may read through it, and that may change in place while the value stays the same object."""

from __future__ import annotations

import functools
import types
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from depthpass.capture.code import class_items, is_own
from depthpass.capture.structure import is_config

_PLAIN = (type(None), str, int, float, bytes, torch.dtype, torch.device, Tensor, nn.Module)


@dataclass(frozen=True, slots=True)
class Held:
    """What stands behind a value.

    Attributes:
        kind: what the value is besides its parts, compared by equality.
        table: where the parts are kept: a dictionary, list or set that changes in place; None = they are looked up.
        parts: the values by name or place.
        exact: whether a value with equal parts is as good (plain data), so that it need not be the same object.
        attributes: whether the parts are attributes of an object, which are read by name.
    """

    kind: object
    table: Any
    parts: tuple[tuple[object, Any], ...]
    exact: bool = False
    attributes: bool = False


def held(value: Any) -> Held | None:
    """What a value holds; None for plain values, tensors, modules, and what belongs to a library.

    Functions hold their defaults and what they close over, classes their attributes, objects of a user's own classes their
    ``__dict__``, and all three what those hold in turn.
    """
    if isinstance(value, _PLAIN):
        return None
    if is_config(value):
        return Held(type(value), value.__dict__, tuple(sorted(value.__dict__.items())), True)
    if isinstance(value, dict):
        return Held(dict, value, tuple(dict.items(value)), True)  # some make their values anew
    if isinstance(value, list | set | tuple):
        names = enumerate(value) if not isinstance(value, set) else ((None, v) for v in value)
        return Held(type(value), None if isinstance(value, tuple) else value, tuple(names), True)
    if isinstance(value, functools.partial):
        return Held(functools.partial, None, (("func", value.func), ("args", value.args), ("keywords", value.keywords)), True)
    if isinstance(value, types.MethodType):
        return Held(types.MethodType, None, (("self", value.__self__), ("func", value.__func__)), True)
    if isinstance(value, types.FunctionType):
        return Held(value.__code__, None, function_parts(value)) if is_own(value.__module__) else None
    if isinstance(value, type):
        return Held(value, value.__dict__, tuple(class_items(value).items())) if is_own(value.__module__) else None
    if is_own(type(value).__module__) or type(value) is types.SimpleNamespace:
        parts = getattr(value, "__dict__", None)
        if isinstance(parts, dict) and not isinstance(value, types.ModuleType):
            return Held(type(value), parts, (("class", type(value)), *parts.items()), attributes=True)
    return None


def function_parts(function: types.FunctionType) -> tuple[tuple[object, Any], ...]:
    """Defaults of a function and what it closes over."""
    cells = tuple(("cell", _content(c)) for c in function.__closure__ or ())
    return (("defaults", function.__defaults__), ("keywords", function.__kwdefaults__), *cells)


def function_state(function: types.FunctionType) -> tuple:
    """What may be put in the place of a part of a function: compared at every call."""
    cells = function.__closure__
    state = (function.__code__, function.__defaults__, function.__kwdefaults__)
    return state if cells is None else (*state, *map(_content, cells))


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None
