"""C++ of this package, built by the compiler that Inductor uses, for the vector instructions that it has found."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


@functools.cache
def build(arguments: tuple[str, ...], source: str) -> Callable[..., None] | Exception:
    """The function ``kernel`` of a source, which takes tensors for pointers, or why it cannot be had (no compiler, say)."""
    try:
        from torch._inductor.codecache import CppPythonBindingsCodeCache

        built: Any = CppPythonBindingsCodeCache.load_pybinding(list(arguments), source)
        return built
    except Exception as error:  # whatever a compiler, a loader or a newer torch says
        return error
