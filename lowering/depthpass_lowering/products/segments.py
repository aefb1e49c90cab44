"""Compile a captured graph piece by piece: attention stays a call on the running visit, what lies between is compiled.

A block's graph asks its visit for attention, so it cannot be compiled as a whole. It is cut at these calls into segments
without side effects, and each segment goes to the inner compiler once per template, for any number of tokens.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from depthpass.log import working
from depthpass_lowering.fx_passes.effects import reached

Compiler = Callable[[fx.GraphModule], Callable]


def compile_segment(gm: fx.GraphModule, backend: str | Callable, options: Mapping[str, Any] | None = None) -> Callable:
    """Compile a segment with a Dynamo backend, once for all numbers of rows and tokens above one."""
    dynamic = [_symbolic_dims(n.meta.get("val")) for n in gm.graph.nodes if n.op == "placeholder"]
    compiled = torch.compile(gm, backend=backend, options=None if options is None else dict(options))
    first = iter([True])

    def run(*args: Tensor):
        args = tuple(_packed(a) if dims else a for a, dims in zip(args, dynamic))
        for a, dims in zip(args, dynamic):
            torch._dynamo.maybe_mark_dynamic(a, [d for d in dims if a.shape[d] > 1])
        with warnings.catch_warnings():
            # Dynamo looks at .grad of every input; those of a segment are results of others.
            warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
            if next(first, False):
                with working(f"compiling {len(gm.graph.nodes)} ops of a block"):
                    return compiled(*args)
            return compiled(*args)

    return run


def _packed(x: Tensor) -> Tensor:
    """A tensor with the strides that follow from its shape.

    A chunk cut out of a row has the strides of the row, on which the inner compiler would specialise; ``contiguous`` lets
    those of dimensions of size 1 pass.
    """
    steps = [1]
    for size in reversed(x.shape[1:]):
        steps.append(steps[-1] * max(size, 1))
    return x if list(x.stride()) == steps[::-1] else x.clone(memory_format=torch.contiguous_format)


def _symbolic_dims(value: object) -> list[int]:
    return [d for d, s in enumerate(value.shape) if isinstance(s, torch.SymInt)] if isinstance(value, Tensor) else []


class Segmented:
    """A graph ``(*opaque, *tensors)`` whose segments are compiled; called as the graph itself.

    Args:
        gm: a template or part of a capture, whose one opaque input is the visit, or a chunk's graph.
        compiler: compiles one segment.
        opaque: how many of the first inputs are no tensors. Nodes that read one are calls, run as they are and in order.
    """

    def __init__(self, gm: fx.GraphModule, compiler: Compiler, opaque: int = 1):
        self.gm, self.compiler = gm, compiler
        self.nodes = list(gm.graph.nodes)
        self.placeholders = [n for n in self.nodes if n.op == "placeholder"]
        self.result = self.nodes[-1].args[0]
        self.again = _repeatable(self.nodes)
        # Steps in order: a compiled segment with its inputs and outputs, or a node to run as it is.
        self.steps: list[tuple[Callable | fx.Node, list[fx.Node], list[fx.Node]]] = []
        asked = set(self.placeholders[:opaque])
        stage: dict[fx.Node, int] = dict.fromkeys(self.placeholders, 0)
        latest = 0
        calls: dict[int, list[fx.Node]] = {}
        work: dict[int, list[fx.Node]] = {}
        for n in self.nodes[len(self.placeholders) : -1]:
            at = max((stage[a] for a in n.all_input_nodes if a not in self.again), default=0)
            stage[n] = at
            if asked.intersection(n.all_input_nodes):
                # Calls have a memory (the keys they keep): none overtakes another.
                at = latest = max(at, latest)
                calls.setdefault(at, []).append(n)
                stage[n] = at + 1
            elif n.target is operator.getitem and n.args[0] in calls.get(stage[n.args[0]] - 1, ()):
                calls[stage[n.args[0]] - 1].append(n)  # a part of a call's results
            elif n not in self.again:
                work.setdefault(at, []).append(n)
        for k in range(max(stage.values()) + 1):
            self._add_segment(work.get(k, []))
            for call in calls.get(k, []):
                self.steps += [(n, [], [n]) for n in self._needed([call], {call})]

    def _add_segment(self, nodes: list[fx.Node]) -> None:
        own = set(nodes)
        outs = [n for n in nodes if any(u not in own for u in n.users)]
        if not outs:
            return
        needed = self._needed(outs, own)
        ins = list(dict.fromkeys(a for n in needed for a in n.all_input_nodes if a not in needed))
        graph = fx.Graph()
        env = {a: graph.placeholder(a.name) for a in ins}
        for a in ins:
            env[a].meta = dict(a.meta)
        for n in needed:
            env[n] = graph.node_copy(n, env.__getitem__)
        graph.output(tuple(env[n] for n in outs))
        self.steps.append((self.compiler(fx.GraphModule(self.gm, graph)), ins, outs))

    def _needed(self, outs: list[fx.Node], own: set[fx.Node]) -> list[fx.Node]:
        """What a segment runs, in order: its own nodes, and the sizes and constants they read."""
        needed = reached(outs, lambda n: [a for a in n.all_input_nodes if a in own or a in self.again])
        return [n for n in self.nodes if n in needed]

    def __call__(self, *args, lead: tuple = ()):
        """Run the graph; ``lead`` goes in front of the inputs of every compiled segment."""
        env: dict[fx.Node, Any] = dict(zip(self.placeholders, args, strict=True))
        for what, ins, outs in self.steps:
            if not isinstance(what, fx.Node):
                env.update(zip(outs, what(*lead, *(env[i] for i in ins)), strict=True))
            elif what.op == "get_attr":
                env[what] = getattr(self.gm, str(what.target))
            else:
                a, kw = map_arg((what.args, what.kwargs), env.__getitem__)
                target: Any = what.target
                env[what] = target(*a, **kw)
        return map_arg(self.result, env.__getitem__)


def _repeatable(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Sizes and constants: cheaper to work out in every segment than to hand on as numbers, which would be fixed."""
    repeatable: set[fx.Node] = set()
    for n in nodes:
        if n.op == "get_attr" or n.target is torch.ops.aten.sym_size.int or (
            n.target in (operator.add, operator.mul) and all(a in repeatable for a in n.all_input_nodes)
        ):
            repeatable.add(n)
    return repeatable
