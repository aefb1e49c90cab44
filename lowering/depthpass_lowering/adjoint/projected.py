"""Projections to q, k and v, rotary embeddings and attention of a visit as one node.

By themselves they are thirty small ops and as many views of a chunk: here q and k turn together, in place, keys and values go
to their buffer in one copy, and the gradients of all three are written side by side, as the projections' backward pass
reads them.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from depthpass.capture import calls
from depthpass_lowering.adjoint.fused import rope
from depthpass_lowering.adjoint.registry import rule
from depthpass_lowering.adjoint.reverse import Reverse, Tape, Unsupported
from depthpass_lowering.adjoint.sites import Site
from depthpass_lowering.fx_passes.products import products
from depthpass_lowering.state.buffers import Use

aten = torch.ops.aten


def projected(visit, number: int, weights, biases, gain, x: Tensor, dim: int, rotation: tuple | None) -> Tensor:
    """Attention of what the three weights make of ``x [B, C, width]``: ``[B, C, heads, dim]``.

    Args:
        number: of the attention call.
        gain: of the norm that ``x`` comes from, None = in x.
        rotation: ``(cos, sin, half)`` of q and k.
    """
    parts = products(False, weights, biases, x, gain)
    q, k, v = (y.view(*y.shape[:-1], -1, dim).transpose(1, 2) for y in parts)
    if rotation is not None:
        q, k = rope(q, *rotation), rope(k, *rotation)
    return calls.attend(visit, number, q, k, v)


def join_attention_pass(graph: fx.Graph, own: set[fx.Node]) -> int:
    """Put :func:`projected` in place of attention calls whose q, k and v come straight from one product.

    Numerics: exact.

    Args:
        own: visits that write the keys they read.

    Returns:
        how many were found.
    """
    count = 0
    for node in list(graph.nodes):
        if node.target is calls.attend and node.args[0] in own:
            count += _join(graph, node)
    return count


def _join(graph: fx.Graph, node: Any) -> bool:
    visit, number, *sides, sinks = (*node.args, *([None] if len(node.args) == 5 else []))
    if sinks is not None or node.kwargs.get("sinks") is not None:
        return False
    origins = [_origin(x) for x in sides]
    if any(f is None for f in origins):
        return False
    whole, places, dims, rotations = zip(*origins)
    source = whole[0]
    if len({*whole}) != 1 or places != (0, 1, 2) or len({*dims}) != 1 or len(source.users) != 3:
        return False
    if rotations[0] != rotations[1] or rotations[2] is not None or source.args[0] or len(source.args[1]) != 3:
        return False
    _, weights, biases, x, *gain = source.args
    with graph.inserting_before(node):
        joined = graph.call_function(
            projected, (visit, number, weights, biases, gain[0] if gain else None, x, dims[0], rotations[0])
        )
    joined.meta = dict(node.meta)
    node.replace_all_uses_with(joined)
    graph.erase_node(node)
    for side in sides:
        _erase_up(side)
    return True


def _erase_up(node: Any) -> None:
    """Erase a node nobody reads, and those before it that then nobody reads."""
    while not node.users:
        before = node.all_input_nodes[0]
        node.graph.erase_node(node)
        node = before


def _origin(x: Any) -> tuple[fx.Node, int, int, tuple | None] | None:
    """``(product, which of its results, head size, rotation)`` of a q, k or v, or None."""
    rotation = None
    if _one(x, rope):
        cos, sin, half = x.args[1:]
        if not (_for_all_heads(cos) and _for_all_heads(sin)):
            return None
        rotation, x = (cos, sin, half), x.args[0]
    if not _one(x, aten.transpose.int) or tuple(x.args[1:]) != (1, 2):
        return None
    heads = x.args[0]
    if not _one(heads, aten.view.default, aten.reshape.default):
        return None
    part, sizes = heads.args
    if len(sizes) != 4 or not isinstance(sizes[3], int) or sizes[3] < 1 or not _one(part, operator.getitem):
        return None
    product, place = part.args
    return (product, place, sizes[3], rotation) if product.target is products else None


def _one(x: Any, *targets: object) -> bool:
    return isinstance(x, fx.Node) and x.target in targets and len(x.users) == 1 and not x.kwargs


def _for_all_heads(table: Any) -> bool:
    """Whether a rotary table is ``[batch or 1, 1, tokens, dim]``."""
    value = table.meta.get("val")
    return isinstance(value, Tensor) and value.dim() == 4 and value.shape[1] == 1


@rule(projected)
def _projected(t: Tape, n: Any) -> None:
    visit, number, weights, biases, gain, x, dim, rotation = n.args
    if not isinstance(t, Reverse):
        raise Unsupported("attention that is computed again")
    if rotation is not None and any(table in t.active for table in rotation[:2]):
        raise Unsupported("a rotary table that is trained")
    site, spec = t.site(weights, biases, False, False, gain)
    tables = None if rotation is None else _tables_of(t, *rotation)
    trained = t.trains(spec)
    both = t.emit(run_taped, visit, number, site, x, dim, tables)
    t.env[n] = t.emit(operator.getitem, both, 0)
    if not (trained or x in t.active):
        return
    tape = t.emit(operator.getitem, both, 1)

    def finish(whole: fx.Node) -> None:
        if trained:
            t.back_method("hold", site, x, whole)
        if x in t.active:
            t.add(x, t.back_method("back", site, whole), True)

    # Others may read the keys of a visit whose result nobody does.
    t.on_back(n, lambda g: finish(t.back_method("__call__", tape, g)), lambda: finish(t.back_method("own", tape)))


def _tables_of(t: Tape, cos: fx.Node, sin: fx.Node, half: int) -> tuple[fx.Node, ...]:
    """Tables of :func:`turn`, once for all visits of a chunk."""
    key = "by token", cos, sin, half
    if key not in t.tables:
        tables = t.emit(_tables, cos, sin, half)
        t.tables[key] = tuple(t.emit(operator.getitem, tables, i) for i in range(3))
    return t.tables[key]


def _tables(cos: Tensor, sin: Tensor, half: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cosines, sines with the sign of the rotation and those of its transpose, ``[batch or 1, tokens, 1, dim]``."""
    cos, sin = cos.transpose(1, 2), sin.transpose(1, 2)
    first, second = sin[..., :half], sin[..., half:]
    return cos, torch.cat((-first, second), -1), torch.cat((second, -first), -1)


def turn(x: Tensor, cos: Tensor, signed: Tensor) -> None:
    """Rotate the heads of ``x [B, C, heads, dim]`` in place."""
    rolled = torch.roll(x, x.shape[-1] // 2, -1)
    x.mul_(cos).addcmul_(rolled, signed)


def run_taped(
    visit, number: int, site: Site, x: Tensor, dim: int, tables: Sequence[Tensor] | None
) -> tuple[Tensor, ProjectedTape]:
    """:func:`projected`, and what its backward pass needs."""
    y, use = site.forward(x), visit.use(number)
    sizes = site.head_sizes(dim)
    parts = y.view(*y.shape[:-1], -1, dim)
    turned = sizes[0] + sizes[1]
    if tables is not None:
        turn(parts.narrow(2, 0, turned), tables[0], tables[1])
    q, kv = torch.split_with_sizes(parts, (sizes[0], 2 * sizes[1]), 2)
    if use.plain(y):
        use.buffer.write_both(kv.view(*kv.shape[:2], 2, sizes[1], dim), use.start)
        out, tape = use.chunk(q)
    else:
        k, v = kv.chunk(2, 2)
        out, tape = use.taped(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None)
    return out, ProjectedTape(use, tape, sizes[0], turned, tables)


class ProjectedTape:
    """What the backward pass needs: called with the gradient of the result, returns that of all projections side by side.

    Args:
        tape: of the attention.
        queries: heads of q.
        turned: heads of q and k.
    """

    __slots__ = ("queries", "tables", "tape", "turned", "use")

    def __init__(self, use: Use, tape: Any, queries: int, turned: int, tables: Sequence[Tensor] | None):
        self.use, self.tape, self.queries, self.turned, self.tables = use, tape, queries, turned, tables

    def __call__(self, grad: Tensor) -> Tensor:
        return self._whole(self.tape(grad)[0].transpose(1, 2))

    def own(self) -> Tensor:
        """The gradient where only others have read the keys."""
        k, _ = self.use.buffer.held()
        return self._whole(k.new_zeros(k.shape[0], self.use.count, self.queries, k.shape[3]))

    def _whole(self, q: Tensor) -> Tensor:
        whole = torch.cat((q, self.use.own_by_token()), 2)
        if self.tables is not None:
            turn(whole.narrow(2, 0, self.turned), self.tables[0], self.tables[2])
        return whole.flatten(2)
