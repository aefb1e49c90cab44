"""What the code of module classes can look up besides its arguments: attributes of the classes, globals of their modules."""

from __future__ import annotations

import functools
import inspect
import re
import sys
import types
from collections.abc import Iterable, Iterator
from typing import Any

_NAME = re.compile(r"\w+")
_BASES = ("transformers.modeling_utils", "transformers.generation", "transformers.utils", "transformers.integrations",
          "transformers.distributed", "contextlib", "torch")
"""Modules under the classes of all models: what their functions look up decides nothing about a forward."""


_LIBRARIES = frozenset(sys.stdlib_module_names) | {
    "torch", "transformers", "accelerate", "peft", "numpy", "depthpass", "depthpass_lowering", "depthpass_kernels", "torchao",
    "triton", "sympy", "trl", "nnsight",
}


_ASIDE = frozenset(f"__{n}__" for n in (
    "init new init_subclass post_init repr str format eq ne hash lt le gt ge setattr delattr set delete set_name reduce "
    "reduce_ex getstate setstate copy deepcopy dir sizeof del replace"
).split())
"""Methods that mention attributes to make, print, compare or copy an object."""


def is_own(module: object) -> bool:
    """Whether code of a module is a user's, which may keep what it reads anywhere; no library's, which keeps it in modules."""
    return isinstance(module, str) and (module == "__main__" or module.partition(".")[0] not in _LIBRARIES)


def own_bases(cls: type) -> tuple[type, ...]:
    """The classes of a module's MRO that a library or user may have changed: all but torch's own and Python's."""
    return tuple(b for b in cls.__mro__ if b.__module__.partition(".")[0] not in ("torch", "builtins", "typing", "abc"))


def class_items(base: type) -> dict[str, Any]:
    """What a class defines that a forward may use."""
    return {n: v for n, v in base.__dict__.items() if not n.startswith("__") or (n not in _ASIDE and any(_functions(v)))}


@functools.cache
def globals_read(cls: type) -> tuple[tuple[dict[str, Any], tuple[str, ...]], ...]:
    """The globals that methods of a class read, by the dictionary they are in; through functions of the same module too."""
    tables: dict[int, tuple[dict[str, Any], set[str]]] = {}
    todo = [f for base in own_bases(cls) for v in vars(base).values() for f in _functions(v)]
    seen: set[types.CodeType] = set()
    while todo:
        function = todo.pop()
        home = function.__module__
        if function.__code__ in seen or home not in sys.modules or home.startswith(_BASES):
            continue
        seen.add(function.__code__)
        for _, value in _looked_up(function, tables):
            todo += [f for f in _functions(value) if f.__module__ == function.__module__]
    for function in _functions(getattr(cls, "forward", None)):  # of torch's own classes: F.linear may have been replaced, too
        for _ in _looked_up(function, tables):
            pass
    return tuple((table, tuple(sorted(names))) for table, names in tables.values() if names)


def function_globals(function: types.FunctionType) -> list[tuple[dict[str, Any], tuple[str, ...]]]:
    """The globals that a function itself reads, by the dictionary they are in."""
    tables: dict[int, tuple[dict[str, Any], set[str]]] = {}
    for _ in _looked_up(function, tables):
        pass
    return [(table, tuple(names)) for table, names in tables.values()]


def _looked_up(
    function: types.FunctionType, tables: dict[int, tuple[dict[str, Any], set[str]]]
) -> Iterator[tuple[str, Any]]:
    """The globals of a function that its code names, and those of the modules among them (``nn.functional.silu``)."""
    mentioned, todo, seen = _names(function.__code__), [function.__globals__], set()
    while todo:
        table = todo.pop()
        seen.add(id(table))
        if table.get("__name__") == "torch.compiler":  # its flags say that something is traced, in whichever thread
            continue
        names = tables.setdefault(id(table), (table, set()))[1]
        for name in mentioned & table.keys():
            names.add(name)
            value = table[name]
            if isinstance(value, types.ModuleType) and id(vars(value)) not in seen:
                todo.append(vars(value))
            yield name, value


@functools.cache
def mentions(cls: type) -> tuple[frozenset[str], frozenset[str]]:
    """Attribute names that the code of a class mentions, and pieces of names that it may put together (f-strings)."""
    return mentioned(f for base in cls.__mro__[:-1] for v in vars(base).values() for f in _functions(v))


def mentioned(functions: Iterable[types.FunctionType]) -> tuple[frozenset[str], frozenset[str]]:
    """As :func:`mentions`, of functions."""
    names: set[str] = set()
    pieces: set[str] = set()
    for code in (c for f in functions for c in _codes(f.__code__)):
        names |= {*code.co_names, *code.co_freevars}
        texts = _texts(code)
        names |= texts
        pieces |= {t for t in texts if (t[0] == "_" or t[-1] == "_") and len(t) > 2}
    return frozenset(names), frozenset(pieces)


def wrapped(value: object) -> tuple[Any, ...]:
    """What Python's own wrappers of functions hold: properties, methods of classes, caches."""
    if isinstance(value, property):
        return () if value.fget is None else (value.fget,)
    if isinstance(value, functools.cached_property):
        return (value.func,)
    if isinstance(value, classmethod | staticmethod | functools._lru_cache_wrapper):
        return (value.__wrapped__,)
    return ()


def _functions(value: object) -> Iterator[types.FunctionType]:
    """The Python functions behind what a class or a module defines."""
    for part in wrapped(value) or (value,):
        if isinstance(part, types.FunctionType):
            yield part
            inner = inspect.unwrap(part)
            if inner is not part and isinstance(inner, types.FunctionType):
                yield inner


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _names(code: types.CodeType) -> set[str]:
    names = {n for c in _codes(code) for n in c.co_names}
    return names | {t for c in _codes(code) for t in _texts(c)} if "globals" in names or "__globals__" in names else names


def _texts(code: types.CodeType) -> set[str]:
    """Strings in code that may be names."""
    texts = (t for c in code.co_consts for t in (c if isinstance(c, tuple) else (c,)) if isinstance(t, str))
    return {t for t in texts if _NAME.fullmatch(t)}
