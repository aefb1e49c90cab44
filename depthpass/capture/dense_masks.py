"""Recognise a dense attention mask by running the ops that make it on small inputs.

Dynamo's graphs hold masks as tensors ``[batch, 1, queries, keys]``, computed from an ``attention_mask`` argument and
token indices. The ops are run on real inputs, paddings of several kinds, and compared with the masks depthpass can make;
what differs anywhere is refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import _disable_current_modes

from depthpass.errors import UnsupportedModelError

_ROWS = 4
_LARGE = 24
_ADVICE = (
    "Expected a causal mask, a sliding window or chunks, with padding from a 2-D attention_mask [batch, tokens] or packed rows "
    "from position_ids; prefix, bidirectional and custom masks are not supported."
)


@dataclass(frozen=True)
class DenseMask:
    """What a dense mask says.

    Attributes:
        window, chunk: as in :class:`~depthpass.capture.captured.Site`.
        valid: the argument that says which tokens are real; None = all.
        positions: an argument that starts a new sequence wherever it does not count up by one; None = no such.
    """

    window: int | None
    chunk: int | None
    valid: fx.Node | None = None
    positions: fx.Node | None = None


def recognise(mask: fx.Node, batch: sympy.Expr, tokens: sympy.Symbol, where: str) -> DenseMask:
    """Tell what a dense mask computes.

    Args:
        mask: the node that is handed to attention, bool or additive.
        batch, tokens: sizes of the call.
        where: the block, for messages.

    Raises:
        UnsupportedModelError: it depends on something else than one 2-D argument, or is none of the known masks.
    """
    nodes = _ancestors(mask)
    leaf = _leaf(nodes, mask, where)
    probe = _Probe(mask, nodes, leaf, batch, tokens, where)
    with unset_fake_temporarily(), _disable_current_modes(), torch.no_grad():
        kind = probe.match(as_validity=leaf is not None)
        if kind is not None:
            return DenseMask(*kind, valid=leaf)
        if leaf is not None and not leaf.meta["val"].is_floating_point():
            kind = probe.match(as_validity=False)
            if kind is not None:
                return DenseMask(*kind, positions=leaf)
    raise UnsupportedModelError(f"{where}: the attention mask {mask.name!r} is of no known kind. {_ADVICE}")


def evaluate(
    root: fx.Node, values: dict[fx.Node, Tensor], sizes: dict[sympy.Symbol, int], scalars: dict[int, int] | None = None
) -> Tensor:
    """Run the ops that a node needs, on real tensors on the CPU.

    Args:
        values: values of the tensors it starts from.
        sizes: values of the symbols of the shapes.
        scalars: whole numbers to put in place of others, in arithmetic and comparisons.
    """
    env: dict[fx.Node, Any] = dict(values)

    def value(a: Any, swap: bool) -> Any:
        if isinstance(a, fx.Node):
            return env[a]
        if isinstance(a, torch.device):
            return torch.device("cpu")
        if isinstance(a, list | tuple) and not isinstance(a, torch.Size):
            return type(a)(value(x, swap) for x in a)
        if swap and scalars and type(a) is int:
            return scalars.get(a, a)
        return a

    for node in _ancestors(root, stop=set(values)):
        if node in env:
            continue
        target: Any = node.target
        size: Any = node.meta.get("val")
        if isinstance(size, torch.SymInt):
            env[node] = _number(size, sizes)
        elif node.op == "placeholder":  # only its shape is read
            env[node] = torch.zeros([_number(s, sizes) for s in size.shape], dtype=size.dtype)
        elif node.op == "get_attr":
            env[node] = _attribute(node).cpu()
        else:
            swap = _computes(node)
            args = [value(a, swap) for a in node.args]
            env[node] = target(*args, **{k: value(a, swap) for k, a in node.kwargs.items()})
    return env[root]


def _number(size: int | torch.SymInt, sizes: dict[sympy.Symbol, int]) -> int:
    return int(size.node.expr.xreplace(sizes)) if isinstance(size, torch.SymInt) else size


class _Probe:
    def __init__(self, mask: fx.Node, nodes: list[fx.Node], leaf: fx.Node | None, batch, tokens, where: str):
        self.mask, self.leaf, self.where = mask, leaf, where
        constants = sorted({a for n in nodes if _computes(n) for a in n.args if type(a) is int and a > 1})
        # A window of thousands of tokens need not be probed at its true size: the ops are the same for a small one.
        large = [c for c in constants if c >= _LARGE]
        free = (s for s in range(5, _LARGE, 4) if not any(abs(s - c) < 3 for c in constants))
        self.stand_in = dict(zip(large, free))
        if len(self.stand_in) < len(large):
            raise UnsupportedModelError(f"{where}: the attention mask computes with too many sizes, {constants}. {_ADVICE}")
        self.true_size = {self.stand_in.get(c, c): c for c in constants}
        self.count = 3 * max([*self.true_size, 3]) + 5
        self.rows = int(batch) if batch.is_Integer else _ROWS
        self.sizes = {tokens: self.count} | ({} if batch.is_Integer else {batch: self.rows})
        unknown = {
            s for n in nodes if isinstance(v := n.meta.get("val"), torch.SymInt) for s in v.node.expr.free_symbols
        } - set(self.sizes)
        if unknown:
            raise UnsupportedModelError(
                f"{where}: the attention mask depends on the size {', '.join(map(str, unknown))} besides batch and tokens: "
                f"keys of another length than the queries are a KV cache. {_ADVICE}"
            )

    def match(self, as_validity: bool) -> tuple[int | None, int | None] | None:
        """The ``(window, chunk)`` that gives this mask for every probe, or None."""
        probes = list(self._paddings()) if as_validity else list(self._countings())
        candidates: list[tuple[int | None, int | None]] = [(None, None)]
        for small in self.true_size:
            candidates += [(small + d, None) for d in (0, 1, -1)] + [(None, small)]
        seen = [(valid, self._run(given)) for given, valid in probes]
        for window, chunk in candidates:
            if all(self._agrees(window, chunk, valid, mask) for valid, mask in seen):
                return self._true(window), self._true(chunk)
        return None

    def _true(self, small: int | None) -> int | None:
        if small is None:
            return None
        near = next(s for s in (small, small - 1, small + 1) if s in self.true_size)
        return self.true_size[near] + small - near

    def _paddings(self) -> Iterable[tuple[Tensor, Tensor]]:
        """Values of the argument and the validity they mean: none, left, right, both, holes."""
        assert self.leaf is not None
        column = torch.arange(self.count)[None].expand(self.rows, -1)
        row = torch.arange(self.rows)[:, None]
        n = self.count
        scattered = (column * 7 + row * 3) % 5 != 0
        for valid in (
            column >= 0, column >= 1 + row, column >= n // 2 + row, column < n - 2 - row,
            (column >= 2) & (column < n - 3), scattered,
        ):
            yield valid.to(self.leaf.meta["val"].dtype), valid

    def _countings(self) -> Iterable[tuple[Tensor | None, Tensor]]:
        column = torch.arange(self.count)[None].expand(self.rows, -1)
        everything = torch.ones(self.rows, self.count, dtype=torch.bool)
        if self.leaf is None:
            yield None, everything
            return
        for start in (0, 3):
            yield (column + start).to(self.leaf.meta["val"].dtype), everything

    def _run(self, given: Tensor | None) -> Tensor | None:
        start = {}
        if given is not None and self.leaf is not None:
            # Positions may be one row for all.
            start[self.leaf] = given[: 1 if self.leaf.meta["val"].shape[0] == 1 else None].clone()
        try:
            mask = evaluate(self.mask, start, self.sizes, self.stand_in)
        except Exception as error:
            raise UnsupportedModelError(
                f"{self.where}: the attention mask {self.mask.name!r} cannot be evaluated on sample paddings "
                f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}). {_ADVICE}"
            ) from error
        if mask.dtype == torch.bool:
            seen = mask
        else:
            seen = mask == 0
            if not bool((seen | (mask <= torch.finfo(mask.dtype).min / 4)).all()):
                return None  # a bias, not a mask
        shape = (self.rows, seen.shape[1] if seen.dim() == 4 else 1, self.count, self.count)
        return seen.expand(shape) if seen.dim() <= 4 else None

    def _agrees(self, window: int | None, chunk: int | None, valid: Tensor, seen: Tensor | None) -> bool:
        if seen is None:
            return False
        q, k = torch.arange(self.count)[None, :, None], torch.arange(self.count)[None, None, :]
        want = (k <= q) & valid[:, None, :]
        if window is not None:
            want = want & (k > q - window)
        if chunk is not None:
            begin = (valid.long().cumsum(-1) == 0).sum(-1)[:, None, None]
            want = want & ((k - begin) // chunk == (q - begin) // chunk)
        # What padding tokens attend to does not matter: nothing reads them.
        return bool(((seen == want[:, None]) | ~valid[:, None, :, None]).all())


def _leaf(nodes: list[fx.Node], mask: fx.Node, where: str) -> fx.Node | None:
    """The tensor argument whose values a mask depends on."""
    leaves = [n for n in nodes if n.op == "placeholder" and isinstance(n.meta.get("val"), Tensor)]
    leaves = [n for n in leaves if any(not _reads_size(u) for u in n.users if u in nodes) or n is mask]
    if not leaves:
        return None
    if len(leaves) > 1 or leaves[0].meta["val"].dim() != 2 or leaves[0].meta.get("parameter"):
        shapes = ", ".join(f"{n.meta.get('argument', n.name)} {list(n.meta['val'].shape)}" for n in leaves)
        raise UnsupportedModelError(f"{where}: the attention mask depends on {shapes}. {_ADVICE}")
    return leaves[0]


def _reads_size(node: fx.Node) -> bool:
    """Whether a node reads the shape of its tensor only."""
    return str(node.target).startswith(("aten.sym_size", "aten.new_ones", "aten.new_zeros", "aten.new_full"))


def _computes(node: fx.Node) -> bool:
    """Whether whole numbers among a node's arguments are values, not sizes or dimensions."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    name = node.target._schema.name.removeprefix("aten::").strip("_")
    return torch.Tag.pointwise in node.target.tags or name in ("floor_divide", "remainder", "fmod", "div", "bitwise_and")


def _attribute(node: fx.Node) -> Tensor:
    value: Any = node.graph.owning_module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value


def _ancestors(root: fx.Node, stop: set[fx.Node] | None = None) -> list[fx.Node]:
    """The nodes a node needs, itself included, in graph order; nothing before ``stop``."""
    nodes: set[fx.Node] = set()
    stack = [root]
    while stack:
        node = stack.pop()
        if node in nodes:
            continue
        nodes.add(node)
        # Sizes are worked out from their symbols.
        if not (stop and node in stop) and not isinstance(node.meta.get("val"), torch.SymInt):
            stack += node.all_input_nodes
    return [n for n in root.graph.nodes if n in nodes]
