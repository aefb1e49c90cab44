"""``compare`` and ``sweep``: several specs on one model, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from depthpass.errors import SpecError
from depthpass.passes.base import Pass
from depthpass.report import tables
from depthpass.report.subject import Subject
from depthpass.report.tables import Comparison
from depthpass.spec import SpecLike, load_spec


def compare(
    model_or_config: Any,
    specs: Mapping[str, SpecLike | None] | Sequence[SpecLike | None],
    *,
    seq_len: int = 1024,
    batch: int = 1,
    chunk: int | None = None,
    cost: bool = True,
    **options: Any,
) -> Comparison:
    """Reports of several specs on one model, side by side; the model is captured once.

    Args:
        model_or_config: a stock model or config, as for :func:`depthpass.report`.
        specs: by the names of their columns, or a list that is named by its passes; None = the stock model.
        seq_len, batch, chunk, cost, options: as for :func:`depthpass.report`.

    Raises:
        SpecError: no spec, or the errors of :func:`depthpass.report`.

    Example:
        >>> config = {"model_type": "llama", "num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 128,
        ...           "num_attention_heads": 4, "vocab_size": 100}
        >>> table = compare(config, [None, "{pass: loop, start: 1, end: 3, times: 2}"], seq_len=8, cost=False)
        >>> table.names
        ('stock', 'loop(start=1, end=3, times=2)')
    """
    if isinstance(specs, Mapping):
        pairs = [(str(name), spec) for name, spec in specs.items()]
    elif isinstance(specs, str | Path | Pass) or not isinstance(specs, Sequence):
        raise SpecError(f"compare: expected several specs, by name or in a list, got {specs!r}. For one, use dp.report.")
    else:
        pairs = [(_name(spec), spec) for spec in specs]
    names = [name for name, _ in pairs]
    if repeated := next((n for n in names if names.count(n) > 1), None):
        raise SpecError(f"compare: expected different names of columns, got {repeated!r} twice. Give the specs by name.")
    return tables.compare(Subject.of(model_or_config), pairs, seq_len=seq_len, batch=batch, chunk=chunk, cost=cost, **options)


def sweep(
    model_or_config: Any,
    spec: SpecLike,
    groups: Sequence[int],
    *,
    seq_len: int = 1024,
    batch: int = 1,
    cost: bool = True,
    **options: Any,
) -> Comparison:
    """Reports of one spec at several groups (the delay of its edges), side by side.

    Args:
        model_or_config: a stock model or config, as for :func:`depthpass.report`.
        spec: with a pass that has a field ``group``.
        groups: different numbers of tokens.
        seq_len, batch, cost, options: as for :func:`depthpass.report`.

    Raises:
        SpecError: no pass has a group, or a group is out of range.
    """
    return tables.sweep(Subject.of(model_or_config), spec, groups, seq_len=seq_len, batch=batch, cost=cost, **options)


def _name(spec: SpecLike | None) -> str:
    return "stock" if spec is None else " + ".join(p.label for p in load_spec(cast(SpecLike, spec)))
