"""The table of learned absolute positions of a decoder, which a row may run out of."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel


def position_table(decoder: Any) -> str | None:
    """Path of the learned absolute positions in a text decoder, or None (rotary models have no table to run out of).

    The tables of vision and audio towers say nothing about text, even where a decoder's embedding holds the towers.
    """
    tokens = decoder.get_input_embeddings()
    towers = {id(t) for m in decoder.modules() if m is not decoder and isinstance(m, PreTrainedModel) for t in m.modules()}
    for name, module in decoder.named_modules():
        leaf, own = name.rpartition(".")[2], module is not tokens and id(module) not in towers
        if own and isinstance(module, nn.Embedding) and ("pos" in leaf or leaf == "wpe"):
            return name
    return None


def table_size(model: Any) -> int | None:
    """Positions that a transformed model's table has now; None = it has no table."""
    runtime = model._depth
    if runtime.position_table is None:
        return None
    table = model.get_submodule(runtime.decoder).get_submodule(runtime.position_table)
    return table.num_embeddings - getattr(table, "offset", 0)
