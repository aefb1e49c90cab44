"""The model of a search: transformed, in evaluation mode, and refused where layer programs would not be all that it runs."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from depthpass.errors import InputError
from depthpass.ir.program import plain


@contextmanager
def subject(model: Any) -> Iterator[tuple[Any, Any]]:
    """A model that can be switched between layer programs, and the transformed model inside of it; modes are put back.

    Args:
        model: a stock model, which stays untouched, or one transformed with ``Identity`` or a layer program.

    Raises:
        InputError: not a language model, or transformed with another spec.
        UnsupportedModelError: it cannot be transformed.
    """
    from depthpass.hf.model import DepthModel
    from depthpass.hf.transform import transform
    from depthpass.passes.identity import Identity

    if not isinstance(model, nn.Module):
        raise InputError(f"search: expected a model, got {type(model).__name__}.")
    inner: Any = _inner(model)
    if any(p.is_meta for p in model.parameters()):
        raise InputError("search: expected a model with weights, got one on the meta device. Load them first.")
    if not isinstance(inner, DepthModel):
        model = transform(model, Identity())
        inner: Any = _inner(model)
    if not callable(getattr(inner, "generate", None)) or inner._depth.decoder == "":
        raise InputError(f"search: expected a causal language model, with a head, got {type(inner).__name__}. Load it with "
                         "AutoModelForCausalLM.")
    spec = ", ".join(p.label for p in inner._depth.plan.passes)
    if not _only_visits(inner.depth_program):
        raise InputError(f"search: expected a stock model or one transformed with Identity or a layer program, got one with "
                         f"{spec}, which a layer program would replace. Call dp.restore(model) first.")
    visited = tuple(o["index"] for o in inner.depth_program.visits)
    if visited != tuple(range(inner.depth_program.blocks)):
        warnings.warn(f"search: this model runs {spec}, while a search starts from each block once, in order: its stock "
                      "score is that of dp.restore(model). To search around the model's own visits, give dp.materialize(model).",
                      UserWarning, stacklevel=5)
    module: Any = inner
    modes = {m: m.training for m in module.modules()}
    module.eval()
    try:
        yield model, inner
    finally:
        for part, training in modes.items():
            part.training = training


def _inner(model: Any) -> Any:
    base = getattr(model, "get_base_model", None)
    return base() if callable(base) else model


def _only_visits(program: Any) -> bool:
    """Whether a program is nothing but visits of stock blocks one after another."""
    stock = {o.kind for o in plain(program.model, program.blocks, program.width)}
    own = all(o["keys"] is None and o["gate"] is None and o["lora"] is None and o["modulate"] is None for o in program.visits)
    return own and {o.kind for o in program} <= stock
