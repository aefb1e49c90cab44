"""Cut an exported graph into prologue, one graph per block, final norm and head, at the markers of the capture.

Only the hidden stream may flow from block to block; anything else is an error that names the value. Blocks whose
graphs are equal share one template.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import fx
from torch.export.graph_signature import InputKind
from torch.fx.node import Argument

from depthpass.capture import calls, derivatives
from depthpass.capture.attention import NOTHING, sees_nothing
from depthpass.capture.captured import Block, Capture, Part, Site, Template
from depthpass.capture.legality import check_token_local
from depthpass.capture.nodes import node_of
from depthpass.capture.sections import HEAD, PROLOGUE, Ports, Section, Sections, is_size, size_of
from depthpass.capture.subgraph import MASK, Subgraph, module_path
from depthpass.capture.traced import Traced
from depthpass.errors import UnsupportedModelError

_ATTEND = torch.ops.depthpass.attend.default


def outline(traced: Traced) -> Capture:
    """Outline a traced model.

    Raises:
        UnsupportedModelError: naming the block and the value or op that stands in the way.
    """
    if traced.written:
        raise UnsupportedModelError(
            f"the forward pass writes buffers ({', '.join(traced.written)}); state must be an argument and a result."
        )
    return _Outliner(traced).run()


class _Outliner:
    """Working state of one outlining; lives for one call of :func:`outline`.

    Attributes:
        side_nodes: what the prologue hands to blocks and head, in the order of its outputs.
    """

    def __init__(self, traced: Traced):
        self.traced, self.kinds = traced, traced.kinds
        self.layers, self.count = traced.layers, traced.count
        self.ports = Ports(traced)
        self.batch, self.tokens = self.ports.batch, self.ports.tokens
        self.sections = Sections(traced, self.ports.final)
        self.ports.check_between()
        self.side_nodes: list[fx.Node] = []

    def run(self) -> Capture:
        enters, leaves, final = self.ports.enters, self.ports.leaves, self.ports.final
        shared: dict[Hashable, Template] = {}
        blocks: list[Block] = []
        for i in range(self.count):
            earlier = self.traced.repeats.get(i)
            blocks.append(self._block(i, enters[i], leaves[i], shared) if earlier is None else replace(blocks[earlier]))
        norm = self._part("norm", ("after", self.count - 1), leaves[self.count - 1], [final.args[0]])
        output = next(n for n in self.traced.module.graph.nodes if n.op == "output")
        head = self._part("head", HEAD, final, list(cast(Sequence[Argument], output.args[0])), local=False)
        roots = [enters[0].args[0], *self.side_nodes]
        prologue = self._part("prologue", PROLOGUE, None, roots, local=not self.traced.whole_rows)
        axes = tuple(self._token_axis(n) for n in self.side_nodes)
        if self.traced.out_spec is None:
            raise UnsupportedModelError("the trace does not say how the model's outputs are put together.")
        return Capture(prologue, axes, tuple(blocks), norm, head, self.layers, self.ports.width, self.traced.out_spec,
                       tuple(self.traced.functions.lost))

    def _token_axis(self, node: fx.Node) -> int | None:
        shape = node.meta["val"].shape
        axes = [d for d, s in enumerate(shape) if (e := size_of(s)) is not None and self.tokens in e.free_symbols]
        if not axes:
            return None
        if len(axes) > 1 or size_of(shape[axes[0]]) != self.tokens:
            raise UnsupportedModelError(
                f"side input {node.name!r} of shape {tuple(shape)} is not a per-token table (dense masks and biases "
                "over pairs of tokens are not supported)."
            )
        return axes[0]

    def _is_input(self, node: fx.Node) -> bool:
        """Whether a placeholder is an argument of the call, not a parameter, buffer or constant."""
        return self.kinds[node.name][0] == InputKind.USER_INPUT

    def _subgraph(self, where: str, entry: fx.Node | None) -> Subgraph:
        b = Subgraph(self.traced.module, where, self.layers, self.batch, self.tokens, self.traced.functions)
        if entry is not None:
            b.enter(entry)
        return b

    def _block(self, i: int, enter: fx.Node, leave: fx.Node, shared: dict[Hashable, Template]) -> Block:
        section: Section = ("block", i)
        roots = [node_of(leave.args[0])]
        b = self._subgraph(f"block {i}", enter)
        nodes = [n for n in self.sections.nodes(section, roots) if n is not enter]
        check_token_local(nodes, self.batch, self.tokens, b.where)
        self._functions(b, nodes)
        outside = self.sections.outside(section, nodes, roots, enter)
        side_inputs = self._bind_sides(b, outside)
        params, constants = self._bind_params(b, outside, f"{self.layers}.{i}.")
        self._inline_sizes(outside, b)
        sites: list[Site] = []
        for n in nodes:
            if n.target is _ATTEND:
                sites.append(self._site(n, i))
                q, k, v, _, sinks = (b.env.get(x) if isinstance(x, fx.Node) else x for x in n.args[:5])
                given = (q, k, v) if sinks is None else (q, k, v, sinks)
                b.env[n] = b.call(calls.attend, (b.visit, len(sites) - 1, *given), n)
            else:
                b.copy(n)
        gm = b.finish(b.env[roots[0]])
        index = tuple(self._side(s) for s in side_inputs)
        metas = tuple((str(a.meta["val"].dtype), tuple(a.meta["val"].shape)) for a in outside
                      if a.op == "placeholder" and isinstance(a.meta.get("val"), torch.Tensor) and not self._is_input(a))
        # get_attr submodules are told apart by name, so blocks that use them never share a template by accident.
        key = (gm.code, len(side_inputs), tuple(params), tuple(sites), metas, b.attributes())
        template = shared.setdefault(key, Template(gm, len(side_inputs), tuple(params), tuple(sites)))
        return Block(template, index, constants)

    def _functions(self, b: Subgraph, nodes: Sequence[fx.Node]) -> None:
        """Find what functions with a backward of their own have traced, and those whose backward cannot be run."""
        functions, b.interior = self.traced.functions, derivatives.interior(nodes)
        for node in nodes:
            if node in b.interior:
                closed = any(a not in b.interior and a.target is not derivatives.IN and self._is_data(a)
                             for a in node.all_input_nodes)
                if closed:
                    functions.lose(functions.calls[b.interior[node]].name)
            elif node.target is derivatives.OUT:
                call, marks = functions.calls[derivatives.number_of(node)], cast("list[fx.Node]", node.args[1])
                if not derivatives.splits(call, marks, self.batch, self.tokens):
                    functions.lose(call.name)

    def _is_data(self, node: fx.Node) -> bool:
        """Whether a node is a tensor of the call or of the model, and no constant."""
        constant = node.op == "placeholder" and self.kinds[node.name][0] == InputKind.CONSTANT_TENSOR
        return isinstance(node.meta.get("val"), torch.Tensor) and node.op != "get_attr" and not constant

    def _bind_sides(self, b: Subgraph, outside: Sequence[fx.Node]) -> list[fx.Node]:
        """Placeholders for the side inputs of a block: what it reads of the prologue and of the call's arguments.

        Raises:
            UnsupportedModelError: it reads something of another block.
        """
        side_inputs: list[fx.Node] = []
        for a in outside:
            if is_size(a) or a.target is MASK or a.op == "get_attr" or (a.op == "placeholder" and not self._is_input(a)):
                continue
            if (kind := self.sections.of[a][0]) not in ("prologue", "input"):
                raise UnsupportedModelError(
                    f"{b.where} reads {a.name!r} of {kind} {self.sections.of[a][1]}; only the hidden stream may "
                    "flow from block to block."
                )
            b.env[a] = b.placeholder(f"side{len(side_inputs)}")
            side_inputs.append(a)
        return side_inputs

    def _bind_params(
        self, b: Subgraph, outside: Sequence[fx.Node], prefix: str | None
    ) -> tuple[list[str], dict[str, torch.Tensor]]:
        """Placeholders for parameters, buffers and constants that are read.

        Args:
            prefix: names under it become relative to it and others start with ``/``; None = all names are full.

        Returns:
            names in the order of the placeholders; values of constants by name.
        """
        params: list[str] = []
        constants: dict[str, torch.Tensor] = {}
        for a in outside:
            if a.op != "placeholder" or a in b.env or self._is_input(a):
                continue
            kind, target = self.kinds[a.name]
            if target is None:
                raise UnsupportedModelError(f"{b.where} reads {a.name!r} ({kind.name}), which stands for no parameter.")
            if kind == InputKind.CONSTANT_TENSOR:
                name = f"constant{len(constants)}"
                constants[name] = self.traced.constants[target]
            elif prefix is not None:
                name = target.removeprefix(prefix) if target.startswith(prefix) else "/" + target
            else:
                name = target
            params.append(name)
            b.env[a] = b.placeholder("p_" + name.replace(".", "_").replace("/", "root_"))
        return params, constants

    def _part(self, name: str, section: Section, entry: fx.Node | None, roots: Sequence[Argument], local: bool = True) -> Part:
        """Prologue, norm or head.

        Args:
            entry: the node that stands for the hidden stream; None = it reads none.
            roots: its results.
            local: every op must treat each token by itself.
        """
        b = self._subgraph(name, entry)
        nodes = [n for n in self.sections.nodes(section, roots) if n is not entry]
        if local:
            check_token_local(nodes, self.batch, self.tokens, name)
        self._functions(b, nodes)
        outside = self.sections.outside(section, nodes, roots, entry)
        extras, inputs = [], []
        for a in outside:
            if section != PROLOGUE and self.sections.of[a] == PROLOGUE and not is_size(a):
                b.env[a] = b.placeholder(f"extra{len(extras)}")
                extras.append(self._side(a))
        for a in outside:
            if a.op == "placeholder" and self._is_input(a) and isinstance(a.meta.get("val"), torch.Tensor):
                inputs.append(a.name)
                b.env[a] = b.placeholder("in_" + a.name)
        params, constants = self._bind_params(b, outside, None)
        self._inline_sizes(outside, b)
        for n in nodes:
            b.copy(n, columns=local)
        result = tuple(b.env[r] if isinstance(r, fx.Node) else r for r in roots)
        gm = b.finish(result if name != "norm" else result[0])
        return Part(gm, tuple(inputs), tuple(params), tuple(extras), constants)

    def _side(self, node: fx.Node) -> int:
        if node not in self.side_nodes:
            self.side_nodes.append(node)
        return self.side_nodes.index(node)

    def _inline_sizes(self, outside: Sequence[fx.Node], b: Subgraph) -> None:
        for a in outside:
            size = size_of(a.meta["val"]) if is_size(a) else None
            if size is not None and a not in b.env and b.hidden is not None:
                b.env[a] = b.size(size, a)

    def _site(self, node: fx.Node, i: int) -> Site:
        q, k, v, mask, sinks, scale, softcap, dropout = cast("tuple[Any, ...]", node.args)
        if mask.target is not MASK:
            raise UnsupportedModelError(
                f"block {i}: the attention mask passes through {mask.name!r} ({mask.target}); masks that a layer edits "
                "are not supported."
            )
        qs, ks, vs = (x.meta["val"].shape for x in (q, k, v))
        if size_of(qs[2]) != self.tokens or size_of(ks[2]) != self.tokens:
            raise UnsupportedModelError(
                f"block {i}: expected attention over the tokens of the row, got queries {tuple(qs)} and keys {tuple(ks)}."
            )
        window, chunk = mask.args[1], mask.args[2]
        if window == NOTHING:
            raise UnsupportedModelError(f"block {i}: its attention mask {sees_nothing(NOTHING)}")
        return Site(
            module_path(node).removeprefix(f"{self.layers}.{i}").removeprefix("."), scale, softcap or None, dropout,
            window if window > 0 else None, chunk if chunk > 0 else None, sinks is not None,
            int(qs[1]), int(ks[1]), int(ks[3]), int(vs[3]),
        )
