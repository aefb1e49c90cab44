"""Symbols of cost formulas, and how many query-key pairs an attention call works on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, cast

import sympy as sp

B = sp.Symbol("B", integer=True, positive=True)
"""Rows of the batch."""
n = sp.Symbol("n", integer=True, positive=True)
"""Tokens of a row."""
g = sp.Symbol("g", integer=True, positive=True)
"""Tokens of one chunk of the serial region (the group)."""

KEPT = 1024
"""Formulas of blocks that are remembered: blocks of one kind have the same, and sympy is slow to make each anew."""

Convention = Literal["visible", "dense"]
CONVENTIONS: dict[str, str] = {
    "visible": "attention counts the query-key pairs that the causal mask, the window and the chunk let through",
    "dense": "attention counts queries times keys, masked pairs included, as torch.utils.flop_counter does",
}


@dataclass(frozen=True)
class AttentionSite:
    """One attention call of a block, as far as cost goes.

    Attributes:
        heads, kv_heads: query heads and key-value heads.
        key_dim, value_dim: width of a key and of a value per head.
        window: a query sees its own and the ``window - 1`` keys before it; None = all.
        chunk: a query sees the keys of its own chunk of so many tokens; None = all.
        ahead: how far it sees later keys, see :attr:`depthpass.ir.program.Program.ahead`; None = not at all.
    """

    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None = None
    chunk: int | None = None
    ahead: int | None = None

    @property
    def flops_per_pair(self) -> int:
        """Two matmuls, a multiply and an add each: 2*H*(Dk + Dv) per query-key pair of positions."""
        return 2 * self.heads * (self.key_dim + self.value_dim)

    @property
    def kv_width(self) -> int:
        """Elements a token adds to a KV slot."""
        return self.kv_heads * (self.key_dim + self.value_dim)

    def slot_tokens(self, tokens: sp.Expr) -> sp.Expr:
        """Tokens a KV slot must hold after ``tokens`` tokens: all, or what a later query can still see."""
        bounds = [b for b in (self.window, self.chunk) if b is not None]
        return _least(tokens, *bounds) if bounds else tokens

    def pairs(self, queries: sp.Expr, keys: sp.Expr, convention: Convention) -> sp.Expr:
        """Query-key pairs of one row.

        ``queries`` and ``keys`` are counts over the same row. With fewer queries than keys (routed tokens that read
        everybody's keys) the queries are taken to lie uniformly over the row, so that each sees the average number.
        """
        if queries == 0 or keys == 0:
            return sp.Integer(0)
        if convention == "dense":
            return queries * keys
        return _visible_pairs(self, queries, keys)

    def _triangle(self, tokens: sp.Expr) -> sp.Expr:
        """Visible pairs when every one of ``tokens`` tokens queries."""
        if self.chunk is not None:
            full, rest = sp.floor(tokens / self.chunk), sp.Mod(tokens, self.chunk)
            return full * sp.Rational(self.chunk * (self.chunk + 1), 2) + rest * (rest + 1) / 2
        reach = tokens if self.window is None else _least(tokens, self.window)
        return reach * (reach + 1) / 2 + (tokens - reach) * reach

    def _later(self, tokens: sp.Expr) -> sp.Expr:
        """Visible pairs of a query with a later key, when every one of ``tokens`` tokens queries."""
        if self.ahead is None:
            return sp.Integer(0)
        if not self.ahead:
            return self._triangle(tokens) - tokens  # as many as earlier ones
        size = self.ahead if self.chunk is None else min(self.ahead, self.chunk)

        def within(count: sp.Expr) -> sp.Expr:
            reach = count if self.window is None else sp.Min(count, self.window)
            return (reach - 1) * count - reach * (reach - 1) / 2

        return sp.floor(tokens / size) * within(sp.Integer(size)) + within(sp.Mod(tokens, size))

    def decode_pairs(self, keys: sp.Expr) -> sp.Expr:
        """Keys that one new query at the end of ``keys`` tokens (itself included) reads."""
        if self.chunk is not None:
            return sp.Mod(keys - 1, self.chunk) + 1
        return keys if self.window is None else _least(keys, self.window)


@lru_cache(KEPT)
def _visible_pairs(site: AttentionSite, queries: sp.Expr, keys: sp.Expr) -> sp.Expr:
    return sp.expand(queries * (site._triangle(keys) + site._later(keys)) / keys)


@lru_cache(KEPT)
def _least(*tokens: sp.Expr | int) -> sp.Expr:
    return sp.Min(*tokens)


@lru_cache(KEPT)
def at_tokens(expr: sp.Expr, tokens: sp.Expr) -> sp.Expr:
    """An expression in n, for another number of tokens."""
    return cast(sp.Expr, expr.xreplace({n: tokens}))


@lru_cache(KEPT)
def per_token(expr: sp.Expr) -> sp.Expr:
    """What one token of one row takes of an expression that grows with both."""
    return sp.cancel(expr / (B * n))


def expression(value: Any, names: Mapping[sp.Expr, sp.Expr]) -> sp.Expr:
    """A tensor size as a sympy expression, with the trace's symbols renamed."""
    if isinstance(value, sp.Expr):
        return cast(sp.Expr, value.xreplace(dict(names)))
    node = getattr(value, "node", None)
    return sp.Integer(int(value)) if node is None else node.expr.xreplace(dict(names))
