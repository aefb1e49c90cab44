"""Search over layer programs: which blocks to skip and to repeat, with the controls that a claim needs.

``depthpass.search(...)`` is both this package and the function that searches.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, ParamSpec

from depthpass.search.damped import DampedLoops
from depthpass.search.mcts import MCTS
from depthpass.search.methods import Beam, Exhaustive, Method, RandomSearch, Sweep
from depthpass.search.result import Control, Found, SearchResult
from depthpass.search.run import search as _search
from depthpass.search.space import PRESETS, Listed, Space

__all__ = [
    "Beam", "Control", "DampedLoops", "Exhaustive", "Found", "Listed", "MCTS", "Method", "PRESETS", "RandomSearch",
    "SearchResult", "Space", "Sweep", "search",
]


if TYPE_CHECKING:
    P = ParamSpec("P")

    class _Search(Generic[P]):
        """The function with the names of the package: a module that can be called, as type checkers and editors can know it."""

        def __init__(self, function: Callable[P, SearchResult]) -> None: ...
        def __call__(self, *args: P.args, **kwargs: P.kwargs) -> SearchResult: ...

        Beam = Beam
        Control = Control
        DampedLoops = DampedLoops
        Exhaustive = Exhaustive
        Found = Found
        Listed = Listed
        MCTS = MCTS
        Method = Method
        PRESETS = PRESETS
        RandomSearch = RandomSearch
        SearchResult = SearchResult
        Space = Space
        Sweep = Sweep

    search = _Search(_search)
else:
    search = _search


class _CallablePackage(types.ModuleType):
    """Lets ``depthpass.search(...)`` work although importing this package puts it under that very name."""

    def __call__(self, *args: Any, **kwargs: Any) -> SearchResult:
        return _search(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return importlib.import_module, (__name__,)


sys.modules[__name__].__class__ = _CallablePackage
__signature__ = inspect.signature(_search)
__doc__ = f"{__doc__}\nsearch{__signature__}\n\n{inspect.getdoc(_search)}"  # help(dp.search) says what it takes
