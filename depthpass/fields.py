"""Fields and arguments against their annotations: one set of messages for Python, YAML and JSON."""

from __future__ import annotations

import inspect
import math
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Union

from depthpass.errors import DepthpassError, SpecError, did_you_mean
from depthpass.limits import shown


class _Mismatch(Exception):
    """The value does not fit; carries nothing, the caller knows the field."""


def check_field(where: str, value: Any, annotation: Any) -> Any:
    """Return ``value`` in canonical form: lists and ranges become tuples, integers become floats where a float is due.

    Args:
        where: name of the field in messages, e.g. ``turboconn.group``.
        value: what the user gave.
        annotation: a resolved type: int, float, bool, str, None, Literal, tuple, Sequence, and unions of these.

    Raises:
        SpecError: the value does not fit.
    """
    try:
        return _fit(value, annotation)
    except _Mismatch:
        got = f"{shown(value)} ({type(value).__name__})"
        raise SpecError(f"{where}: expected {describe(annotation)}, got {got}.{_hint(value, annotation)}") from None


def integers(value: Any) -> Iterator[int]:
    """The integers of a field's canonical value."""
    if isinstance(value, tuple):
        for v in value:
            yield from integers(v)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield value


def describe(annotation: Any) -> str:
    """Words for an annotation, as used in messages and in the help of a pass."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(a) for a in args)
    if origin is Literal:
        return " or ".join(repr(a) for a in args)
    if origin is Sequence:
        return describe(tuple[args[0], ...])
    if origin is tuple and len(args) == 2 and args[1] is Ellipsis:
        return f"a list of {_bare(args[0])}{'' if typing.get_origin(args[0]) is tuple else 's'}"
    if origin is tuple:
        return f"a list {_bare(annotation)}"
    words = {int: "an integer", float: "a number", bool: "true or false", str: "a string", type(None): "null"}
    return words.get(annotation, str(annotation))


def _bare(annotation: Any) -> str:
    """Words without an article; the members in brackets for a tuple of fixed length."""
    if typing.get_origin(annotation) is tuple:
        return f"({', '.join(_bare(a) for a in typing.get_args(annotation))})"
    return describe(annotation).removeprefix("an ").removeprefix("a ")


def _fit(value: Any, annotation: Any) -> Any:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        return _first_fit(value, args)
    if origin is Literal:
        # `1 == True`, so the type has to agree as well.
        if any(value == a and type(value) is type(a) for a in args):
            return value
        raise _Mismatch
    if origin is Sequence:
        return _fit_tuple(value, (args[0], ...))
    if origin is tuple:
        return _fit_tuple(value, args)
    if annotation is float and isinstance(value, int | float) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            raise _Mismatch from None
        if math.isfinite(number):
            return number
        raise _Mismatch
    if annotation is type(None) and value is None:
        return None
    if isinstance(annotation, type) and type(value) is annotation:
        return value
    raise _Mismatch


def _first_fit(value: Any, options: Sequence[Any]) -> Any:
    for option in options:
        try:
            return _fit(value, option)
        except _Mismatch:
            continue
    raise _Mismatch


def _fit_tuple(value: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple | range):
        raise _Mismatch
    if len(args) == 2 and args[1] is Ellipsis:
        return tuple(_fit(v, args[0]) for v in value)
    if len(value) != len(args):
        raise _Mismatch
    return tuple(_fit(v, a) for v, a in zip(value, args, strict=True))


def _hint(value: Any, annotation: Any) -> str:
    """A remedy where the mistake is recognisable."""
    union = typing.get_origin(annotation) in (Union, types.UnionType)
    options = typing.get_args(annotation) if union else (annotation,)
    if isinstance(value, str):
        literals = [w for o in options if typing.get_origin(o) is Literal for w in typing.get_args(o)]
        words = [w for w in literals if isinstance(w, str)]
        if words:
            return did_you_mean(value, words)
        if any(o in (int, float) for o in options):
            return " Write the number without quotes."
    if isinstance(value, float) and value.is_integer() and int in options:
        return f" Write {int(value)}."
    return ""


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
