"""Let the weight gradients of a chunk's graph leave the token loop."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import cast

from torch import Tensor, fx

from depthpass.capture.nodes import graph_module
from depthpass_lowering.fx_passes.products import land, products
from depthpass_lowering.fx_passes.recompute import absorbed, recompute_pass
from depthpass_lowering.products.packed import Weights
from depthpass_lowering.products.sink import Sink, sunk_absorbed, sunk_landing, sunk_products


def sink_pass(gm: fx.GraphModule) -> fx.GraphModule:
    """The same graph with its weight gradients sunk: takes a sink before everything else.

    Numerics: reassociated (sums over tokens in one product instead of one per chunk).
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    # Made of the whole graph: constants and subgraphs are taken along by what it mentions.
    whole = graph_module(gm, graph)
    recompute_pass(whole)
    return _sunk(whole, lambda node: True)


def sink_bridges_pass(gm: fx.GraphModule, bridges: Container[fx.Node]) -> fx.GraphModule:
    """As :func:`sink_pass`, but only what bridges bring and take: products with their parameters, and landings."""
    return _sunk(gm, lambda node: node.target is land or any(w in bridges for w in cast(Sequence, node.args[1])))


def _sunk(gm: fx.GraphModule, which: Callable[[fx.Node], bool]) -> fx.GraphModule:
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    sink = graph.placeholder("sink")
    sunk: dict[object, Callable] = {products: _products, land: _land, absorbed: _absorbed}
    for node in gm.graph.nodes:
        env[node] = copied = graph.node_copy(node, env.__getitem__)
        if node.target in sunk and which(node):
            copied.target, copied.args = sunk[node.target], (sink, *copied.args)
    return graph_module(gm, graph)


def _weights(transposed: bool, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Weights:
    return Weights(tuple(weights), tuple(biases), transposed=transposed)


def _products(sink: Sink, transposed: bool, weights, biases, x: Tensor) -> Sequence[Tensor]:
    return sunk_products(sink, _weights(transposed, weights, biases), x)


def _absorbed(sink: Sink, transposed: bool, weights, biases, steps: Callable, *leaves: Tensor) -> Sequence[Tensor]:
    return sunk_absorbed(sink, _weights(transposed, weights, biases), steps, *leaves)


def _land(sink: Sink, weights, biases, present: Tensor | None, x: Tensor, *cs: Tensor) -> Tensor:
    return sunk_landing(sink, Weights(tuple(weights), tuple(biases), joined=True), present, x, *cs)
