"""Trace a stock model once per call signature with ``torch.export``."""

from __future__ import annotations

import copy
import inspect
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from torch.overrides import TorchFunctionMode

from depthpass.capture import attention
from depthpass.capture.code import is_own
from depthpass.capture.derivatives import own_backwards
from depthpass.capture.explain import explain, watch_sizes
from depthpass.capture.functional import drop_void_writes, functionalise
from depthpass.capture.lines import innermost_forwards
from depthpass.capture.places import as_given
from depthpass.capture.repeats import Repeats
from depthpass.capture.screen import block_list, find_layers
from depthpass.capture.tidy import tidy
from depthpass.capture.traced import Traced, from_export
from depthpass.errors import InputError, UnsupportedModelError

__all__ = ["find_layers", "sharing_copy", "trace"]

_SIZES = {"batch": 3, "tokens": 7}


def sharing_copy(module: nn.Module, shared: Iterable[object] = ()) -> nn.Module:
    """Deep copy of a module tree that keeps the very same Parameters and buffers.

    Attributes that are results of computations (weights that pruning or weight norm make anew in front of each forward) cannot
    be copied, and are kept, too.

    Args:
        shared: further objects that the copy keeps.

    Raises:
        UnsupportedModelError: naming an attribute that cannot be copied (a lock, a generator, an open file).
    """
    results = (x for m in module.modules() for x in m.__dict__.values() if isinstance(x, torch.Tensor) and x.grad_fn is not None)
    memo = {id(t): t for t in (*module.parameters(), *module.buffers(), *results, *shared)}
    try:
        return copy.deepcopy(module, dict(memo))
    except Exception as e:
        known = memo | {id(m): m for m in module.modules()}
        for path, part in module.named_modules():
            for name, value in part.__dict__.items():
                if name not in ("_modules", "_parameters", "_buffers") and not _copies(value, dict(known)):
                    raise UnsupportedModelError(
                        f"{path or type(module).__name__}.{name}: a transformed model is a copy that shares the weights, and "
                        f"copy.deepcopy does not copy this {type(value).__name__} ({e}). Put it on the copy instead, keep it in "
                        "a global, or give its class a __deepcopy__."
                    ) from e
        raise


def _copies(value: object, memo: dict) -> bool:
    try:
        copy.deepcopy(value, memo)
    except Exception:
        return False
    return True


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
            if isinstance(output, tuple | list):
                return type(output)((torch.ops.depthpass.leave(output[0], i), *output[1:]))
            return torch.ops.depthpass.leave(output, i)

        return before, after

    def final(_, args, output):
        if isinstance(output, tuple):
            return (torch.ops.depthpass.final(output[0]), *output[1:])
        output[0 if isinstance(output, list) else "last_hidden_state"] = torch.ops.depthpass.final(output[0])
        return output

    for wrapper in [m for m in model.modules() if hasattr(m, "parameter_name") and hasattr(m, "base_layer")]:
        wrapper.__dict__["forward"] = _passing(wrapper, wrapper.forward)
    for i, layer in enumerate(block_list(model, layers)):
        before, after = mark(i)
        handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(layer.register_forward_hook(after))
    # The module that owns the blocks returns the base model's last_hidden_state (OPT never calls its base model).
    owner = model.get_submodule(layers.rpartition(".")[0])
    handles.append(owner.register_forward_hook(final))
    try:
        yield
    finally:
        attention.met.clear()
        for handle in handles:
            handle.remove()
        for config, key, value in saved:
            setattr(config, key, value)


def _passing(wrapper: Any, forward: Callable) -> Callable:
    """The forward of PEFT's wrapper of one parameter (``target_parameters``) in a capture: experts run whole, it included."""

    def passing(*args, **kwargs):
        inner = wrapper
        while hasattr(inner, "base_layer"):
            inner = inner.base_layer
        attention.met.discard(inner)
        out = wrapper.base_layer(*args, **kwargs)
        return out if inner in attention.met else forward(*args, **kwargs)

    return passing


def trace(
    model: nn.Module, tensors: dict[str, torch.Tensor], static: Mapping[str, object], asked: list[torch.Tensor] | None = None
) -> Traced:
    """Export ``model.forward(**tensors, **static)`` with symbolic batch and tokens.

    Args:
        model: a private copy; it is put in capture mode for the time of the call.
        tensors: example inputs: ``[batch, tokens, ...]``, or ``[1, tokens, ...]`` for all rows, or numbers. Batch and
            tokens become symbolic whatever their sizes are here.
        static: further keyword arguments, baked in.
        asked: is filled with the tensors beside parameters and buffers whose values were asked for.

    Raises:
        UnsupportedModelError: the model cannot be exported; the cause is attached.
    """
    layers = find_layers(model)
    examples, dims = _examples(tensors)
    dims |= dict.fromkeys(static)
    forward = _keyword_forward(model, tuple(dims), [] if asked is None else asked)
    repeats = Repeats(model, layers)
    with (
        _capture_mode(model, layers), repeats.installed(), forward, watch_sizes(model) as counting, warnings.catch_warnings(),
        own_backwards(model) as functions, _uncached(), innermost_forwards(), _use_lazy_graph_module(True),
    ):
        warnings.simplefilter("ignore")
        try:
            program = torch.export.export(model, (), {**examples, **static}, dynamic_shapes=dims, strict=False)
        except Exception as error:
            raise explain(model, error, counting) from error
    tidy(program.graph_module)
    void = drop_void_writes(program.graph_module.graph)
    functionalise(program.graph_module, frozenset(tensors))
    return from_export(program, layers, len(block_list(model, layers)), void, repeats.of, functions)


def _uncached():
    """Without the cache of fake tensors' results: with symbolic sizes, looking one up costs more than computing it."""
    return torch._dynamo.config.patch(fake_tensor_cache_enabled=False)


def _examples(tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    """Inputs of sizes that torch does not specialise on, and their symbolic dimensions."""
    batch, tokens = torch.export.Dim("batch", min=1), torch.export.Dim("tokens", min=1)
    rows = max((t.shape[0] for t in tensors.values() if t.dim()), default=1)
    columns = {n: t.shape[1] for n, t in tensors.items() if t.dim() > 1}
    if len(set(columns.values())) > 1:
        raise InputError(f"expected the same number of tokens in every input, got {columns}.")
    examples: dict[str, torch.Tensor] = {}
    dims: dict[str, object] = {}
    for name, t in tensors.items():
        if t.dim() > 2 and name not in ("inputs_embeds", "position_ids", "per_layer_inputs"):
            raise InputError(
                f"{name}: expected [batch, tokens], got shape {tuple(t.shape)}. Dense masks are not supported: masks are "
                "made from the validity of each token."
            )
        shape = list(t.shape)
        dynamic: dict[int, object] = {}
        if t.dim() and shape[0] not in (1, rows):
            raise InputError(f"{name}: expected {rows} rows (or 1 for all of them), got {shape[0]}.")
        if t.dim() and shape[0] == rows:
            shape[0], dynamic[0] = _SIZES["batch"], batch
        if t.dim() > 1:
            shape[1], dynamic[1] = _SIZES["tokens"], tokens
        # A fresh tensor per input: export treats one tensor passed twice as one input.
        fill = torch.ones if t.dtype == torch.bool else torch.zeros
        examples[name] = fill(shape, dtype=t.dtype, device=t.device)
        dims[name] = dynamic
    return examples, dims


class _ForwardError(Exception):
    """Carries an error of the model's own code through ``torch.export``."""

    @property
    def partial_fx_graph(self):
        # torch.export hangs the half-made graph here and prints all of it; the error names the layer instead.
        raise AttributeError

    @partial_fx_graph.setter
    def partial_fx_graph(self, graph):
        pass


class _DataSeen(TorchFunctionMode):
    """``x.data`` as an op: the trace does not see the attribute, and would take what it gives for a constant.

    A sparse tensor has no entries while it is traced: code that asks for their number would be traced as if there were none.

    Args:
        asked: is filled with real tensors whose values a user's code made numbers of Python, constants for the trace.
    """

    def __init__(self, asked: list[torch.Tensor]):
        super().__init__()
        self.asked = asked

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func == _DATA:
            return args[0].detach()
        if getattr(func, "__name__", "") in _ASKS and is_own(sys._getframe(1).f_globals.get("__name__")):
            self.asked += [t for t in args[:2] if isinstance(t, torch.Tensor) and not isinstance(t, FakeTensor)]
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") == "_nnz" or (isinstance(result, torch.Tensor) and result.layout in _SPARSE):
            raise NotImplementedError("sparse tensors have no entries while they are traced, so code that counts them goes wrong")
        return result


_SPARSE = frozenset({torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc})

_ASKS = frozenset({"item", "tolist", "numpy", "is_nonzero", "equal", "allclose", "__bool__", "__float__", "__int__", "__index__",
                   "__contains__", "__complex__", "__array__", "__format__", "__repr__"})
"""Functions of tensors that give values of Python."""

_DATA = torch.Tensor.data.__get__  # type: ignore[attr-defined]


@contextmanager
def _keyword_forward(model: nn.Module, names: tuple[str, ...], asked: list[torch.Tensor]):
    """Give a model's forward exactly these keyword arguments.

    ``torch.export`` cannot give symbolic sizes to arguments that go into ``**kwargs`` (the loss arguments of
    transformers), and would name them differently.
    """
    stock = model.forward
    replaced = model.__dict__.get("forward")

    def forward(**given):
        if "position_ids" in given:
            given["position_ids"] = as_given(given["position_ids"])
        try:
            with _DataSeen(asked):
                return stock(**given)
        except Exception as error:
            raise _ForwardError from error

    forward.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY) for n in names]
    )
    model.forward = forward
    try:
        yield
    finally:
        del model.forward
        if replaced is not None:
            model.forward = replaced
