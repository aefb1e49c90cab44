"""A transformed model as a folder of plain transformers code, config and weights, which needs no depthpass.

``depthpass.emit(...)`` is both this package and the function that writes.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import types
from pathlib import Path
from typing import Any

from depthpass.emit.folder import emit

__all__ = ["emit"]


class _CallablePackage(types.ModuleType):
    """Lets ``depthpass.emit(...)`` work although importing this package puts it under that very name."""

    def __call__(self, *args: Any, **kwargs: Any) -> Path:
        return emit(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return importlib.import_module, (__name__,)


sys.modules[__name__].__class__ = _CallablePackage
__signature__ = inspect.signature(emit)
__doc__ = f"{__doc__}\nemit{__signature__}\n\n{inspect.getdoc(emit)}"  # help(dp.emit) says what it takes
