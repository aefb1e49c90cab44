"""What is made once for a graph, a template or a region, and lives as long as that does."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Hashable, MutableMapping
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

Owner = TypeVar("Owner")
Made = TypeVar("Made")
P = ParamSpec("P")


class Once(Generic[Owner, P, Made]):
    """A function of an owner, held weakly, and of further hashable arguments, called once for each.

    Attributes:
        kept: what was made, by owner and further arguments.
    """

    def __init__(self, make: Callable[Concatenate[Owner, P], Made]):
        functools.update_wrapper(self, make)
        self.make = make
        self.kept: MutableMapping[Owner, dict[Hashable, Made]] = weakref.WeakKeyDictionary[Any, Any]()

    def __call__(self, owner: Owner, *args: P.args, **kwargs: P.kwargs) -> Made:
        held = self.kept.setdefault(owner, {})
        if args not in held:
            held[args] = self.make(owner, *args, **kwargs)
        return held[args]
