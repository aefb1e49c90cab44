"""What an export leaves in a graph that says nothing about the model: its own checks, values that nothing reads, empty paths."""

from __future__ import annotations

import torch
from torch import fx

_CHECK = torch.ops.aten._assert_tensor_metadata.default
# What torch 2.11 gives to a node that a pass of its export made, in place of the modules that it was computed in.
_NOWHERE = "_empty_nn_module_stack_from_metadata_hook"


def tidy(module: fx.GraphModule) -> None:
    """Drop all of it from a graph and its subgraphs, in place.

    A check holds the dtype and device of the export; a captured part runs at those of the tensors that it is given, which
    need not be the same (rotary tables of a model that was cast, and those of the same model loaded again).
    """
    for child in module.children():
        if isinstance(child, fx.GraphModule):
            tidy(child)
            _drop_unread(child.graph)
    checks = [node for node in module.graph.nodes if node.target is _CHECK]
    for node in checks:
        module.graph.erase_node(node)
    for node in module.graph.nodes:
        stack = node.meta.get("nn_module_stack") or {}
        if _NOWHERE in stack:
            node.meta["nn_module_stack"] = {key: value for key, value in stack.items() if key != _NOWHERE}
    module.recompile()


def _drop_unread(graph: fx.Graph) -> None:
    """Torch 2.11 keeps them inside regions without gradients (phimoe's largest position, which only a branch not taken reads)."""
    for node in reversed(graph.nodes):
        if isinstance(node.target, torch._ops.OpOverload) and not node.users and not node.target._schema.is_mutable:
            graph.erase_node(node)
