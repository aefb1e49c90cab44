"""What an op does besides returning values."""

from __future__ import annotations

from torch import fx

from depthpass.capture import calls


def writes(node: fx.Node) -> bool:
    """Whether an op writes into an argument."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def keeps(node: fx.Node) -> bool:
    """Whether an op matters even where nothing reads its result: attention puts its keys into a slot that others read."""
    return node.target is calls.attend or node.is_impure()
