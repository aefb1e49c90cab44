"""The table of learned absolute positions of a decoder, which a row may run out of."""

from __future__ import annotations

from typing import Any

from torch import nn


def position_table(decoder: Any) -> str | None:
    """Path of the learned absolute positions in a text decoder, or None (rotary models have no table to run out of).

    The tables of vision and audio towers lie outside of it and say nothing about text.
    """
    tokens = decoder.get_input_embeddings()
    for name, module in decoder.named_modules():
        leaf = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and module is not tokens and ("pos" in leaf or leaf == "wpe"):
            return name
    return None


def table_size(model: Any) -> int | None:
    """Positions that a transformed model's table has now; None = it has no table."""
    runtime = model._depth
    if runtime.position_table is None:
        return None
    table = model.get_submodule(runtime.decoder).get_submodule(runtime.position_table)
    return table.num_embeddings - getattr(table, "offset", 0)
