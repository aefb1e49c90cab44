"""Which section of a traced model every node belongs to: the prologue, one block, what follows a block, or the head."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, TypeAlias

import sympy
import torch
from torch import fx

from depthpass.capture.nodes import module_paths, node_of
from depthpass.capture.traced import Traced
from depthpass.errors import UnsupportedModelError

Section: TypeAlias = tuple[Literal["input", "prologue", "block", "after", "head"], int]
"""Kind and number of a section; the number is -1 where there is only one."""

INPUT: Section = ("input", -1)
PROLOGUE: Section = ("prologue", -1)
HEAD: Section = ("head", -1)

_OPS = torch.ops.depthpass
ENTER, LEAVE, FINAL = _OPS.enter.default, _OPS.leave.default, _OPS.final.default


def block_of(marker: fx.Node) -> int:
    """The block that a marker enters or leaves."""
    number = marker.args[1]
    if not isinstance(number, int):
        raise TypeError(f"expected the number of a block, got {number!r}.")
    return number


def expression(size: int | torch.SymInt) -> sympy.Expr:
    """A size as an expression over the symbols of the trace."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def size_of(value: object) -> sympy.Expr | None:
    """A value as an expression; None = not a size."""
    return expression(value) if isinstance(value, torch.SymInt | int) and not isinstance(value, bool) else None


def is_size(node: fx.Node) -> bool:
    """Whether a node computes a size and no tensor."""
    return isinstance(node.meta.get("val"), torch.SymInt | int)


class Ports:
    """The markers of a traced model: where each block is entered and left, and the base model's last hidden state.

    Attributes:
        enters, leaves: marker nodes by block.
        final: marker of the last hidden state.
        batch, tokens: symbols of the hidden stream's shape (a number when the batch is static).
        width: of the hidden stream.

    Raises:
        UnsupportedModelError: a block ran other than once, or something is computed between two blocks.
    """

    def __init__(self, traced: Traced):
        nodes, layers, count = traced.module.graph.nodes, traced.layers, traced.count
        ran = [block_of(n) for n in nodes if n.target is ENTER]
        self.enters = {block_of(n): n for n in nodes if n.target is ENTER}
        self.leaves = {block_of(n): n for n in nodes if n.target is LEAVE}
        finals = [n for n in nodes if n.target is FINAL]
        if ran != list(range(count)) or len(finals) != 1:
            raise UnsupportedModelError(
                f"expected every block of {layers} to run exactly once, in their order, and one base model output; "
                f"blocks that ran: {ran}, base model outputs: {len(finals)}. A model that repeats or reorders its blocks by "
                "itself cannot be rewired; of one that does not, dp.Loop and dp.LayerProgram make one that does."
            )
        self.final: fx.Node = finals[0]
        hidden = self.enters[0].meta["val"]
        if hidden.dim() != 3:
            raise UnsupportedModelError(
                f"{layers}: expected one hidden stream [batch, tokens, width] between its blocks, got {tuple(hidden.shape)}; "
                "a model whose blocks pass on several streams cannot be rewired."
            )
        self.batch, self.tokens = expression(hidden.shape[0]), expression(hidden.shape[1])
        self.width: int = hidden.shape[2]

    def check_between(self) -> None:
        """Refuse models that compute something between two blocks.

        Raises:
            UnsupportedModelError: naming the value.
        """
        for i in range(1, len(self.enters)):
            between = node_of(self.enters[i].args[0])
            if between is not self.leaves[i - 1]:
                raise UnsupportedModelError(
                    f"between block {i - 1} and block {i} the model computes {between.name!r}; only the hidden "
                    "stream may flow from block to block."
                )


class Sections:
    """The section of every node.

    Attributes:
        of: sections by node.
        free: nodes of a block that do not depend on its hidden stream; they may move to where they are used.

    Raises:
        UnsupportedModelError: a value other than the hidden stream leaves a block; names it.
    """

    def __init__(self, traced: Traced, final: fx.Node):
        self.graph, self.layers, self.count, self.final = traced.module.graph, traced.layers, traced.count, final
        self.of: dict[fx.Node, Section] = {}
        self.free: set[fx.Node] = set()
        for node in self.graph.nodes:
            self.of[node] = self._section(node)
        self._hoist_shared()

    def _section(self, node: fx.Node) -> Section:
        if node.op in ("placeholder", "get_attr"):
            return INPUT
        inputs = [self.of[a] for a in node.all_input_nodes if a not in self.free]
        inside = {i for kind, i in inputs if kind == "block"}
        after = {i for kind, i in inputs if kind == "after"}
        if node.op == "output":
            self._no_block_values(node)
        if node.target in (ENTER, LEAVE):
            return "block" if node.target is ENTER else "after", block_of(node)
        if node is self.final or HEAD in inputs:
            self._no_block_values(node)
            return HEAD
        if inside:
            if len(inside) > 1 or after:
                self._no_block_values(node, block=max(inside | after))
            return "block", inside.pop()
        if after:
            return "after", max(after)
        if node.op == "output":
            return HEAD
        block = self._block_of_module(node)
        if block is None or is_size(node):
            return PROLOGUE
        self.free.add(node)
        return "block", block

    def _block_of_module(self, node: fx.Node) -> int | None:
        """The block whose module computed a node."""
        for path in module_paths(node):
            rest = path[len(self.layers) + 1 :] if path.startswith(self.layers + ".") else ""
            if rest.split(".")[0].isdigit():
                return int(rest.split(".")[0])
        return None

    def _hoist_shared(self) -> None:
        """Move side computations to where they are used: shared ones to the prologue, the head's own to the head."""
        last: Section = ("after", self.count - 1)
        for node in reversed(self.graph.nodes):
            users = {self.of[u] for u in node.users if "assert" not in str(u.target)}
            own = users.pop() if len(users) == 1 else None
            if self.of[node] == PROLOGUE and own is not None and own in (HEAD, last) and not is_size(node):
                self.of[node] = own
            elif node in self.free and (users or own != self.of[node]):
                self.of[node] = PROLOGUE

    def _no_block_values(self, node: fx.Node, block: int | None = None) -> None:
        for a in node.all_input_nodes:
            kind, number = self.of[a]
            if a not in self.free and kind == "block" and number != block:
                where = "the output" if block is None else f"block {block}"
                raise UnsupportedModelError(
                    f"block {number}: value {a.name!r} flows into {where}; only the hidden stream may leave "
                    "a block (router logits, attention weights or all hidden states were asked for?)."
                )

    def nodes(self, section: Section, roots: Iterable[object]) -> list[fx.Node]:
        """Nodes of a section (and sizes) that the roots need, in graph order."""
        need: set[fx.Node] = set()
        stack = [r for r in roots if isinstance(r, fx.Node)]
        while stack:
            n = stack.pop()
            if n in need or self.of[n] != section:
                continue
            need.add(n)
            stack += n.all_input_nodes
        return [n for n in self.graph.nodes if n in need]

    def outside(
        self, section: Section, nodes: Sequence[fx.Node], roots: Iterable[object], entry: fx.Node | None
    ) -> list[fx.Node]:
        """What nodes of a section and its results read from outside it, besides the hidden stream ``entry``; each once."""
        read = [a for n in nodes for a in n.all_input_nodes]
        read += [r for r in roots if isinstance(r, fx.Node)]
        return [a for a in dict.fromkeys(read) if a is not entry and self.of[a] != section]
