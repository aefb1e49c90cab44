"""What tables and other places held at one time, compared with what they hold now: cheap enough for every call."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from operator import eq
from typing import Any


class Snapshot:
    """Tables (dictionaries, lists, sets) that are compared in C, and values that have to be looked up.

    Attributes:
        empty: tables that were empty. They stay so, more often than not: one look at all of them costs less than a comparison
            of each.
    """

    def __init__(self) -> None:
        self.owners: list[object] = []
        self.tables: list[Any] = []
        self.copies: list[Any] = []
        self.empty: list[object] = []
        self.lookups: list[tuple[object, Callable[[], Any]]] = []
        self.values: list[Any] = []

    def table(self, owner: object, table: Any) -> None:
        """Keep what a table of an object holds."""
        self.owners.append(owner)
        self.tables.append(table)
        self.copies.append(_copied(table))

    def look(self, owner: object, lookup: Callable[[], Any]) -> None:
        """Keep what a lookup gives: parts of an object by name, or anything that can be compared."""
        self.lookups.append((owner, lookup))
        self.values.append(lookup())

    def same(self) -> bool:
        """Whether everything is as it was; may fail where tensors or arrays were replaced, whose equality is none."""
        return all(map(eq, self.tables, self.copies)) and not any(self.empty) and (
            [look() for _, look in self.lookups] == self.values)

    def renew(self) -> dict[tuple, object]:
        """Keep what is there now.

        Returns:
            the owners of what had changed, by their identity and the name of the part (None = as a whole).
        """
        changed: dict[tuple, object] = {}
        for at, (owner, table) in enumerate(zip(self.owners, self.tables)):
            if table != self.copies[at]:
                changed |= {(id(owner), name): owner for name in _changed(self.copies[at], table)}
                self.copies[at] = _copied(table)
        for at, (owner, look) in enumerate(self.lookups):
            if (now := look()) != self.values[at]:
                changed |= {(id(owner), name): owner for name in _changed(self.values[at], now)}
                self.values[at] = now
        return changed


def _changed(before: Any, now: Any) -> list[Any]:
    return [n for n in now if n not in before or now[n] is not before[n]] if isinstance(now, Mapping) else [None]


def _copied(table: Any) -> Any:
    """A plain copy of a container, past what a subclass makes of its entries."""
    return dict(dict.items(table)) if isinstance(table, dict) else dict(table) if isinstance(table, Mapping) else copy.copy(table)
