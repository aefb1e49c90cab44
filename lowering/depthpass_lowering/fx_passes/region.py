"""One FX graph for one chunk of a serial region: blocks, bridges and everything between, as one function of the chunk.

The graph asks the running loop for what has a past or is no plain tensor code: attention of each visit, delayed streams,
modules that wrap others. All else is in the graph, so that passes see across blocks: what leaves the loop
(:mod:`.distribute`), products of one stream (:mod:`.products`), and one segment from one attention call to the next
(:mod:`depthpass_lowering.products.segments`).
"""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from depthpass.capture import calls
from depthpass.capture.captured import Template
from depthpass.capture.nodes import graph_module
from depthpass.ir.definitions import Type
from depthpass.ir.holders import Held
from depthpass.ir.ops import OPS
from depthpass.ir.program import Op, Program
from depthpass.lowered.program import LoweredRegion
from depthpass_lowering.fx_passes.distribute import Distributed, distribute_pass, token_axis
from depthpass_lowering.fx_passes.effects import keeps
from depthpass_lowering.fx_passes.products import join_products_pass, land
from depthpass_lowering.visits.cut import cut_for
from depthpass_lowering.visits.parts import beside, graph_of

# Calls in the graph, answered by the running loop.


def delayed(loop, name: str, source: Tensor | None) -> Tensor:
    """The chunk's values of a delay; ``source`` where it is computed before in the same chunk."""
    return loop.delayed(name, source)


def call(loop, name: str, *streams: Tensor) -> Tensor:
    """An op whose module may be anything (wrapped, with hooks)."""
    return loop.call(name, streams)


def enter(visit, hidden: Tensor) -> Tensor:
    """Show a visit the block's input, which its gate reads."""
    return visit.enter(hidden)


def present(x: Tensor, mask: Tensor | None) -> Tensor:
    """Nothing where a value is absent."""
    return x if mask is None else torch.where(mask, x, 0)


@dataclass(frozen=True)
class Parameter:
    """Where a graph's parameter comes from: place ``at`` of what block ``owner`` is bound to, or attribute ``at`` of the new
    module ``owner``."""

    owner: int | str
    at: int | str


@dataclass(frozen=True, eq=False)
class ChunkGraph:
    """One chunk of a region as a graph.

    ``distributed.loop(loop, *visits, *streams, *masks, *side_inputs, *params, *known)`` returns the ``results``.

    Attributes:
        visits: block ops in order, and feed-forward networks that run by themselves.
        streams: values of earlier regions that it reads.
        absents: for each mask, how many of a row's first tokens it leaves out.
        side_inputs: numbers of the side inputs.
        params: in the order of the graph's inputs.
        results: values it returns: what later regions want, and what delays read.
        distributed: what runs in every chunk, and what runs once before them.
        products: products with parameters in the loop.
        nodes: op nodes that the loop had before anything left it.
        program, templates: what it was made from; kept, since their ids stand in keys.
    """

    visits: tuple[Op, ...]
    streams: tuple[str, ...]
    absents: tuple[int, ...]
    side_inputs: tuple[int, ...]
    params: tuple[Parameter, ...]
    results: tuple[str, ...]
    distributed: Distributed
    products: int
    nodes: int
    program: Program
    templates: tuple[Template, ...]

    @property
    def opaque(self) -> int:
        """How many of its first inputs are no tensors."""
        return 1 + len(self.visits)


def chunk_graph(region: LoweredRegion, program: Program, types: Mapping[str, Type], host: Any) -> ChunkGraph:
    """Build the graph of one chunk of a region.

    Args:
        types: of the program's values.
        host: a :class:`depthpass_lowering.host.Host`.
    """
    return _Builder(region, program, types, host).build()


class _Builder:
    def __init__(self, region: LoweredRegion, program: Program, types: Mapping[str, Type], host: Any):
        self.region, self.program, self.types, self.host = region, program, types, host
        self.graph = fx.Graph()
        self.root: dict[str, object] = {}
        here = {o.name for o in region.program_ops}
        self.streams = tuple(dict.fromkeys(a for o in region.program_ops for a in o.args if a not in here))
        sources = [o.args[0] for o in region.program_ops if o.kind == "delay"]
        self.results = tuple(dict.fromkeys([*region.outputs, *(s for s in sources if s in here)]))
        self.templates = {o.name: host.bound(o["index"])[0] for o in region.calls}
        self.side_inputs = tuple(sorted({s for o in region.visits for s in host.side_inputs_of(o["index"])}))
        self.absents = tuple(sorted({
            self.types[a].absent for o in region.program_ops if o.kind == "add" for a in o.args
            if self.types[a].absent > self.types[o.name].absent
        }))
        self.params: dict[Parameter, fx.Node] = {}
        # Linear maps that one sum alone reads are taken together with it.
        self.bridges = {o.name for o in region.program_ops if self._lands(o)}

    def build(self) -> ChunkGraph:
        graph = self.graph
        self.loop = graph.placeholder("loop")
        self.visits = {o.name: graph.placeholder(f"visit_{i}") for i, o in enumerate(self.region.calls)}
        self.env = {s: graph.placeholder(f"stream_{s}") for s in self.streams}
        self.masks = {n: graph.placeholder(f"mask_{n}") for n in self.absents}
        self.tables = {n: graph.placeholder(f"table_{n}") for n in self.side_inputs}
        for o in self.region.program_ops:
            for parameter, name in self._parameters_of(o):
                if parameter not in self.params:
                    self.params[parameter] = graph.placeholder(f"p{len(self.params)}_{re.sub(r'[^0-9A-Za-z]', '_', name)}")
        for o in self.region.program_ops:
            if o.name not in self.bridges:
                self.env[o.name] = self._op(o)
        graph.output(tuple(self.env[r] for r in self.results))
        graph.eliminate_dead_code(keeps)
        gm = graph_module(self.root, graph)
        nodes = sum(n.op == "call_function" for n in gm.graph.nodes)
        params = list(self.params.values())
        distributed = distribute_pass(gm, [*self.tables.values(), *params])
        inside = {n.name for n in params}
        loop = distributed.loop
        count = join_products_pass(loop.graph, {n for n in loop.graph.nodes if n.op == "placeholder" and n.name in inside})
        loop.graph.lint()
        return ChunkGraph(
            self.region.calls, self.streams, self.absents, self.side_inputs, tuple(self.params), self.results, distributed, count,
            nodes, self.program, tuple(dict.fromkeys(self.templates.values())),
        )

    def _lands(self, o: Op) -> bool:
        users = self.program.users(o.name) if o.kind == "linear" else ()
        if not (self._plain(o) and len(users) == 1 and users[0].kind == "add" and len(o.args) == 1):
            return False
        total = users[0]
        rest = [a for a in total.args if not self._is_linear(a)]
        return total in self.region.program_ops and o.name not in self.results and bool(rest) and total.args.count(o.name) == 1

    def _is_linear(self, name: str) -> bool:
        return any(o.name == name and o.kind == "linear" for o in self.region.program_ops)

    def _plain(self, o: Op) -> bool:
        """Whether an op's parameters are in a module that does nothing but the op, so that the graph may read them itself."""
        name = OPS[o.kind].scope(o) if OPS[o.kind].meaning is not None else None
        if name is None:
            return False
        module = self.host.module(name)
        return type(module) in (nn.Linear, Held) and not module._forward_hooks and not module._forward_pre_hooks

    def _parameters_of(self, o: Op) -> list[tuple[Parameter, str]]:
        if o.kind in ("block", "ffn"):
            names = self.templates[o.name].params
            return [(Parameter(o["index"], i), f"{o['index']}_{name}") for i, name in enumerate(names)]
        if self._plain(o):
            name = cast(str, OPS[o.kind].scope(o))
            held = [leaf for leaf, p in self.host.module(name)._parameters.items() if p is not None]
            return [(Parameter(name, leaf), f"{name}_{leaf}") for leaf in held]
        return []

    def _op(self, o: Op) -> fx.Node:
        graph, args = self.graph, cast("list[Any]", [self.env.get(a) for a in o.args])
        if o.kind == "delay":
            return graph.call_function(delayed, (self.loop, o.name, args[0]))
        if o.kind == "block":
            return self._block(o, *args)
        if o.kind == "ffn":
            return self._ffn(o, *args)
        if o.kind == "point":
            return args[0 if beside(self.host.bound(o["index"])[0], o) else 1]
        if o.kind == "add":
            return self._add(o)
        if o.kind == "linear" and self._plain(o):
            x = args[0] if len(args) == 1 else graph.call_function(torch.cat, (args, -1))
            weight, bias = self._linear(o)
            return graph.call_function(torch.ops.aten.linear.default, (x, weight) if bias is None else (x, weight, bias))
        definition = OPS[o.kind]
        if definition.scope(o) is not None and not self._plain(o):
            return graph.call_function(call, (self.loop, o.name, *args))
        weights = {str(p.at): self.params[p] for p, _ in self._parameters_of(o)}
        return graph.call_function(definition.computed, tuple(args), {**definition.given(o), **weights})

    def _linear(self, o: Op) -> tuple[fx.Node, fx.Node | None]:
        return self.params[Parameter(o["name"], "weight")], self.params.get(Parameter(o["name"], "bias"))

    def _add(self, o: Op) -> fx.Node:
        """Sum; a summand that is absent where the result is present adds nothing there. Bridges land together."""
        graph, base = self.graph, self.types[o.name].absent
        landing: dict[int, list[Op]] = {}
        total = None
        for a in sorted(o.args, key=lambda a: self.types[a].absent):
            absent = self.types[a].absent
            if a in self.bridges:
                landing.setdefault(absent, []).append(self.program.defs[a])
                continue
            x = self.env[a]
            if absent > base:
                x = graph.call_function(present, (x, self.masks[absent]))
            total = x if total is None else graph.call_function(operator.add, (total, x))
        for absent, ops in landing.items():
            weights, biases = zip(*(self._linear(b) for b in ops))
            mask = self.masks[absent] if absent > base else None
            cs = [self.env[b.args[0]] for b in ops]
            total = graph.call_function(land, (weights, biases, mask, total, *cs))
        return cast(fx.Node, total)

    def _block(self, o: Op, hidden: fx.Node, memory: fx.Node | None = None) -> fx.Node:
        template, visit = self.templates[o.name], self.visits[o.name]
        if o["gate"] is not None and o["gate_input"] != "query":
            hidden = self.graph.call_function(enter, (visit, hidden))
        params = [self.params[Parameter(o["index"], i)] for i in range(len(template.params))]
        stopped = o.name in self.program.stopped
        if stopped:
            # Truncated backpropagation: no gradient reaches this visit or leaves it.
            hidden, *params = (self.graph.call_function(torch.detach, (t,)) for t in (hidden, *params))
            memory = None if memory is None else self.graph.call_function(torch.detach, (memory,))
        rest = [*(self.tables[s] for s in self.host.side_inputs_of(o["index"])), *params]
        cut = cut_for(o, graph_of(template, o))
        keys = () if cut.keys is None else self._inline(cut.keys, (visit, hidden if memory is None else memory, *rest))
        y = self._inline(cut.rest, (visit, hidden, *rest), keys)
        return self.graph.call_function(torch.detach, (y,)) if stopped else y

    def _ffn(self, o: Op, *streams: fx.Node) -> fx.Node:
        template = self.templates[o.name]
        inputs = [*streams, *(self.params[Parameter(o["index"], i)] for i in range(len(template.params)))]
        if o.name in self.program.stopped:
            inputs = [self.graph.call_function(torch.detach, (t,)) for t in inputs]
        return self._inline(graph_of(template, o), (self.visits[o.name], *inputs))

    def _inline(self, gm: fx.GraphModule, inputs: Sequence[Any], keys: Sequence[fx.Node] = ()) -> Any:
        """What a graph gives, its nodes copied into this one.

        Args:
            keys: keys and values for its attention calls, instead of those that it computes.
        """
        nodes = list(gm.graph.nodes)
        given = [n for n in nodes if n.op == "placeholder"]
        tokens = given[1].meta["val"].shape[1]
        env: dict[fx.Node, fx.Node] = dict(zip(given, inputs, strict=True))
        for source, node in env.items():
            if node in self.tables.values() or node in self.params.values():
                node.meta = {**source.meta, "axis": token_axis(source.meta.get("val"), tokens)}
                if node in self.params.values():
                    node.meta["axis"] = None
        for n in nodes:
            if n.op == "get_attr":
                env[n] = self.graph.get_attr(self._attribute(gm, str(n.target)))
            elif n.op == "call_function":
                env[n] = self.graph.node_copy(n, env.__getitem__)
                if keys and n.target is calls.attend:
                    site = n.args[1]
                    env[n].args = (*env[n].args[:3], keys[2 * site], keys[2 * site + 1], *env[n].args[5:])
            elif n.op == "output":
                return map_arg(n.args[0], env.__getitem__)
            else:
                continue
            env[n].meta = {**n.meta, "axis": token_axis(n.meta.get("val"), tokens)}
        raise AssertionError("a block's graph has no output")

    def _attribute(self, gm: fx.GraphModule, name: str) -> str:
        """A constant or subgraph of a graph under a name of its own."""
        value = operator.attrgetter(name)(gm)
        for known, held in self.root.items():
            if held is value:
                return known
        fresh = f"held_{len(self.root)}"
        self.root[fresh] = value
        return fresh
