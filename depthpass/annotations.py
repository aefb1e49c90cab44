"""Values against annotations: arguments of public calls and fields of a spec, one set of rules and of messages."""

from __future__ import annotations

import functools
import inspect
import math
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from numbers import Integral, Real
from typing import Any, Literal, TypeVar, Union

from depthpass.errors import DepthpassError, InputError, SpecError, did_you_mean
from depthpass.limits import shown

MANY = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
UNIONS, LISTS = (Union, types.UnionType), (tuple, Sequence, list)
WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "a string", type(None): "null"}
F = TypeVar("F", bound=Callable[..., Any])


class _Mismatch(Exception):
    """The value does not fit; carries nothing, the caller knows its name."""


def checked(who: str, error: type[DepthpassError] = InputError, *, but: tuple[str, ...] = ()) -> Callable[[F], F]:
    """Decorator: a call whose arguments do not fit their annotations is refused by name.

    Numbers of numpy become Python's. A bool is no number and a float no integer, whatever Python thinks; numbers are finite.
    Classes and callables are held against what they are, ``Any`` and element types of iterables against nothing.

    Args:
        who: the call in messages.
        error: what is raised.
        but: arguments that the call itself has a better message for.
    """
    from torch.compiler import is_compiling  # here, so that a list of the passes does without torch

    def decorate(function: F) -> F:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if is_compiling():
                return function(*args, **kwargs)
            given = bound(who, signature, args, kwargs, error)
            for name, annotation in _annotations(function).items():
                if name in given.arguments and name not in but and signature.parameters[name].kind not in MANY:
                    given.arguments[name] = check(f"{who}: {name}", given.arguments[name], annotation, error)
            return function(*given.args, **given.kwargs)

        return typing.cast(F, call)

    return decorate


@functools.cache
def _annotations(function: Any) -> dict[str, Any]:
    return {n: a for n, a in typing.get_type_hints(function).items() if n != "return" and a is not Any}


def bound(
    who: str, signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any], error: type[DepthpassError]
) -> inspect.BoundArguments:
    """The arguments of a call by name.

    Raises:
        DepthpassError: of the given class: an argument is missing, given twice, or not known.
    """
    try:
        return signature.bind(*args, **kwargs)
    except TypeError as problem:
        known = [n for n in signature.parameters if n != "self"]
        unknown = next((k for k in kwargs if k not in known), None)
        near = "" if unknown is None else did_you_mean(unknown, known)
        raise error(f"{who}: {problem}.{near} Known: {', '.join(known) or 'none'}.") from None


def check(where: str, value: Any, annotation: Any, error: type[DepthpassError] = InputError, *, plain: bool = False) -> Any:
    """The value, numbers of numpy as Python's.

    Args:
        where: the argument or field in messages, e.g. ``turboconn.group``.
        value: what the user gave.
        annotation: a resolved annotation.
        error: what is raised.
        plain: whether the value becomes plain data: lists and ranges become tuples, and nothing but such data fits.

    Raises:
        DepthpassError: of the given class: the value does not fit the annotation.
    """
    try:
        return _fit(value, annotation, plain)
    except _Mismatch:
        raise error(f"{where}: expected {describe(annotation)}, got {shown(value)} ({type(value).__name__})."
                    f"{_hint(value, annotation)}") from None


def check_field(where: str, value: Any, annotation: Any) -> Any:
    """The canonical form of a field of a spec: lists and ranges become tuples, integers floats where a float is due.

    Raises:
        SpecError: the value does not fit.
    """
    return check(where, value, annotation, SpecError, plain=True)


def integers(value: Any) -> Iterator[int]:
    """The integers of a field's canonical value."""
    if isinstance(value, tuple):
        for v in value:
            yield from integers(v)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield value


def _fit(value: Any, annotation: Any, plain: bool) -> Any:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any or isinstance(annotation, TypeVar):
        return value
    if origin in UNIONS:
        for option in args:
            try:
                return _fit(value, option, plain)
            except _Mismatch:
                continue
        raise _Mismatch
    if origin is Literal:  # `1 == True`, so the type has to agree as well
        return _need(any(type(value) is type(a) and value == a for a in args), value)
    if annotation in (int, float, bool):
        return _number(value, annotation)
    if origin in LISTS:
        return _items(value, origin, args, plain)
    if annotation is type(None):
        return _need(value is None, value)
    if plain:
        return _need(type(value) is annotation, value)
    if origin is Callable:
        return _need(callable(value), value)
    kind = origin or annotation
    if kind is Iterable:
        return _need(isinstance(value, Iterable) and not isinstance(value, str | bytes), value)
    return _need(isinstance(value, kind), value) if isinstance(kind, type) else value


def _items(value: Any, origin: Any, args: tuple[Any, ...], plain: bool) -> Any:
    kinds = (list, tuple, range) if plain else (Sequence,)
    _need(isinstance(value, kinds) and not isinstance(value, str | bytes), value)
    if origin is tuple and args[-1:] != (Ellipsis,):
        return tuple(_fit(v, a, plain) for v, a in zip(_need(len(value) == len(args), value), args))
    if plain:
        return tuple(_fit(v, args[0], plain) for v in value)
    if args and _simple(args[0]) and isinstance(value, list | tuple):
        return type(value)(_fit(v, args[0], plain) for v in value)
    return value


def _number(value: Any, kind: type) -> Any:
    if kind is bool:
        return bool(_need(isinstance(value, bool) or type(value).__name__ in ("bool_", "bool"), value))  # numpy's as well
    if isinstance(value, bool):
        raise _Mismatch
    if kind is int:
        return int(_need(isinstance(value, Integral), value))
    try:
        return float(_need(isinstance(value, Real) and math.isfinite(value), value))
    except OverflowError:
        raise _Mismatch from None


def _need(good: bool, value: Any) -> Any:
    if not good:
        raise _Mismatch
    return value


def _simple(annotation: Any) -> bool:
    return annotation in (int, float, bool, str) or typing.get_origin(annotation) is Literal


def describe(annotation: Any) -> str:
    """Words for an annotation, as used in messages and in the help of a pass."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in UNIONS:
        return " or ".join(describe(a) for a in args)
    if origin is Literal:
        return " or ".join(repr(a) for a in args)
    if origin is Callable:
        return "a function"
    if origin in LISTS:
        return _list(origin, args)
    name = getattr(origin or annotation, "__name__", str(annotation))
    return WORDS.get(annotation, f"{'an' if name[0] in 'AEIOU' else 'a'} {name}")


def _list(origin: Any, args: tuple[Any, ...]) -> str:
    if origin is tuple and args[-1:] != (Ellipsis,):
        return f"a list {_bare(tuple[args])}"
    return f"a list of {_bare(args[0])}{'s' if args[0] in WORDS else ''}" if args else "a list"


def _bare(annotation: Any) -> str:
    """Words without an article; the members in brackets for a tuple of fixed length."""
    if typing.get_origin(annotation) is tuple:
        return f"({', '.join(_bare(a) for a in typing.get_args(annotation))})"
    return describe(annotation).removeprefix("an ").removeprefix("a ")


def _hint(value: Any, annotation: Any) -> str:
    """A remedy where the mistake is recognisable."""
    options = typing.get_args(annotation) if typing.get_origin(annotation) in UNIONS else (annotation,)
    if isinstance(value, str):
        words = [w for o in options if typing.get_origin(o) is Literal for w in typing.get_args(o) if isinstance(w, str)]
        if words:
            return did_you_mean(value, words)
        if any(o in (int, float) for o in options):
            return " Write the number without quotes."
    if isinstance(value, float) and value.is_integer() and int in options:
        return f" Write {int(value)}."
    return ""
