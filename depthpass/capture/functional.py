"""Replace in-place ops of an exported graph by their functional forms.

``torch.export`` leaves in-place ops of the stock code in the graph. A block's graph must not write the streams it is
given (a delay or another visit may still read them), and cutting a graph at its results would lose a write whose own
result nobody uses. Values are unchanged: each functional form runs the same kernel on a fresh output.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from depthpass.capture.legality import place
from depthpass.capture.nodes import node_of, op_of
from depthpass.errors import UnsupportedModelError

_SCATTERS = {
    torch.ops.aten.slice.Tensor: torch.ops.aten.slice_scatter.default,
    torch.ops.aten.select.int: torch.ops.aten.select_scatter.default,
}
"""Views of part of a tensor, and the op that puts such a part back."""

# Ops that may return their input itself although their schema does not say so.
_MAY_ALIAS = {"aten::type_as", "aten::dropout", "aten::alpha_dropout", "aten::feature_dropout", "aten::lift_fresh"}


_CASTS = {"aten::to", "aten::_to_copy", "aten::alias", "aten::detach", "aten::detach_"}


def functionalise(module: fx.GraphModule, writable: frozenset[str] = frozenset()) -> int:
    """Make a graph and its subgraphs functional, in place; return how many ops were replaced.

    Args:
        writable: names of placeholders that may be written (the call's own arguments, not parameters or buffers).

    Raises:
        UnsupportedModelError: a write cannot be followed: to a parameter, or to a tensor that is also read through
            another view later.
    """
    changed = 0
    for child in module.children():
        if isinstance(child, fx.GraphModule):
            changed += functionalise(child)
    order = {node: i for i, node in enumerate(module.graph.nodes)}
    shares: dict[fx.Node, set[fx.Node]] = {}
    for node in module.graph.nodes:
        shares[node] = _aliases(node, shares)
        if _is_write(node):
            _replace(node, shares, order, writable)
            changed += 1
    if changed:
        module.graph.lint()
        module.recompile()
    return changed


def _schema(node: fx.Node) -> Any:
    return node.target._schema if isinstance(node.target, torch._ops.OpOverload) else None


def _is_write(node: fx.Node) -> bool:
    schema = _schema(node)
    return schema is not None and schema.is_mutable


def _is_fresh(node: fx.Node) -> bool:
    """Whether an op makes new tensors."""
    schema = _schema(node)
    return schema is not None and schema.name not in _MAY_ALIAS and not any(r.alias_info for r in schema.returns)


def _aliases(node: fx.Node, shares: dict[fx.Node, set[fx.Node]]) -> set[fx.Node]:
    """Nodes whose storage a node may share; the set is shared by all its members."""
    sources = [] if _is_fresh(node) else node.all_input_nodes
    if _schema(node) is not None and sources:
        # The first argument, unless the schema names another: views and in-place ops share no other storage.
        shared = [a.alias_info is not None for a in _schema(node).arguments]
        sources = [v for v, is_shared in zip(node.args, shared if any(shared) else [True]) if is_shared]
        sources = [v for v in sources if isinstance(v, fx.Node)]
    if node.target is operator.getitem and _is_fresh(node.all_input_nodes[0]):
        # Results of one op are apart from each other: only a second look at the same one shares its storage.
        sources = [n for n in node.all_input_nodes[0].users if n in shares and n.args == node.args]
    merged = {node}
    for source in sources:
        merged |= shares.get(source, {source})
    for member in merged:
        shares[member] = merged
    return merged


def _replace(
    node: fx.Node, shares: dict[fx.Node, set[fx.Node]], order: dict[fx.Node, int], writable: frozenset[str]
) -> None:
    schema = _schema(node)
    written = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    packet = getattr(torch.ops.aten, schema.name.removeprefix("aten::").removesuffix("_"), None)
    overload = getattr(packet, schema.overload_name or "default", None)
    if written != [schema.arguments[0].name] or overload is None or not schema.name.endswith("_"):
        raise UnsupportedModelError(f"{place(node)}: writes {', '.join(written)} in place; no functional form is known.")
    written_to = node_of(node.args[0])
    chain = _views(written_to)
    for member in shares.get(written_to, set(chain)) - {node}:
        if member.op in ("placeholder", "get_attr") and member.name not in writable:
            raise UnsupportedModelError(
                f"{place(node)}: writes {member.name!r} in place, which is a parameter, a buffer or an outside value; "
                "a forward pass must not change what the next call sees."
            )
        if member not in chain and any(order[user] > order[node] and user not in chain for user in member.users):
            raise UnsupportedModelError(
                f"{place(node)}: writes a view of {member.name!r}, which is read again later through another view; assign "
                "to a new tensor instead (torch.where, torch.cat, torch.index_put)."
            )
    _retarget(node, overload)
    new, after = node, order[node]
    for i, old in enumerate(chain):
        if i > 0:
            # What was written is part of a larger tensor: put it back there.
            view = chain[i - 1]
            with node.graph.inserting_after(new):
                new = node.graph.call_function(_SCATTERS[op_of(view)], (old, new, *view.args[1:]), dict(view.kwargs))
            new.meta = {**node.meta, "val": old.meta["val"]}
            order[new] = after
        shares[new] = {new}
        old.replace_all_uses_with(new, delete_user_cb=lambda user, new=new: order[user] > after and user is not new)


def _retarget(node: fx.Node, overload: Any) -> None:
    if overload is torch.ops.aten.copy.default and _alike(*map(node_of, node.args[:2]), dtype=False):
        # ``copy`` itself has no derivative.
        target, source = map(node_of, node.args[:2])
        node.target, node.args, node.kwargs = torch.ops.aten.to.dtype, (source, target.meta["val"].dtype), {}
    else:
        node.target = overload


def _alike(a: fx.Node, b: fx.Node, dtype: bool = True) -> bool:
    x, y = a.meta["val"], b.meta["val"]
    return x.shape == y.shape and x.device == y.device and (x.dtype == y.dtype or not dtype)


def drop_void_writes(graph: fx.Graph) -> set[str]:
    """Erase writes that give a tensor the values it has: ``self.table = self.table.to(device, dtype)`` is traced as one.

    Returns:
        names of the nodes that are gone.
    """
    gone = set()
    for node in list(graph.nodes):
        if node.target is not torch.ops.aten.copy_.default:
            continue
        source = node_of(node.args[1])
        while source.op == "call_function" and _schema(source) is not None and source.args and (
            _schema(source).name in _CASTS and _alike(source, node_of(source.args[0]))
        ):
            source = node_of(source.args[0])
        if source is node.args[0]:
            gone.add(node.name)
            node.replace_all_uses_with(source)
            graph.erase_node(node)
    return gone


def _views(target: fx.Node) -> list[fx.Node]:
    """A written tensor, what it is a slice of, what that is a slice of, and so on."""
    chain = [target]
    while chain[-1].target in _SCATTERS:
        chain.append(node_of(chain[-1].args[0]))
    return chain
