"""FLOPs of a graph by op class, symbolic in the batch and the number of tokens.

A node's class follows from the innermost module it comes from (``nn_module_stack``), read below the block:

- ``projection``: a matrix multiply inside a module called like attention (``attn``, ``attention``);
- ``attention``: the two products of the attention call itself;
- ``mlp``: any other matrix multiply inside a block (dense MLPs, experts, routers of experts);
- ``embed``, ``norm``, ``head``: matrix multiplies outside the blocks, by the part of the model that is counted.

Arithmetic that is no matrix multiply is counted by the element and apart (``Count.elementwise_flops``): under ``norm``
inside a module called like a norm, under ``attention`` or ``mlp`` by the same rule as above, under ``residual`` on the
block itself. Softmax, scaling and masking inside a captured attention call are not visible to a graph and not counted.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import sympy as sp
import torch
from torch import fx

from depthpass.analysis.cost import nodes as table
from depthpass.analysis.cost.memory import Memory, memory
from depthpass.analysis.cost.nodes import Shape, numel
from depthpass.analysis.cost.symbols import AttentionSite, B, Convention, expression, n
from depthpass.capture import calls
from depthpass.errors import UnsupportedModelError

CLASSES = ("embed", "projection", "attention", "mlp", "norm", "head", "new")
"""Op classes of FLOPs, in the order in which tables show them; ``new`` are ops that passes added."""

_BLOCK = re.compile(r"\.(?:layers|h|blocks|block|layer)\.\d+(?:\.|$)")
_ATTENTION = re.compile(r"(?:^|[._])(?:attn|attention|self_attn|selfattention)", re.IGNORECASE)
_NORM = re.compile(r"(?:norm|(?:^|[._])ln(?:_|\d|\.|$))", re.IGNORECASE)


@dataclass(frozen=True)
class Count:
    """What one pass over a graph costs, symbolic in B (rows) and n (tokens of a row).

    Attributes:
        gemm_flops: matrix multiplies outside the attention calls, by class.
        key_value_flops: the part of them that serves nothing but keys and values; a visit that reads another visit's
            keys does not need it.
        sites: the attention calls.
        elementwise_flops: other arithmetic, by class.
        expert_calls: experts that every token takes, per call of an expert layer.
        memory: activation bytes.
        uncounted: names of ops that are not understood and count nothing.
    """

    gemm_flops: Mapping[str, sp.Expr]
    key_value_flops: sp.Expr = sp.S.Zero
    sites: tuple[AttentionSite, ...] = ()
    elementwise_flops: Mapping[str, sp.Expr] = field(default_factory=dict)
    expert_calls: tuple[int, ...] = ()
    memory: Memory = field(default_factory=Memory)
    uncounted: tuple[str, ...] = ()

    def flops(self, convention: Convention = "dense") -> dict[str, sp.Expr]:
        """FLOPs by class when all n tokens of every row run at once."""
        flops = dict(self.gemm_flops)
        if self.sites:
            pairs = sum(s.flops_per_pair * s.pairs(n, n, convention) for s in self.sites)
            flops["attention"] = flops.get("attention", sp.Integer(0)) + sp.expand(B * pairs)
        return {c: flops[c] for c in CLASSES if c in flops}

    def total_flops(self, convention: Convention = "dense") -> sp.Expr:
        return sp.expand(sum(self.flops(convention).values()))


@dataclass(frozen=True)
class Experts:
    """An expert layer that a graph calls by its module path.

    Attributes:
        weights: elements of the matrices of one expert.
        experts: number of experts.
    """

    weights: int
    experts: int


def count(
    graph: fx.Graph | fx.GraphModule,
    *,
    part: str = "block",
    inputs: Mapping[str, Sequence[object]] | None = None,
    sites: Sequence[AttentionSite] = (),
    experts: Mapping[str, Experts] | None = None,
    buffers: Collection[str] = (),
    symbols: tuple[sp.Expr, sp.Expr] | None = None,
) -> Count:
    """Count an ATen graph whose nodes carry fake tensors in ``meta["val"]``.

    Args:
        graph: of a whole exported model, or of one part of a capture.
        part: class of matrix multiplies outside the blocks: ``embed``, ``norm`` or ``head``; for ``block`` everything
            belongs to a block.
        inputs: shapes of placeholders without a fake tensor, by name (in the trace's symbols, or in ``B`` and ``n``).
        sites: attention calls by index, for captured graphs whose calls name them.
        experts: sizes of expert layers by module path, for captured graphs that call them.
        buffers: names of placeholders that hold buffers, which need no gradient.
        symbols: the trace's symbols for the batch and the tokens; found from the shapes when left out.

    Raises:
        UnsupportedModelError: sizes that are neither the batch nor the tokens, or a captured call without its sizes.
    """
    counter = _Counter(graph, part, inputs or {}, sites, experts or {}, symbols)
    return counter.run(buffers)


def trace_symbols(graph: fx.Graph | fx.GraphModule) -> tuple[sp.Expr, sp.Expr] | None:
    """The symbols of batch and tokens: the first value whose first two sizes are different symbols, in this order."""
    for node in (graph.graph if isinstance(graph, fx.GraphModule) else graph).nodes:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or value.dim() < 2:
            continue
        first, second = (d.node.expr if isinstance(d, torch.SymInt) else None for d in value.shape[:2])
        if isinstance(first, sp.Symbol) and isinstance(second, sp.Symbol) and first != second:
            return first, second
    return None


def in_attention(path: str) -> bool:
    """Whether a module inside a block belongs to its attention."""
    return bool(_ATTENTION.search(path))


class _Counter:
    def __init__(
        self, graph: fx.Graph | fx.GraphModule, part: str, inputs: Mapping[str, Sequence[object]],
        sites: Sequence[AttentionSite], experts: Mapping[str, Experts], symbols: tuple[sp.Expr, sp.Expr] | None,
    ):
        self.graph = graph.graph if isinstance(graph, fx.GraphModule) else graph
        self.owner = graph if isinstance(graph, fx.GraphModule) else graph.owning_module
        self.part, self.inputs, self.given, self.experts = part, inputs, tuple(sites), experts
        self.symbols = symbols or trace_symbols(self.graph)
        self.names: dict[sp.Expr, sp.Expr] = dict(zip(self.symbols, (B, n))) if self.symbols else {}
        self.gemm: dict[str, sp.Expr] = {}
        self.element: dict[str, sp.Expr] = {}
        self.sites: list[AttentionSite] = []
        self.expert_calls: list[int] = []
        self.uncounted: dict[str, None] = {}

    def shape(self, node: object) -> Shape | None:
        if not isinstance(node, fx.Node):
            return None
        value = node.meta.get("val")
        if value is None and node.name in self.inputs:
            return tuple(expression(d, self.names) for d in self.inputs[node.name])
        if isinstance(value, tuple | list):
            value = next((v for v in value if isinstance(v, torch.Tensor)), None)
        if not isinstance(value, torch.Tensor):
            return None
        return tuple(expression(d, self.names) for d in value.shape)

    def _known(self, node: object) -> Shape:
        shape = self.shape(node)
        if shape is None:
            raise UnsupportedModelError(f"cost: expected a fake tensor on {node!r} (meta['val']), got none.")
        return shape

    def run(self, buffers: Collection[str] = ()) -> Count:
        serves_keys = self._key_value_nodes()
        key_value = sp.Integer(0)
        for node in self.graph.nodes:
            if node.op != "call_function":
                continue
            flops = self._matmul(node)
            if flops is None:
                self._other(node)
                continue
            self._add(self.gemm, self._class(node), flops)
            if node in serves_keys:
                key_value += flops
        self._check()
        return Count(
            {c: sp.expand(v) for c, v in self.gemm.items()}, sp.expand(key_value), tuple(self.sites),
            {c: sp.expand(v) for c, v in self.element.items() if v != 0}, tuple(self.expert_calls),
            memory(self.graph, self.shape, buffers), tuple(self.uncounted),
        )

    def _add(self, where: dict[str, sp.Expr], name: str, flops: sp.Expr) -> None:
        where[name] = where.get(name, sp.Integer(0)) + flops

    def _class(self, node: fx.Node) -> str:
        path = table.module_path(node)
        inside = _BLOCK.split(path)
        if self.part != "block" and len(inside) == 1:
            return self.part
        return "projection" if in_attention(inside[-1]) else "mlp"

    def _element_class(self, node: fx.Node) -> str:
        path = table.module_path(node)
        inside = _BLOCK.split(path)
        if _NORM.search(inside[-1].rsplit(".", 1)[-1]):
            return "norm"
        if self.part != "block" and len(inside) == 1:
            return self.part
        if _ATTENTION.search(inside[-1]):
            return "attention"
        return "mlp" if inside[-1] else "residual"

    def _matmul(self, node: fx.Node) -> sp.Expr | None:
        """FLOPs of a matrix multiply, or None for anything else. Attention calls are filed as sites."""
        out = self.shape(node)
        rule = table.MATMULS.get(node.target)
        if rule is not None and out is not None:
            try:
                return rule(node, out, self.shape)
            except (KeyError, TypeError, IndexError):
                self.uncounted[table.op_name(node)] = None
                return sp.Integer(0)
        if node.target is calls.submodule:
            return self._expert_flops(node)
        if node.target is torch.ops.depthpass.experts.default:
            return self._expert_flops(node)
        site = self._site(node)
        if site is not None:
            self.sites.append(site)
        return None

    def _expert_flops(self, node: fx.Node) -> sp.Expr:
        args = table.arguments(node)
        path = args[1] if node.target is calls.submodule else table.module_path(node)
        sizes = next((e for p, e in self.experts.items() if path == p or path.endswith("." + p)), None)
        if sizes is None:
            raise UnsupportedModelError(
                f"cost: the graph calls the expert layer {path!r}, expected its sizes in `experts`, got "
                f"{sorted(self.experts) or 'none'}."
            )
        index = args[3] if node.target is calls.submodule else args[1]
        chosen = self._known(index)
        self.expert_calls.append(int(chosen[-1]))
        return 2 * sizes.weights * numel(chosen)

    def _site(self, node: fx.Node) -> AttentionSite | None:
        args = table.arguments(node)
        if node.target is calls.attend:
            if args[1] >= len(self.given):
                raise UnsupportedModelError(
                    f"cost: the graph has attention call {args[1]}, expected its sizes in `sites`, got "
                    f"{len(self.given)} entries."
                )
            return self.given[args[1]]
        captured = node.target is torch.ops.depthpass.attend.default
        if not captured and node.target not in table.SDPA:
            return None
        q, k, v = (self._known(a) for a in args[:3])
        window = chunk = -1
        if captured and args[3].target is torch.ops.depthpass.mask.default:
            window, chunk = args[3].args[1:3]
        return AttentionSite(
            int(q[1]), int(k[1]), int(q[3]), int(v[3]), window if window > 0 else None, chunk if chunk > 0 else None
        )

    def _other(self, node: fx.Node) -> None:
        if node.target in (calls.attend, calls.columns) or self._is_attention(node):
            return
        for name in (a.target for a in node.all_input_nodes if a.op == "get_attr"):
            inner = getattr(self.owner, str(name), None)
            if isinstance(inner, fx.GraphModule):
                self._inner(inner)
                return
        out = self.shape(node)
        if out is None:
            return
        flops = table.elementwise_flops(node, out, self.shape)
        if flops is None:
            self.uncounted[table.op_name(node)] = None
        elif flops != 0:
            self._add(self.element, self._element_class(node), flops)

    def _is_attention(self, node: fx.Node) -> bool:
        return node.target is torch.ops.depthpass.attend.default or node.target in table.SDPA

    def _inner(self, graph: fx.GraphModule) -> None:
        """A region under a higher-order op (set_grad_enabled, autocast): counted like the nodes around it."""
        inner = _Counter(graph, self.part, {}, self.given, self.experts, self.symbols)
        counted = inner.run()
        for name, flops in counted.gemm_flops.items():
            self._add(self.gemm, name, flops)
        for name, flops in counted.elementwise_flops.items():
            self._add(self.element, name, flops)
        self.sites += counted.sites
        self.uncounted |= dict.fromkeys(counted.uncounted)

    def _key_value_nodes(self) -> frozenset[fx.Node]:
        """Nodes whose results reach nothing but the keys and values of captured attention calls."""
        only: set[fx.Node] = set()
        for node in reversed(self.graph.nodes):
            if node.op != "call_function" or not node.users:
                continue
            if all(u in only or self._reads_as_keys(u, node) for u in node.users):
                only.add(node)
        return frozenset(only)

    def _reads_as_keys(self, call: fx.Node, node: fx.Node) -> bool:
        first = 2 if call.target is calls.attend else 0
        if call.target is not calls.attend and call.target is not torch.ops.depthpass.attend.default:
            return False
        return node in call.args[first + 1 : first + 3] and node is not call.args[first]

    def _check(self) -> None:
        for where in (self.gemm, self.element):
            for name, flops in where.items():
                if strange := flops.free_symbols - {B, n}:
                    raise UnsupportedModelError(
                        f"cost: the {name} operations depend on the sizes {sorted(map(str, strange))}, expected the "
                        "batch and the number of tokens only. Data-dependent shapes (expert layers traced through) "
                        "cannot be counted: capture the model, which keeps expert layers as one call."
                    )
