"""Prefix memo: layer programs that begin with the same visits share the streams and the keys those visits made.

The programs of a search are lists of visits over one batch of rows. What a visit computes depends on the visits before it and
on nothing else, so a stored stream replaces every visit up to it, and stored keys and values fill the slots of a cache.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from depthpass.hf.modules.context import inner_model

if TYPE_CHECKING:
    from depthpass_lowering.state.slots import Grown
    from depthpass_lowering.visits.running import RunningVisit


@dataclass(frozen=True)
class Visited:
    """What a visit left.

    Attributes:
        stream: ``[batch, tokens, width]``.
        extended: keys and values by attention call; None = no cache was asked for.
    """

    stream: Tensor
    extended: dict[int, Grown] | None

    @property
    def nbytes(self) -> int:
        kept = (self.extended or {}).values()
        return self.stream.nbytes + sum(k.nbytes + v.nbytes for k, v, _ in kept)


class PrefixMemo:
    """Streams and keys by rows and prefix of a layer program, the least recently used given up first.

    Args:
        limit: bytes that are kept; 0 = nothing is shared.

    Attributes:
        asked: block calls that the programs consist of.
        ran: those that were made.
    """

    def __init__(self, limit: int):
        self.limit, self.held = limit, 0
        self.kept: OrderedDict[Hashable, Visited] = OrderedDict()
        self.asked = self.ran = 0

    @contextmanager
    def running(
        self, model: Any, rows: Hashable, layers: tuple[int, ...], keep: bool, shared: int | None = None
    ) -> Iterator[None]:
        """The one call of ``model`` in this block runs ``layers`` over ``rows``, all tokens at once.

        Args:
            rows: names the inputs of the call; equal names must mean equal inputs.
            keep: whether the call fills a cache.
            shared: how many of the first visits depend on the visits before them alone; None = all.
        """
        token = _running.set(Prefix(self, inner_model(model), (rows, keep), layers, keep, shared))
        try:
            yield
        finally:
            _running.reset(token)

    def get(self, key: Hashable) -> Visited | None:
        visited = self.kept.get(key)
        if visited is not None:
            self.kept.move_to_end(key)
        return visited

    def put(self, key: Hashable, visited: Visited) -> None:
        if visited.nbytes > self.limit or key in self.kept:
            return
        self.kept[key] = visited
        self.held += visited.nbytes
        while self.held > self.limit:
            self.held -= self.kept.popitem(last=False)[1].nbytes

    def forget(self) -> None:
        """Give up all that is kept; the counts stay."""
        self.kept.clear()
        self.held = 0


class Prefix:
    """One call: which of its visits are known."""

    def __init__(
        self, memo: PrefixMemo, model: nn.Module, rows: Hashable, layers: tuple[int, ...], keep: bool, shared: int | None = None
    ):
        self.shared = len(layers) if shared is None else shared
        self.memo, self.model, self.rows, self.layers, self.keep = memo, model, rows, layers, keep
        self.place = 0
        # Without a cache only the last stream matters: all visits before the longest known prefix's end are passed over.
        known = () if keep else (n for n in range(self.shared, 0, -1) if self._key(n) in memo.kept)
        self.passed = next(iter(known), 0)

    def _key(self, length: int) -> Hashable:
        return self.rows, tuple(self.layers[:length])

    def visit(self, visit: RunningVisit, hidden: Tensor, run: Callable[[], Tensor]) -> Tensor:
        """The stream after the next visit, and its keys in ``visit``."""
        if self.place >= len(self.layers) or visit.index != self.layers[self.place]:
            raise AssertionError(f"visit {self.place} is of block {visit.index}, not as in {list(self.layers)}")
        self.place, memo = self.place + 1, self.memo
        memo.asked += 1
        if self.place > self.shared:
            memo.ran += 1
            return run()
        if self.place < self.passed:
            return hidden
        visited = memo.get(self._key(self.place))
        if visited is None:
            memo.ran += 1
            stream = run()
            memo.put(self._key(self.place), Visited(stream, dict(visit.extended) if self.keep else None))
            return stream
        if self.keep:
            visit.extended = dict(visited.extended or {})
        return visited.stream


_running: ContextVar[Prefix | None] = ContextVar("depthpass_prefix", default=None)


def running(model: Any) -> Prefix | None:
    """The prefix that the current call of ``model`` shares, or None."""
    prefix = _running.get()
    return prefix if prefix is not None and prefix.model is model else None
