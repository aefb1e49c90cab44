"""Activation bytes of a graph: what autograd keeps for backward, and what is alive at once going forward.

Both are estimates of an eager run without checkpointing. Kept for backward: the inputs of matrix multiplies and of
nonlinear elementwise ops, the results of ops whose derivative is written in their result, and q, k, v, the result and a
float32 log-sum-exp per query for an attention call. Values that share storage are counted once; parameters, workspace
and the allocator's rounding are not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import sympy as sp
import torch
from torch import fx

from depthpass.analysis.cost import nodes as table
from depthpass.capture import calls

_ALIASES = frozenset((
    "view", "_unsafe_view", "transpose", "t", "permute", "expand", "unsqueeze", "squeeze", "slice", "select",
    "narrow", "alias", "detach", "flatten", "unflatten", "split", "split_with_sizes", "chunk", "unbind", "view_as",
    "expand_as", "movedim", "getitem", "lift_fresh", "as_strided",
))
_SAVES_RESULT = frozenset((
    "rsqrt", "sigmoid", "tanh", "exp", "softmax", "_softmax", "log_softmax", "_log_softmax", "reciprocal", "sqrt",
    "relu",
))
_SAVES_INPUTS = frozenset((
    "pow", "silu", "gelu", "mish", "softplus", "hardswish", "div", "log", "abs", "sin", "cos", "erf",
    "cross_entropy_loss", "nll_loss_nd", "layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm", "clamp",
    "clamp_min", "clamp_max",
))
_SAVES_OPERANDS = frozenset((
    "mul", "matmul", "mm", "bmm", "linear", "addmm", "baddbmm", "_grouped_mm", "conv1d", "einsum",
))


@dataclass(frozen=True)
class Memory:
    """Activation bytes in B and n.

    Attributes:
        saved_bytes: kept from forward to backward, inputs other than the hidden stream left out.
        peak_bytes: candidates of the largest sum of values alive at once; the peak is their maximum.
        result_bytes: the graph's own result.
    """

    saved_bytes: sp.Expr = sp.S.Zero
    peak_bytes: tuple[sp.Expr, ...] = ()
    result_bytes: sp.Expr = sp.S.Zero

    @property
    def peak(self) -> sp.Expr:
        return sp.Max(*self.peak_bytes) if self.peak_bytes else sp.Integer(0)


def memory(
    graph: fx.Graph, shape: Callable[[fx.Node], tuple[sp.Expr, ...] | None], buffers: Collection[str] = ()
) -> Memory:
    """Estimate the activation bytes of one run of a graph.

    Args:
        graph: with fake tensors in ``meta["val"]``.
        shape: shape of a node's value in B and n.
        buffers: names of placeholders that hold tensors of the model which never need a gradient.
    """
    run = _Run(graph, shape, frozenset(buffers))
    return Memory(run.saved(), run.peaks(), run.results())


class _Run:
    def __init__(
        self, graph: fx.Graph, shape: Callable[[fx.Node], tuple[sp.Expr, ...] | None], buffers: frozenset[str]
    ) -> None:
        self.graph, self.shape, self.buffers = graph, shape, buffers
        self.base: dict[fx.Node, fx.Node] = {}
        self.dtype_size = next((table.itemsize(x) for x in graph.nodes if table.itemsize(x)), 4)
        self.differentiable: set[fx.Node] = set()
        for node in graph.nodes:
            self.base[node] = self._base(node)
            if self._carries_gradient(node):
                self.differentiable.add(node)

    def _base(self, node: fx.Node) -> fx.Node:
        """The node that owns the storage of a node's value."""
        if node.op != "call_function" or not node.all_input_nodes:
            return node
        source = node.all_input_nodes[0]
        name = table.op_name(node)
        same = self._same_value(node, source)
        if name in _ALIASES or (name in ("reshape", "contiguous", "to", "type_as") and same):
            return self.base[source]
        return node

    def _same_value(self, node: fx.Node, source: fx.Node) -> bool:
        """Whether reshape, contiguous or a cast hands its argument through without a copy."""
        value, given = node.meta.get("val"), source.meta.get("val")
        if not isinstance(value, torch.Tensor):
            return False
        if not isinstance(given, torch.Tensor):
            return True
        name = table.op_name(node)
        if name in ("to", "type_as"):
            return value.dtype == given.dtype
        return given.is_contiguous()

    def _carries_gradient(self, node: fx.Node) -> bool:
        if node.op == "placeholder":
            trains = _is_parameter(node) and node.name not in self.buffers and not node.name.startswith("b_")
            return node.name == "hidden" or trains
        if node.op != "call_function":
            return False
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and not value.is_floating_point():
            return False
        return any(a in self.differentiable for a in node.all_input_nodes)

    def bytes(self, node: fx.Node) -> sp.Expr:
        shape = self.shape(node)
        if shape is None:
            return sp.Integer(0)
        return table.numel(shape) * (table.itemsize(node) or self.dtype_size)

    def _saves(self, node: fx.Node) -> list[fx.Node]:
        """Values that autograd keeps for the backward of a node."""
        name = table.op_name(node)
        inputs = list(node.all_input_nodes)
        if node.target is calls.attend or node.target is torch.ops.depthpass.attend.default:
            first = 2 if node.target is calls.attend else 0
            return [*table.arguments(node)[first : first + 3], node]
        if node.target in table.SDPA:
            return [*table.arguments(node)[:3], node]
        if name in _SAVES_RESULT:
            return [node]
        if name in _SAVES_INPUTS:
            return [a for a in inputs if a in self.differentiable]
        if name in _SAVES_OPERANDS and len(inputs) > 1:
            # A product keeps an operand for the other one's gradient.
            grads = [a in self.differentiable for a in inputs]
            return [a for i, a in enumerate(inputs) if any(g for j, g in enumerate(grads) if j != i)]
        return []

    def saved(self) -> sp.Expr:
        nodes: dict[fx.Node, None] = {}
        extra = sp.Integer(0)
        for node in self.graph.nodes:
            if node not in self.differentiable or node.op != "call_function":
                continue
            for value in self._saves(node):
                nodes[self.base[value]] = None
            if node.target is calls.attend or node.target in table.SDPA:
                out = self.shape(node)
                extra += 4 * table.numel(out[:3]) if out else 0
        # Side inputs of a block (rotary tables) are shared by all blocks: whoever made them counts them.
        own = (v for v in nodes if v.op != "placeholder" or v.name == "hidden")
        return sp.expand(sum((self.bytes(v) for v in own), extra))

    def peaks(self) -> tuple[sp.Expr, ...]:
        last: dict[fx.Node, int] = {}
        order = list(self.graph.nodes)
        for i, node in enumerate(order):
            for a in (*node.all_input_nodes, node):
                last[self.base[a]] = i
        alive, peaks = sp.Integer(0), set()
        held: dict[fx.Node, sp.Expr] = {}
        for i, node in enumerate(order):
            if self.base[node] is node and not _is_parameter(node) and node.op != "output":
                held[node] = self.bytes(node)
                alive += held[node]
            peaks.add(sp.expand(alive))
            for dead in [v for v in held if last[v] <= i]:
                alive -= held.pop(dead)
        return _undominated(peaks)

    def results(self) -> sp.Expr:
        output = next(x for x in self.graph.nodes if x.op == "output")
        bases = dict.fromkeys(self.base[a] for a in output.all_input_nodes)
        return sp.expand(sum((self.bytes(v) for v in bases), sp.Integer(0)))


def _is_parameter(node: fx.Node) -> bool:
    return node.op == "placeholder" and node.name.startswith(("p_", "b_", "c_"))


def _undominated(sums: set[sp.Expr]) -> tuple[sp.Expr, ...]:
    """Drop sums that never exceed another one: all their coefficients are at most the other's."""
    terms = {e: e.as_coefficients_dict() for e in sums}

    def below(a: sp.Expr, b: sp.Expr) -> bool:
        return all(c <= terms[b].get(m, 0) for m, c in terms[a].items())

    return tuple(sorted(
        (a for a in sums if not any(a != b and below(a, b) for b in sums)), key=sp.default_sort_key
    ))
