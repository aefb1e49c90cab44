"""Search methods by their names."""

from __future__ import annotations

from depthpass.errors import InputError, did_you_mean
from depthpass.limits import shown
from depthpass.search.mcts import MCTS
from depthpass.search.methods import Beam, Exhaustive, Method, RandomSearch, Sweep


def load_method(method: str | Method) -> Method:
    """A method by its name, or with its options as an object.

    Raises:
        InputError: no such method.
    """
    if isinstance(method, Method):
        return method
    known = methods()
    if not isinstance(method, str) or method not in known:
        raise InputError(f"method: expected one of {', '.join(known)}, got {shown(method)}.{did_you_mean(str(method), known)}")
    return known[method]()


def methods() -> dict[str, type[Method]]:
    return {m.name: m for m in (MCTS, Beam, RandomSearch, Sweep, Exhaustive)}
