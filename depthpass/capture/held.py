"""What a value holds that a forward may read through it, and that may change in place while the value stays the same object."""

from __future__ import annotations

import functools
import os
import threading
import types
import weakref
from array import array
from collections import ChainMap, UserDict, deque
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from depthpass.capture.code import class_items, is_own, wrapped
from depthpass.capture.structure import is_config

_PLAIN = (type(None), str, int, float, complex, bytes, torch.dtype, torch.device)
_CONTAINERS = (list, set, frozenset, tuple, deque)
ALWAYS_READ = frozenset({"class", "_modules", "_parameters", "_buffers"})
"""Parts of objects that are read under other names: a module's tensors and parts are its attributes."""


@dataclass(frozen=True, slots=True)
class Held:
    """What stands behind a value.

    Attributes:
        kind: what the value is besides its parts, compared by equality.
        table: where the parts are kept: a dictionary, list or set that changes in place; None = they are looked up.
        parts: the values by name or place.
        exact: whether a value with equal parts is as good (plain data), so that it need not be the same object.
        attributes: whether the parts are attributes of an object, which are read by name.
        now: what is looked up at each call where no table says it: slots, the content of an array; None = nothing.
    """

    kind: object
    table: Any
    parts: tuple[tuple[object, Any], ...]
    exact: bool = False
    attributes: bool = False
    now: Callable[[], object] | None = None


def held(value: Any) -> Held | None:
    """What a value holds; None for plain values, tensors, and what belongs to a library.

    Functions hold their defaults and what they close over, classes their attributes, objects of a user's own classes what is
    in their ``__dict__`` and slots, and all three what those hold in turn.
    """
    own = is_own(type(value).__module__)
    if isinstance(value, Tensor | torch.jit.ScriptModule) or (isinstance(value, _PLAIN) and not own):
        return None
    if is_config(value):
        return Held(type(value), value.__dict__, tuple(sorted(value.__dict__.items())), True)
    if isinstance(value, (dict, *_CONTAINERS)):
        return _container(value, own)
    if isinstance(value, types.FunctionType):
        if value is os.getenv:
            return held(os.environ)
        return Held(value.__code__, None, function_parts(value)) if is_own(value.__module__) else None
    if isinstance(value, type):
        if not is_own(value.__module__):
            return None
        meta = (("class", type(value)),) if is_own(type(value).__module__) else ()
        return Held(value, value.__dict__, (*class_items(value).items(), *meta))
    if isinstance(value, nn.Module):
        named = ((n, v) for n, v in value.__dict__.items() if n in ALWAYS_READ or not (n.startswith("_") and n.endswith("hooks")))
        return Held(type(value), value.__dict__, (("class", type(value)), *named), attributes=True)
    if own or type(value) in (types.SimpleNamespace, ChainMap):
        return _object(value)
    return _of_python(value)


def _container(value: Any, own: bool) -> Held:
    if isinstance(value, dict):
        kind, parts = dict, tuple(dict.items(value))  # some make their values anew
    else:
        unordered = isinstance(value, set | frozenset)
        kind, parts = type(value), tuple((None, v) for v in value) if unordered else tuple(enumerate(value))
    if own and hasattr(value, "__dict__"):
        kind, parts = type(value), (*parts, (None, vars(value)))
    return Held(kind, None if isinstance(value, tuple | frozenset) else value, parts, True)


def _object(value: Any) -> Held | None:
    """An object of a user's class, or one that is as open: its ``__dict__``, and the slots of its classes."""
    table = getattr(value, "__dict__", None)
    slots = slots_of(type(value))
    if isinstance(value, types.ModuleType) or (not isinstance(table, dict) and not slots):
        return None
    named = (*(table or {}).items(), *_slot_values(slots, value).items())
    now = functools.partial(_slot_values, slots, value) if slots else None
    return Held(type(value), table, (("class", type(value)), *named), attributes=type(value) is not ChainMap, now=now)


def _of_python(value: Any) -> Held | None:
    """What Python's own objects keep for the code that reads them."""
    if isinstance(value, functools.partial):
        return Held(functools.partial, None, (("func", value.func), ("args", value.args), ("keywords", value.keywords)), True)
    if isinstance(value, types.MethodType):
        return Held(types.MethodType, None, (("self", value.__self__), ("func", value.__func__)), True)
    if inner := wrapped(value):  # properties, methods of classes, caches of functions
        return Held(type(value), None, tuple(("func", f) for f in inner), True)
    if value is os.environ or isinstance(value, types.MappingProxyType | UserDict):  # others compare slowly
        table = value if isinstance(value, types.MappingProxyType) else vars(value)["_data" if value is os.environ else "data"]
        return Held(type(value), table, tuple(table.items()), True)
    now: Callable[[], Any]
    if isinstance(value, array | bytearray | memoryview) or (type(value).__module__ == "numpy" and hasattr(value, "tobytes")):
        now = functools.partial(_content_of, value)
        return Held((type(value), now()), None, (), now=now)
    if isinstance(value, threading.local):  # of this thread
        now = lambda: dict(vars(value))  # noqa: E731
        return Held(type(value), None, tuple(now().items()), now=now)
    if isinstance(value, ContextVar | weakref.ref):
        now = functools.partial(_present, value)
        return Held(type(value), None, ((None, now()),), now=now)
    return None


@functools.cache
def slots_of(cls: type) -> tuple[tuple[str, Any], ...]:
    """The slots of a class and of those it extends, by name."""
    return tuple((n, d) for base in cls.__mro__ for n, d in vars(base).items()
                 if isinstance(d, types.MemberDescriptorType) and is_own(base.__module__))


def _slot_values(slots: tuple[tuple[str, Any], ...], value: Any) -> dict[str, Any]:
    values = {}
    for name, descriptor in slots:
        try:
            values[name] = descriptor.__get__(value)
        except AttributeError:  # not filled
            continue
    return values


def _content_of(value: Any) -> tuple:
    return getattr(value, "shape", None), str(getattr(value, "dtype", "")), bytes(value) if isinstance(
        value, bytearray) else value.tobytes()


def _present(value: Any) -> Any:
    if not isinstance(value, ContextVar):
        return value()
    try:
        return value.get()
    except LookupError:
        return None


def function_parts(function: types.FunctionType) -> tuple[tuple[object, Any], ...]:
    """Defaults of a function, what it closes over, and its attributes."""
    cells = tuple(("cell", _content(c)) for c in function.__closure__ or ())
    return (("defaults", function.__defaults__), ("keywords", function.__kwdefaults__), ("attributes", vars(function)), *cells)


def function_state(function: types.FunctionType) -> dict[str, Any]:
    """What may be put in the place of a part of a function, by the names of :func:`function_parts`."""
    state = {"code": function.__code__, "defaults": function.__defaults__, "keywords": function.__kwdefaults__}
    return state if (cells := function.__closure__) is None else {**state, "cell": tuple(map(_content, cells))}


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None
