"""Arguments of public calls, held against their annotations before anything runs."""

from __future__ import annotations

import functools
import inspect
import math
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral, Real
from typing import Any, Literal, TypeVar, Union

import torch

from depthpass.errors import DepthpassError, InputError, did_you_mean
from depthpass.fields import bound, describe
from depthpass.limits import shown

MANY = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
F = TypeVar("F", bound=Callable[..., Any])


class _Mismatch(Exception):
    """The value does not fit; carries nothing, the caller knows the argument."""


def checked(who: str, error: type[DepthpassError] = InputError, *, but: tuple[str, ...] = ()) -> Callable[[F], F]:
    """Decorator: a call whose arguments do not fit their annotations is refused by name.

    Numbers of numpy become Python's. A bool is no number and a float no integer, whatever Python thinks; numbers are finite.
    Classes and callables are held against what they are, ``Any`` and element types of iterables against nothing.

    Args:
        who: the call in messages.
        error: what is raised.
        but: arguments that the call itself has a better message for.
    """

    def decorate(function: F) -> F:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
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


def check(where: str, value: Any, annotation: Any, error: type[DepthpassError] = InputError) -> Any:
    """The value, numbers of numpy as Python's.

    Raises:
        DepthpassError: of the given class: the value does not fit the annotation.
    """
    try:
        return _fit(value, annotation)
    except _Mismatch:
        raise error(f"{where}: expected {_said(annotation)}, got {shown(value)} ({type(value).__name__})."
                    f"{_near(value, annotation)}") from None


def _fit(value: Any, annotation: Any) -> Any:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any or isinstance(annotation, TypeVar):
        return value
    if origin in (Union, types.UnionType):
        for option in args:
            try:
                return _fit(value, option)
            except _Mismatch:
                continue
        raise _Mismatch
    if origin is Literal:
        return _need(any(type(value) is type(a) and value == a for a in args), value)
    if annotation in (int, float, bool):
        return _number(value, annotation)
    if origin in (tuple, Sequence, list):
        _need(isinstance(value, Sequence) and not isinstance(value, str | bytes), value)
        if origin is tuple and args[-1:] != (Ellipsis,):
            return tuple(_fit(v, a) for v, a in zip(_need(len(value) == len(args), value), args))
        if args and _plain(args[0]):
            return type(value)(_fit(v, args[0]) for v in value) if isinstance(value, list | tuple) else value
        return value
    if annotation is type(None):
        return _need(value is None, value)
    if origin is Callable:
        return _need(callable(value), value)
    kind = origin or annotation
    if kind is Iterable:
        return _need(isinstance(value, Iterable) and not isinstance(value, str | bytes), value)
    return _need(isinstance(value, kind), value) if isinstance(kind, type) else value


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


def _plain(annotation: Any) -> bool:
    return annotation in (int, float, bool, str) or typing.get_origin(annotation) is Literal


def _need(good: bool, value: Any) -> Any:
    if not good:
        raise _Mismatch
    return value


def _said(annotation: Any) -> str:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(_said(a) for a in args)
    if origin is Callable:
        return "a function"
    if origin in (tuple, Sequence, list) and not all(_plain(a) for a in args if a is not Ellipsis):
        return f"a list of {', '.join(getattr(a, '__name__', str(a)) for a in args if a is not Ellipsis)}"
    if isinstance(origin, type) and origin not in (tuple, Sequence, list):
        return f"{'an' if origin.__name__[0] in 'AEIOU' else 'a'} {origin.__name__}"
    if isinstance(annotation, type) and not _plain(annotation) and annotation is not type(None):
        return f"{'an' if annotation.__name__[0] in 'AEIOU' else 'a'} {annotation.__name__}"
    return describe(annotation)


def _near(value: Any, annotation: Any) -> str:
    """The nearest word where words were expected."""
    options = typing.get_args(annotation) if typing.get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    words = [w for o in options if typing.get_origin(o) is Literal for w in typing.get_args(o) if isinstance(w, str)]
    return did_you_mean(value, words) if isinstance(value, str) and words else ""
