"""Options of a pass: which were given, how they are shown, and what is said of wrong ones."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import MISSING, Field, fields
from typing import TYPE_CHECKING, Any

from depthpass.annotations import bound
from depthpass.errors import SpecError
from depthpass.limits import shown

if TYPE_CHECKING:
    from depthpass.passes.base import Pass


def options(p: Pass) -> dict[str, Any]:
    """Options of a pass that have no default or differ from it, in field order."""
    return {f.name: v for f in fields(p) if (v := getattr(p, f.name)) != default_of(f) or default_of(f) is MISSING}


def told(p: Pass, also: Iterable[str | None] = ()) -> dict[str, Any]:
    """Options that were given, and those named in ``also`` whatever they are, in field order."""
    names = {*options(p), *also}
    return {f.name: getattr(p, f.name) for f in fields(p) if f.name in names}


def as_python(p: Pass) -> str:
    """Python that makes an equal pass: what was given or says what the pass does, defaults left out."""
    return f"{type(p).__name__}({', '.join(f'{k}={v!r}' for k, v in told(p, (*p.shown, p.loop_field)).items())})"


def default_of(f: Field[Any]) -> Any:
    """Default of a dataclass field, or ``MISSING``."""
    return f.default if f.default_factory is MISSING else f.default_factory()


def short(value: object) -> str:
    """A value in at most 30 characters."""
    text = str(list(value)) if isinstance(value, tuple) else str(value)
    return text if len(text) <= 30 else text[:27] + "..."


def require(ok: bool, where: str, expected: str, got: object, remedy: str = "") -> None:
    """Raise the one shape of spec error unless ``ok``."""
    if not ok:
        raise SpecError(f"{where}: expected {expected}, got {shown(got)}.{' ' + remedy if remedy else ''}")


class Named(type):
    """Makes passes: an option that is missing or unknown is an error of the spec, as it is in YAML."""

    if not TYPE_CHECKING:  # checkers read the options from the fields

        def __call__(cls, *args, **kwargs):
            signature = inspect.signature(cls.__init__)
            bound(cls.name or cls.__name__, signature, (None, *args), kwargs, SpecError)
            return super().__call__(*args, **kwargs)
