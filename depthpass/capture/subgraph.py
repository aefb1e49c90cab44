"""The graph of one section of a traced model, built node by node with placeholders of its own."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import cast

import sympy
import torch
from torch import fx
from torch.fx.node import Argument, map_arg

from depthpass.capture import calls, derivatives
from depthpass.capture.nodes import graph_module, module_paths, node_of
from depthpass.capture.sections import size_of
from depthpass.errors import UnsupportedModelError

_OPS = torch.ops.depthpass
MASK, _EXPERTS = _OPS.mask.default, _OPS.experts.default
_WRAPPED = ".base_layer"
_ARANGES = {torch.ops.aten.arange.default, torch.ops.aten.arange.start, torch.ops.aten.arange.start_step}


def module_path(node: fx.Node) -> str:
    """Path of the innermost module that computed a node."""
    return module_paths(node)[-1]


class Subgraph:
    """Builds one subgraph; node names come from targets, so equal graphs print equal.

    Attributes:
        env: what stands in the new graph for each node of the traced one.
        visit: placeholder of the running visit.
        interior: nodes that functions with a backward of their own have traced: calls of these stand for them.
        hidden: placeholder of the hidden stream, whose own shape gives the sizes; None = the sizes are those of the call.
    """

    def __init__(
        self, root: torch.nn.Module, where: str, layers: str, batch: sympy.Expr, tokens: sympy.Expr,
        functions: derivatives.Functions,
    ):
        self.root, self.where, self.layers, self.batch, self.tokens = root, where, layers, batch, tokens
        self.graph = fx.Graph()
        self.env: dict[fx.Node, Argument] = {}
        self.hidden: fx.Node | None = None
        self._sizes: dict[sympy.Expr, Argument] = {}
        self.functions = functions
        self.interior: Mapping[fx.Node, int] = {}
        self._called: dict[int, fx.Node] = {}
        self.visit = self._last_placeholder = self.graph.placeholder("visit")

    def placeholder(self, name: str) -> fx.Node:
        # Sizes may already have been computed: placeholders still come first.
        with self.graph.inserting_after(self._last_placeholder):
            self._last_placeholder = self.graph.placeholder(name)
        return self._last_placeholder

    def enter(self, entry: fx.Node) -> None:
        """Make the placeholder of the hidden stream, for the node that it stands for."""
        self.env[entry] = self.hidden = self.placeholder("hidden")

    def size(self, expr: sympy.Expr, node: fx.Node) -> Argument:
        """Recompute a symbolic size from the hidden stream's own shape, so that any chunk can be run."""
        if expr in self._sizes:
            return self._sizes[expr]
        if expr.is_Integer:
            return int(expr)
        expression: Argument = None
        if expr in (self.batch, self.tokens):
            expression = self.graph.call_function(torch.ops.aten.sym_size.int, (self.hidden, 0 if expr == self.batch else 1))
        elif expr.is_Mul or expr.is_Add:
            fn = operator.mul if expr.is_Mul else operator.add
            for term in expr.args:
                value = self.size(cast(sympy.Expr, term), node)
                expression = value if expression is None else self.graph.call_function(fn, (expression, value))
        else:
            raise UnsupportedModelError(f"{self.where}: size {node.name!r} = {expr} is not understood.")
        self._sizes[expr] = expression
        return expression

    def call(self, fn: Callable, args: tuple[Argument, ...], like: fx.Node) -> fx.Node:
        """Call a function in place of a node."""
        node = self.graph.call_function(fn, args)
        node.meta = dict(like.meta)
        return node

    def copy(self, n: fx.Node, columns: bool = True) -> None:
        """Copy a node; drop checks, replace expert layers and token indices by calls on the visit."""
        if n.target is MASK or n in self.interior:
            return
        if n.op == "call_function" and str(n.target).startswith(("aten._assert", "<built-in function _assert")):
            return
        val = n.meta.get("val")
        if isinstance(val, torch.SymInt) and self.hidden is not None:
            self.env[n] = self.size(val.node.expr, n)
        elif n.target is _EXPERTS:
            path = module_path(n).split(".", self.layers.count(".") + 2)[-1]
            while path.endswith(_WRAPPED):  # PEFT's wrappers of their parameters run with them
                path = path.removesuffix(_WRAPPED)
            self.env[n] = self.call(calls.submodule, (self.visit, path, *map_arg(n.args, self._copied)), n)
        elif n.target is derivatives.IN:
            self.env[n] = self.env[node_of(n.args[0])]
        elif n.target is derivatives.OUT:
            self.env[n] = self._function(n)
        elif columns and n.target in _ARANGES and isinstance(val, torch.Tensor) and size_of(val.shape[0]) == self.tokens:
            self.env[n] = self._columns(n, val)
        elif n.op == "get_attr":
            self._copied(n)
        else:
            arguments = map_arg((n.args, n.kwargs), self._copied)
            node = self.graph.create_node(n.op, n.target, *arguments)
            node.meta = dict(n.meta)
            self.env[n] = node

    def _function(self, n: fx.Node) -> Argument:
        """One result of a function with a backward of its own: one call of it stands for all that it has traced."""
        number = derivatives.number_of(n)
        call = self.functions.calls[number]
        if number not in self._called:
            inputs = tuple(self.env[node_of(x)] for x in cast("list[Argument]", n.args[1]))
            self._called[number] = self.call(call.apply, inputs, n)
        called = self._called[number]
        return called if call.single else self.call(operator.getitem, (called, n.args[3]), n)

    def _copied(self, a: fx.Node) -> Argument:
        """What stands for a node; attributes are copied where they are first read."""
        if a not in self.env and a.op == "get_attr":
            attribute = self.graph.get_attr(str(a.target))
            attribute.meta = dict(a.meta)
            self.env[a] = attribute
        return self.env[a]

    def _columns(self, n: fx.Node, val: torch.Tensor) -> fx.Node:
        start = n.args[0] if n.target is not torch.ops.aten.arange.default else 0
        step = n.args[2] if len(n.args) > 2 else 1
        if start != 0 or step != 1:
            raise UnsupportedModelError(f"{self.where}: token indices {n.name!r} start at {start} with step {step}.")
        columns = self.call(calls.columns, (self.visit, val.device), n)
        if val.dtype != torch.int64:
            columns = self.call(torch.ops.aten.to.dtype, (columns, val.dtype), n)
        return columns

    def attributes(self) -> tuple[str, ...]:
        return tuple(str(n.target) for n in self.graph.nodes if n.op == "get_attr")

    def finish(self, result: Argument) -> fx.GraphModule:
        """The finished graph module."""
        for source, node in self.env.items():
            if isinstance(node, fx.Node) and node.op == "placeholder":
                node.meta.setdefault("val", source.meta.get("val"))
        self.graph.output(result)
        self.graph.eliminate_dead_code()
        return graph_module(self.root, self.graph)
