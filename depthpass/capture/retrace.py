"""From the torch-level graph that Dynamo hands to a backend to the ATen level at which models are captured.

Sizes stay symbolic and every node keeps the ``nn_module_stack`` Dynamo gave it, with paths that start at the model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import traceback as fx_traceback
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from depthpass.errors import UnsupportedModelError

_ENTER_AUTOCAST = torch.amp.autocast_mode._enter_autocast
_EXIT_AUTOCAST = torch.amp.autocast_mode._exit_autocast
# What autocast runs in lower precision; an inner region without any of these is the same with and without autocast.
_CASTS = ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "addbmm", "einsum", "conv", "attention", "__matmul__")
_HINTS = {
    "checkpoint": "Activation checkpointing inside torch.compile is not supported: call "
                  "model.gradient_checkpointing_disable(), or use dp.transform(model, spec), which checkpoints visits.",
    "flex_attention": "Load the model with attn_implementation='sdpa'.",
}


def retrace(gm: fx.GraphModule) -> fx.GraphModule:
    """The ATen graph of a Dynamo graph, with the same placeholders in the same order.

    Regions without gradient become ``detach``; in-place ops are kept (see :mod:`depthpass.capture.functional`).

    Raises:
        UnsupportedModelError: the graph holds a higher-order op, an inner autocast region that matters, or unlifted
            modules.
    """
    for node in gm.graph.nodes:
        _check(node)
    values: list[Any] = [n.meta["example_value"] for n in gm.graph.nodes if n.op == "placeholder"]
    first = next(v for v in values if isinstance(v, FakeTensor))
    # An outer autocast is in force again when the graph runs: the graph itself must not hold its casts.
    uncast = torch.autocast(first.device.type, enabled=False)
    with fx_traceback.preserve_node_meta(), first.fake_mode, uncast, torch.enable_grad():
        return make_fx(_Retrace(gm).run, tracing_mode="real", pre_dispatch=True, _allow_non_fake_inputs=True)(*values)


def _check(node: fx.Node) -> None:
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        hint = next((h for key, h in _HINTS.items() if key in str(node.target)), "")
        raise UnsupportedModelError(
            f"the graph calls the higher-order op {str(node.target)!r} ({node.name}); expected plain ops only. "
            f"{hint}".strip()
        )
    if node.op == "call_module":
        raise UnsupportedModelError(
            f"the graph calls the module {node.target!r} instead of lifting its parameters; expected torch._dynamo.config."
            "inline_inbuilt_nn_modules=True (the default)."
        )


class _Retrace(fx.Interpreter):
    """Runs the Dynamo graph for tracing; modes that Dynamo writes as calls become properties of the values."""

    def __init__(self, gm: fx.GraphModule):
        super().__init__(gm)
        self.grad = True
        self.cast: list[bool] = []
        self.trained: set[fx.Node] = set()

    def run_node(self, n: fx.Node):
        if n.target is torch._C._set_grad_enabled:
            self.grad = bool(n.args[0])
            return None
        if n.target is _ENTER_AUTOCAST:
            if (n.args[2] if len(n.args) > 2 else n.kwargs.get("enabled", True)) is not False:
                raise UnsupportedModelError(
                    f"an autocast region inside the compiled function ({n.name}); expected it around the call: "
                    "with torch.autocast(...): compiled(...)."
                )
            self.cast.append(False)
            return None
        if n.target is _EXIT_AUTOCAST:
            self.cast.pop()
            return None
        if self.cast and any(c in str(getattr(n.target, "__name__", n.target)) for c in _CASTS):
            raise UnsupportedModelError(
                f"{n.name}: a {n.target} inside a region that switches autocast off; use dp.transform(model, spec)."
            )
        result = super().run_node(n)
        if any(a in self.trained for a in n.all_input_nodes) or (
            n.op == "placeholder" and isinstance(result, torch.Tensor) and result.requires_grad
        ):
            self.trained.add(n)
            if not self.grad:
                self.trained.discard(n)
                result = pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, result)
        return result


def relative_stacks(graph: fx.Graph, layers: str) -> None:
    """Rewrite the module paths of all nodes to start at the model whose blocks are at ``layers``.

    Dynamo's paths start at a variable of the compiled frame, ``L['self'].model.layers.0.mlp``.
    """
    block = re.compile(rf"(^|.*?\.){re.escape(layers)}\.\d+(\.|$)")
    stacks = [(n, n.meta["nn_module_stack"]) for n in graph.nodes if n.meta.get("nn_module_stack")]
    roots = {m.group(1) for _, s in stacks for path, _ in s.values() if (m := block.match(path))}
    if len(roots) > 1:
        raise UnsupportedModelError(
            f"the graph runs the blocks of several models ({', '.join(sorted(roots))}); compile one model at a time."
        )
    root = next(iter(roots), "")
    for node, stack in stacks:
        node.meta["nn_module_stack"] = {
            key: ((path + ".").removeprefix(root).removesuffix("."), cls)
            for key, (path, cls) in stack.items() if (path + ".").startswith(root)
        }


def argument_names(placeholders: Sequence[fx.Node]) -> list[str]:
    """What the caller calls each argument: the last name of Dynamo's source, ``L['kwargs']['labels']`` -> ``labels``."""
    names: list[str] = []
    for node in placeholders:
        words = re.findall(r"\w+", source_name(node))
        name = words[-1] if words and not words[-1].isdigit() else node.name
        names.append(name if name not in names else node.name)
    return names


def source_name(placeholder: fx.Node) -> str:
    """Where Dynamo took an argument from, as Python code over ``L`` (locals) and ``G`` (globals) of the frame."""
    name: Any = getattr(getattr(placeholder, "_dynamo_source", None), "name", placeholder.name)
    return str(name() if callable(name) else name)  # a method in older versions of torch
