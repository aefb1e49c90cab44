"""Say why a model could not be traced, in terms of its modules and source lines instead of torch's internals."""

from __future__ import annotations

import inspect
import linecache
import os.path
import traceback
import types
from collections.abc import Iterator
from contextlib import contextmanager

import sympy
from torch import nn
from torch._guards import detect_fake_mode

from depthpass.errors import UnsupportedModelError

_ASKED = {"GuardOnDataDependentSymNode", "DataDependentOutputException", "ConstraintViolationError"}
"""Errors of torch about code that asks for values."""

Frame = tuple[str, int, str]
"""File, line and function of a stack frame."""


def explain(model: nn.Module, error: BaseException, counting: list[str]) -> UnsupportedModelError:
    """The error to raise for a failed trace of a model.

    Args:
        counting: what :func:`watch_sizes` found.
    """
    chain = list(_chain(error))
    name = type(model).__name__
    for cause in chain:
        if isinstance(cause, UnsupportedModelError):
            return cause if str(cause).startswith(name) else UnsupportedModelError(f"{name}: {cause}")
    if counting and any(type(cause).__name__ == "ConstraintViolationError" for cause in chain):
        return UnsupportedModelError(
            f"{name}: {counting[0]} works on the row as a whole: its code depends on how many tokens there are, as that of "
            "state-space and linear-attention layers, convolutions and sliced position tables does. It cannot be run in "
            "chunks of tokens and is not supported."
        )
    frames = [f for cause in chain for f in _frames(cause)]
    owner = _module_of(model, frames)
    if owner is not None and _is_attention(type(owner[1])) and not dispatches(type(owner[1])):
        return attends_by_itself(name, owner[0], owner[1])
    last = chain[-1]
    line = str(last).strip().splitlines()[0] if str(last).strip() else "no message"
    place = locate(model, frames)
    if owner is not None and _is_attention(type(owner[1])) and "mask" in linecache.getline(*owner[2][:2]):
        return UnsupportedModelError(
            f"{name}: {place} edits or reads its attention mask, which a program makes anew for every chunk and visit. Use a "
            "model that hands its mask to transformers' AttentionInterface as it gets it."
        )
    return UnsupportedModelError(
        f"{name}: {place or 'the model'} cannot be traced with torch.export ({type(last).__name__}: {line}).{_advice(chain)}"
    )


def attends_by_itself(name: str, path: str, module: nn.Module) -> UnsupportedModelError:
    """The error about attention that is out of reach."""
    return UnsupportedModelError(
        f"{name}: {path} ({type(module).__name__}) computes attention by itself instead of dispatching it "
        "through transformers' AttentionInterface, so its queries, keys and masks cannot be taken over. Use a model "
        "that does; docs/support.md lists those that are tested."
    )


def _advice(chain: list[BaseException]) -> str:
    """What may be said about the cause: nothing, unless torch itself says that a value was asked for."""
    asked = any(type(cause).__name__ in _ASKED or "data-dependent" in str(cause).lower() for cause in chain)
    return " Layers that branch on data cannot be captured." if asked else ""


@contextmanager
def watch_sizes(model: nn.Module) -> Iterator[list[str]]:
    """Collect the modules whose code, while it is traced, compares the number of tokens with another number."""
    fixed: list[str] = []
    started: dict[nn.Module, int] = {}

    def guards() -> list:
        mode = detect_fake_mode()
        return [] if mode is None or mode.shape_env is None else mode.shape_env.guards

    def before(module, _):
        started[module] = len(guards())

    def hook(path: str):
        def after(module, _, __):
            new = guards()[started.get(module, 0) :]
            # Comparisons of two symbols (the lengths of two inputs) and with 0 and 1 hold for every call.
            if any(abs(n) > 1 for guard in new for n in guard.expr.atoms(sympy.Integer)):
                fixed.append(f"{path or 'the model'} ({type(module).__name__})")

        return after

    handles = [h for path, m in model.named_modules() for h in (
        m.register_forward_pre_hook(before), m.register_forward_hook(hook(path))
    )]
    try:
        yield fixed
    finally:
        for handle in handles:
            handle.remove()


def locate(model: nn.Module, frames: list[Frame]) -> str:
    """``path (Class), file:line in function: `code``` of the innermost frame in one of the model's modules, or ''."""
    owner = _module_of(model, frames)
    if owner is None:
        return ""
    path, module, (file, line, function) = owner
    code = linecache.getline(file, line).strip()
    return f"{path or 'the model'} ({type(module).__name__}), {os.path.basename(file)}:{line} in {function}: `{code}`,"


def dispatches(cls: type) -> bool:
    """Whether a module class calls attention through transformers' registry of attention functions."""
    return any("ALL_ATTENTION_FUNCTIONS" in code.co_names for code in _codes(cls))


def mask_makers(cls: type) -> set[str]:
    """Names of transformers' functions for masks that the code of a class calls."""
    return {n for code in _codes(cls) for n in code.co_names if n.startswith("create_")}


def computes_attention(cls: type) -> bool:
    """Whether a class that calls itself attention takes the softmax with its own code."""
    names = {n for code in _codes(cls) for n in code.co_names}
    return _is_attention(cls) and not names.isdisjoint(("softmax", "scaled_dot_product_attention"))


def _is_attention(cls: type) -> bool:
    return "attention" in cls.__name__.lower() or "attn" in cls.__name__.lower()


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error, then what caused it, outermost first."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or cause.__context__


def _frames(error: BaseException) -> list[Frame]:
    """Frames of a traceback, outermost first."""
    return [(f.f_code.co_filename, line, f.f_code.co_name) for f, line in traceback.walk_tb(error.__traceback__)]


def _module_of(model: nn.Module, frames: list[Frame]) -> tuple[str, nn.Module, Frame] | None:
    """The first module of the model whose code runs in the innermost possible frame."""
    owners: dict[tuple[str, str], list[tuple[types.CodeType, int, str, nn.Module]]] = {}
    seen: set[type] = set()
    for path, module in model.named_modules():
        if type(module) not in seen:
            seen.add(type(module))
            for code in _codes(type(module)):
                end = max((line for _, _, line in code.co_lines() if line), default=0)
                owners.setdefault((code.co_filename, code.co_name), []).append((code, end, path, module))
    for frame in reversed(frames):
        for code, end, path, module in owners.get((frame[0], frame[2]), ()):
            if code.co_firstlineno <= frame[1] <= end:
                return path, module, frame
    return None


def _codes(cls: type) -> Iterator[types.CodeType]:
    """Code of every method of a module class outside torch."""
    for base in cls.__mro__:
        if base.__module__.partition(".")[0] in ("torch", "builtins"):
            continue
        for member in vars(base).values():
            fn = inspect.unwrap(member) if callable(member) else None
            if isinstance(fn, types.FunctionType):
                yield fn.__code__
