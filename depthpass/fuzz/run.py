"""Run a case: build the model, do the checks in their order, and say what was found."""

from __future__ import annotations

import json
import re
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from math import isfinite
from typing import Any

from torch import Tensor, nn

import depthpass as dp
from depthpass.fuzz import models
from depthpass.fuzz.checks import Checks
from depthpass.fuzz.specs import Case
from depthpass.fuzz.subject import Mismatch

ROUNDED = 50.0
"""How many times its limit an error may be for the case to be run again: float32 rounds no more than that."""


def run_case(case: Case) -> dict[str, Any]:
    """Run a case.

    Returns:
        ``result`` (``ok``, ``refused`` or ``fault``); of the latter two ``kind``, what happened in words that stay the same
        for equal causes, and ``message``; of a fault ``where`` too, the last line of depthpass that was running. ``rounding``
        is what did not agree of a case that is ``ok`` once stock code, which casts to float32, casts to float64 instead.
    """
    found = _run(case)
    if found.get("excess", ROUNDED + 1) <= ROUNDED:
        with exact_stock():
            exact = _run(case)
        if exact["result"] == "ok":
            return exact | {"rounding": found["message"]}
    return found


def _run(case: Case) -> dict[str, Any]:
    done: list[str] = []
    refusals: list[str] = []
    with quiet(), sharing_captures():
        try:
            subject = Checks(case)
        except dp.DepthpassError as error:
            return {"result": "refused", "kind": kind_of(error), "message": str(error)[:300], "done": done}
        except Exception as error:
            return fault(error, "transform", done)
        for check in case["checks"]:
            try:
                getattr(subject, check["do"])(check)
                done.append(check["do"])
            except dp.DepthpassError as error:
                refusals.append(f"{check['do']}: {kind_of(error)}")
            except Exception as error:
                return fault(error, check["do"], done)
    result: dict[str, Any] = {"result": "ok" if done else "refused", "done": done, "error": subject.worst}
    if refusals:
        result |= {"kind": refusals[0], "refusals": refusals}
    return result


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings and no progress bars of transformers, which is as talkative as before afterwards."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def fault(error: Exception, check: str, done: list[str]) -> dict[str, Any]:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "depthpass" in f.filename and "/fuzz/" not in f.filename] or frames[-1:]
    where = f"{ours[-1].filename.rsplit('/', 1)[-1]}:{ours[-1].lineno}"
    kind = f"{check}: mismatch" if isinstance(error, Mismatch) else f"{check}: {kind_of(error)}"
    return {"result": "fault", "kind": kind, "message": f"{type(error).__name__}: {error}"[:2000], "where": where, "done": done,
            **({"excess": error.excess} if isinstance(error, Mismatch) and isfinite(error.excess) else {}),
            "trace": "".join(traceback.format_exception(error))[-3000:]}


def kind_of(error: Exception) -> str:
    """Class and message of an error without what is particular to a case."""
    text = re.sub(r"%?[\d.]+|'[^']*'|\([^)]*\)|\[[^]]*\]", "_", str(error).split("\n")[0])
    return f"{type(error).__name__}: {text[:90]}"


@contextmanager
def exact_stock() -> Iterator[None]:
    """``x.float()`` in the code of transformers gives float64: rotary tables and norms of models in float64 go through float32,
    and what rounds differs with the shape of a call. Casts of depthpass stay what they are."""
    real = Tensor.float

    def cast(x: Tensor, *args: Any, **more: Any) -> Tensor:
        of_stock = str(sys._getframe(1).f_globals.get("__name__")).partition(".")[0] == "transformers"
        return x.double() if of_stock else real(x, *args, **more)

    kept = dict(_kept)
    _kept.clear()
    models.stock.cache_clear()
    Tensor.float = cast  # type: ignore[method-assign]
    try:
        yield
    finally:
        del Tensor.float  # which shows the one of its base again
        _kept.clear()
        _kept.update(kept)
        models.stock.cache_clear()


# Captures ---------------------------------------------------------------------------------------------------------

_kept: dict[str, Any] = {}
_SKIP = ("_name_or_path", "architectures", "dtype", "transformers_version", "auto_map", "depthpass")


@contextmanager
def sharing_captures() -> Iterator[None]:
    """Capture equal stock models once in a process: a capture is a function of what the key holds, and takes seconds."""
    import depthpass.hf.model as module

    real = module.capture

    def capture(model: nn.Module, tensors: Any, static: Any) -> Any:
        if any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()):
            return real(model, tensors, static)
        config: Any = model.config
        settings = {k: v for k, v in config.to_dict().items() if k not in _SKIP}
        key = json.dumps(settings, sort_keys=True, default=str) + repr((
            type(model), model.training, sorted((n, t.dtype, t.dim()) for n, t in tensors.items()), tuple(static),
            [(n, p.dtype, tuple(p.shape)) for n, p in model.named_parameters()],
        ))
        if key not in _kept:
            _kept[key] = real(model, tensors, static)
        return _kept[key]

    module.capture = capture
    try:
        yield
    finally:
        module.capture = real
