"""Trace a stock model once per call signature with ``torch.export``."""

from __future__ import annotations

import copy
import warnings
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from depthpass.capture import attention
from depthpass.errors import UnsupportedModelError

_SIZES = {"batch": 3, "tokens": 7}


@dataclass(frozen=True)
class Traced:
    """An exported model and where its blocks are.

    Attributes:
        program: the exported program (ATen graph, parameters lifted).
        layers: module path of the list of blocks, e.g. ``model.layers``.
        count: number of blocks.
    """

    program: torch.export.ExportedProgram
    layers: str
    count: int


def find_layers(model: nn.Module) -> str:
    """Module path of the list of decoder blocks: the outermost module list with ``num_hidden_layers`` entries.

    Raises:
        UnsupportedModelError: there is no such list, or more than one.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_input_embeddings"):
        raise UnsupportedModelError(
            f"expected a transformers decoder, got {type(model).__name__}: depthpass rewrites PreTrainedModel "
            "decoders (and torch.compile graphs of them)."
        )
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{type(model).__name__} is an encoder-decoder; only decoders are supported.")
    text = config.get_text_config(decoder=True)
    count = getattr(text, "num_hidden_layers", None)
    lists = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    outer = [n for n in lists if not any(n.startswith(o + ".") for o in lists)]
    if len(outer) != 1:
        raise UnsupportedModelError(
            f"{type(model).__name__}: expected one list of {count} blocks, found {outer or 'none'}."
        )
    return outer[0]


def sharing_copy(module: nn.Module) -> nn.Module:
    """Deep copy of a module tree that keeps the very same Parameters and buffers."""
    memo = {id(t): t for t in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, memo)


@contextmanager
def _capture_mode(model: nn.Module, layers: str):
    """Switch a (private) copy of the model to the capture functions and mark the ports of its blocks."""
    attention.register()
    configs = {id(m.config): m.config for m in model.modules() if getattr(m, "config", None) is not None}
    saved = []
    for config in configs.values():
        for key in ("_attn_implementation_internal", "_experts_implementation_internal"):
            if hasattr(config, key):
                saved.append((config, key, getattr(config, key)))
                setattr(config, key, attention.NAME)
    handles = []

    def mark(i: int):
        def before(_, args, kwargs):
            if args:
                return (torch.ops.depthpass.enter(args[0], i), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": torch.ops.depthpass.enter(kwargs["hidden_states"], i)}

        def after(_, args, output):
            if isinstance(output, tuple):
                return (torch.ops.depthpass.leave(output[0], i), *output[1:])
            return torch.ops.depthpass.leave(output, i)

        return before, after

    def final(_, args, output):
        if isinstance(output, tuple):
            return (torch.ops.depthpass.final(output[0]), *output[1:])
        output[0 if isinstance(output, list) else "last_hidden_state"] = torch.ops.depthpass.final(output[0])
        return output

    for i, layer in enumerate(model.get_submodule(layers)):
        before, after = mark(i)
        handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(layer.register_forward_hook(after))
    # The module that owns the blocks returns the base model's last_hidden_state (OPT never calls its base model).
    owner = model.get_submodule(layers.rpartition(".")[0])
    handles.append(owner.register_forward_hook(final))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for config, key, value in saved:
            setattr(config, key, value)


def trace(model: nn.Module, tensors: dict[str, torch.Tensor], static: dict[str, object]) -> Traced:
    """Export ``model.forward(**tensors, **static)`` with symbolic batch and tokens.

    Args:
        model: a private copy; it is put in capture mode for the time of the call.
        tensors: example inputs. Dimension 0 is the batch (or 1, kept static), dimension 1 the tokens.
        static: further keyword arguments, baked in.

    Raises:
        UnsupportedModelError: the model cannot be exported; the cause is attached.
    """
    layers = find_layers(model)
    examples = {}
    dims: dict[str, object] = {}
    batch, tokens = torch.export.Dim("batch", min=1), torch.export.Dim("tokens", min=1)
    for name, t in tensors.items():
        shape = list(t.shape)
        dynamic: dict[int, object] = {}
        if t.dim() >= 1 and shape[0] != 1:
            shape[0], dynamic[0] = _SIZES["batch"], batch
        if t.dim() >= 2:
            shape[1], dynamic[1] = _SIZES["tokens"], tokens
        # A fresh tensor per input: export treats one tensor passed twice as one input.
        fill = torch.ones if t.dtype == torch.bool else torch.zeros
        examples[name] = fill(shape, dtype=t.dtype, device=t.device)
        dims[name] = dynamic
    dims |= dict.fromkeys(static)
    with _capture_mode(model, layers), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            program = torch.export.export(
                model, (), {**examples, **static}, dynamic_shapes=dims, strict=False
            )
        except UnsupportedModelError:
            raise
        except Exception as error:
            cause = _deepest(error)
            if isinstance(cause, UnsupportedModelError):
                raise cause from error
            raise UnsupportedModelError(
                f"{type(model).__name__} cannot be captured with torch.export: {type(cause).__name__}: "
                f"{str(cause).strip().splitlines()[0] if str(cause).strip() else 'no message'}"
            ) from error
    return Traced(program, layers, len(model.get_submodule(layers)))


def _deepest(error: BaseException) -> BaseException:
    seen = set()
    while id(error) not in seen:
        seen.add(id(error))
        error = error.__cause__ or error.__context__ or error
        if isinstance(error, UnsupportedModelError):
            return error
    return error
