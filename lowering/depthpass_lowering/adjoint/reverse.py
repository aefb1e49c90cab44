"""Reverse-mode differentiation of a chunk's graph: two flat graphs instead of an autograd node per op.

Autograd records a node per op and per product, visit and chunk, and runs each through its engine; with few rows or a narrow
model that costs more than the products. Here every op has a rule (:mod:`.rules`) that writes its backward pass down once, when
the graph is made, for all shapes; what has none is differentiated by autograd, alone.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from depthpass.capture.nodes import graph_module


class Unsupported(Exception):
    """A graph holds what no rule can go back through; it runs under autograd instead."""


@dataclass(frozen=True)
class SiteSpec:
    """A product of the graph: places of its weights, biases and gain among the graph's parameters."""

    weights: tuple[int, ...]
    biases: tuple[int | None, ...]
    joined: bool
    transposed: bool
    gain: int | None = None


@dataclass(frozen=True, eq=False)
class Adjoint:
    """A graph with its backward pass.

    Attributes:
        forward: ``(*inputs, *sites) -> (results, saved)``.
        backward: ``(sink, saved, *gradients of the results) -> gradients of the inputs named by wants``.
        wants: which inputs get a gradient.
        sites: the products, in the order of the forward graph's last inputs.
        islands: whether some op is differentiated by autograd.
    """

    forward: fx.GraphModule
    backward: fx.GraphModule | None
    wants: tuple[int, ...]
    sites: tuple[SiteSpec, ...]
    islands: bool


@dataclass
class Gradient:
    """What is known so far of a value's gradient.

    Attributes:
        fresh: whether nobody else holds its memory, so that it may be added to in place.
    """

    node: fx.Node
    fresh: bool


Rule = Callable[[Any, fx.Node], None]


class Tape:
    """A graph under differentiation: values that are written forward, and what each rule leaves to do backward.

    Forward and backward may be one graph: where values are computed again in the backward pass.

    Attributes:
        ahead: the graph that values are written into.
        behind: the graph that gradients are written into.
        env: value of each node of the source graph.
        active: nodes of the source graph that have a gradient.
    """

    def __init__(self, ahead: fx.Graph, behind: fx.Graph, rules: Callable[[fx.Node], Rule]):
        self.ahead, self.behind, self.rules = ahead, behind, rules
        self.env: dict[fx.Node, Any] = {}
        self.active: set[fx.Node] = set()
        self.steps: list[Callable[[], None]] = []
        self.gradients: dict[fx.Node, Gradient] = {}
        # Tables that several nodes read, by what they are made of.
        self.tables: dict[object, tuple[fx.Node, ...]] = {}
        self.islands = False

    # Forward.

    def value(self, x: Any) -> Any:
        """Values of nodes of the source graph, in any nesting."""
        return map_arg(x, lambda n: self.env.get(n, n))

    def emit(self, target: Callable, *args, **kwargs) -> fx.Node:
        """Write a call into the forward graph; arguments may be nodes of the source graph."""
        return self.ahead.call_function(target, self.value(args), self.value(kwargs))

    def method(self, name: str, *args) -> fx.Node:
        return self.ahead.call_method(name, self.value(args))

    def run(self, node: fx.Node) -> None:
        """Write one node of the source graph and remember its backward pass."""
        if node not in self.env:
            self.rules(node)(self, node)

    def differentiates(self, node: fx.Node) -> bool:
        """Whether a node's result has a gradient: some input has one, and it is a floating-point tensor."""
        value = node.meta.get("val")
        floats = value.is_floating_point() if isinstance(value, Tensor) else value is None or isinstance(value, list | tuple)
        return floats and node.target is not torch.ops.aten.sym_size.int and any(n in self.active for n in node.all_input_nodes)

    def on_back(self, node: fx.Node, back: Callable[[fx.Node], None], unread: Callable[[], None] | None = None) -> None:
        """Register a node's backward pass, which gets the gradient of its result.

        Args:
            unread: the backward pass where nothing reads the result: of a node that does more than give it.
        """
        self.active.add(node)

        def step() -> None:
            if node in self.gradients:
                back(self.gradients[node].node)
            elif unread is not None:
                unread()

        self.steps.append(step)

    # Backward.

    def kept(self, value: fx.Node) -> fx.Node:
        """A forward value in the backward graph."""
        raise NotImplementedError

    def back(self, target: Callable, *args, **kwargs) -> fx.Node:
        """Write a call into the backward graph; forward values among the arguments are kept for it."""
        given: Any = map_arg((args, kwargs), self._behind)
        return self.behind.call_function(target, given[0], given[1])

    def back_method(self, name: str, *args) -> fx.Node:
        given: Any = map_arg(args, self._behind)
        return self.behind.call_method(name, given)

    def _behind(self, n: fx.Node) -> fx.Node:
        n = self.env.get(n, n)
        return n if n.graph is self.behind else self.kept(n)

    def add(self, node: fx.Node, gradient: fx.Node, fresh: bool) -> None:
        """Add to the gradient of a node of the source graph.

        Args:
            gradient: of the node's shape and dtype.
            fresh: whether it is memory of its own, held by nothing else.
        """
        if node not in self.active:
            return
        known = self.gradients.get(node)
        if known is None:
            self.gradients[node] = Gradient(gradient, fresh)
        elif known.fresh or fresh:
            whole, part = (known.node, gradient) if known.fresh else (gradient, known.node)
            self.gradients[node] = Gradient(self.behind.call_method("add_", (whole, part)), True)
        else:
            self.gradients[node] = Gradient(self.behind.call_function(torch.add, (known.node, gradient)), True)

    def add_product(self, node: fx.Node, a: fx.Node, b: fx.Node) -> None:
        """Add ``a * b`` to the gradient of a node of the source graph; a is memory of its own, of the node's shape."""
        if node not in self.active:
            return
        known = self.gradients.get(node)
        if known is None:
            total = self.back_method("mul_", a, b)
        elif known.fresh:
            total = self.back_method("addcmul_", known.node, a, b)
        else:
            total = self.back(torch.addcmul, known.node, a, b)
        self.gradients[node] = Gradient(total, True)

    def fitted(self, node: fx.Node, like: fx.Node, gradient: fx.Node, fresh: bool) -> None:
        """As :meth:`add`, of a gradient with the shape of ``like``, to which ``node`` was broadcast or promoted."""
        if node not in self.active:
            return
        if not same_layout(node, like):
            x = self.value(node)
            shape, dtype = (self.ahead.call_function(getattr, (x, name)) for name in ("shape", "dtype"))
            gradient, fresh = self.back(fit, gradient, shape, dtype), False
        self.add(node, gradient, fresh)

    def unwind(self) -> None:
        """Write the backward pass of everything that was written forward."""
        for step in reversed(self.steps):
            step()


class Reverse(Tape):
    """Differentiates a whole graph.

    Args:
        gm: takes ``(*inputs)``; its result is a flat tuple of tensors.
        active: inputs that get a gradient.
        params: inputs that are parameters, in order; gradients of the active ones among them go to the sink.
        writers: inputs that are visits with keys of their own.
    """

    def __init__(
        self, gm: fx.GraphModule, active: set[fx.Node], params: Sequence[fx.Node], writers: set[fx.Node],
        rules: Callable[[fx.Node], Rule],
    ):
        super().__init__(fx.Graph(), fx.Graph(), rules)
        self.gm, self.params, self.writers = gm, list(params), writers
        self.active |= active
        self.sites: list[SiteSpec] = []
        self.slots: list[fx.Node] = []
        self.saved: dict[fx.Node, int] = {}
        self.read: dict[fx.Node, fx.Node] = {}
        self.sink = self.behind.placeholder("sink")
        self.memory = self.behind.placeholder("saved")

    def kept(self, value: fx.Node) -> fx.Node:
        if value not in self.read:
            at = self.saved.setdefault(value, len(self.saved))
            self.read[value] = self.behind.call_function(operator.getitem, (self.memory, at))
        return self.read[value]

    def site(self, weights, biases, joined: bool, transposed: bool, gain=None) -> tuple[fx.Node, SiteSpec]:
        """The input of the forward graph that multiplies with these parameters."""
        place = {p: i for i, p in enumerate(self.params)}
        spec = SiteSpec(
            tuple(place[w] for w in weights), tuple(None if b is None else place[b] for b in biases), joined, transposed,
            None if gain is None else place[gain],
        )
        self.sites.append(spec)
        return self.slots.pop(0), spec

    def trains(self, spec: SiteSpec) -> bool:
        """Whether any parameter of a product has a gradient."""
        return any(self.params[i] in self.active for i in (*spec.weights, *spec.biases, spec.gain) if i is not None)

    def _handed_out(self, result: fx.Node) -> fx.Node:
        """A result; one that is kept as well as another object: the outer graph hangs on it, and would keep itself alive."""
        value = self.value(result)
        return self.method("detach", value) if value in self.saved else value

    def build(self, products: int) -> Adjoint:
        """Both graphs.

        Args:
            products: how many of the graph's nodes multiply with parameters.
        """
        inputs = [n for n in self.gm.graph.nodes if n.op == "placeholder"]
        for n in inputs:
            self.env[n] = self.ahead.placeholder(n.name)
        self.slots = [self.ahead.placeholder(f"site_{i}") for i in range(products)]
        results: Sequence[fx.Node] = ()
        for n in self.gm.graph.nodes:
            if n.op == "output":
                results = cast("Sequence[fx.Node]", n.args[0])
            elif n.op == "get_attr":
                self.env[n] = self.ahead.get_attr(str(n.target))
            elif n.op == "call_function":
                self.run(n)
        trained = [r for r in results if r in self.active]
        for r in results:
            given = self.behind.placeholder(f"grad_{r.name}")
            if r in self.active:
                self.add(r, given, False)
        self.unwind()
        for p in self.params:
            if p in self.gradients:
                self.behind.call_method("gather", (self.sink, self.kept(self.env[p]), self.gradients[p].node))
        wants = [i for i, n in enumerate(inputs) if n in self.gradients and n not in self.params]
        self.behind.output(tuple(self.gradients[inputs[i]].node for i in wants))
        self.ahead.output((tuple(self._handed_out(r) for r in results), tuple(self.saved)))
        return Adjoint(
            graph_module(self.gm, self.ahead), graph_module(self.gm, self.behind) if trained else None, tuple(wants),
            tuple(self.sites), self.islands,
        )


def layout(n: fx.Node) -> tuple[list[str], torch.dtype] | None:
    """Shape and dtype of a value inside its block; None = not certain."""
    value = n.meta.get("val")
    return ([str(s) for s in value.shape], value.dtype) if isinstance(value, Tensor) else n.meta.get("layout")


def same_layout(a: fx.Node, b: fx.Node) -> bool:
    """Whether two values of one captured block certainly have one shape and dtype."""
    known = layout(a)
    return known is not None and known == layout(b)


def fit(g: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """A gradient summed to the shape that was broadcast, in the dtype that was promoted."""
    if g.shape != shape:
        g = g.sum_to_size(shape)
    return g if g.dtype == dtype else g.to(dtype)
