"""What an op does besides returning values."""

from __future__ import annotations

from torch import fx


def writes(node: fx.Node) -> bool:
    """Whether an op writes into an argument."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable
