"""What is asked of the nodes of a captured graph: their arguments as nodes, the op they call, the attribute they name; and the
module of a graph that is not run itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.fx._lazy_graph_module import _LazyGraphModule


def node_of(value: object) -> fx.Node:
    """An argument of a node that is a node itself, as the arguments of markers and tensor operands are."""
    if not isinstance(value, fx.Node):
        raise TypeError(f"expected a node of the graph, got {value!r}.")
    return value


def op_of(node: fx.Node) -> torch._ops.OpOverload:
    """The op that a node calls."""
    if not isinstance(node.target, torch._ops.OpOverload):
        raise TypeError(f"expected a call of an op, got {node.format_node()}.")
    return node.target


def attribute_of(node: fx.Node) -> Any:
    """What a ``get_attr`` node names."""
    value: Any = node.graph.owning_module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value


def module_paths(node: fx.Node) -> list[str]:
    """Paths of the modules that a node was computed in, the outermost first."""
    return [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]


def graph_module(root: nn.Module | dict[str, Any], graph: fx.Graph) -> fx.GraphModule:
    """The module of a graph, linted. Its Python code is made at the first call: most are read by the next pass alone, and code
    takes longer to make than most passes take."""
    module = _LazyGraphModule(root, graph)
    module.graph.lint()
    return module
