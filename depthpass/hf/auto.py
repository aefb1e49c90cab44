"""Transformers' Auto classes know saved models: they read the base's config, mark it and give the transformed model.

What a mark is says :mod:`depthpass.hf.checkpoints.marks`.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Iterable
from importlib.abc import Loader, MetaPathFinder
from typing import Any

from depthpass.errors import SpecError
from depthpass.hf.checkpoints.marks import MARK, PREFIX, known_class, unmarked

_MODULE = "transformers.models.auto.configuration_auto"


class SavedConfig:
    """What ``AutoConfig`` finds under :data:`MARK`: reads the base's config and marks it."""

    model_type = MARK

    @classmethod
    def from_dict(cls, settings: dict[str, Any], **kwargs: Any) -> Any:
        from transformers import CONFIG_MAPPING

        from depthpass.hf.model import depth_class

        settings = unmarked(settings)
        kind = settings["model_type"]
        if kind not in CONFIG_MAPPING:
            raise SpecError(f"config.depthpass.stock.model_type: expected a model type that transformers knows, got {kind!r}. "
                            "Import or register the base's own code first, or update transformers.")
        _name_classes(settings.get("architectures") or ())
        return known_class(CONFIG_MAPPING[kind], depth_class).from_dict(settings, **kwargs)


def _name_classes(architectures: Iterable[str]) -> None:
    """Put transformed classes where tools look for the architecture of a config they have read: ``transformers serve`` does.

    It asks the module that it has imported, of which there may be two: transformers reads itself again for its processors.
    """
    import transformers

    from depthpass.hf.model import depth_class

    held: list[Any] = [vars(m).get("transformers") for m in list(sys.modules.values()) if isinstance(m, types.ModuleType)]
    modules = [m for m in (transformers, *held) if isinstance(m, types.ModuleType) and m.__name__ == "transformers"]
    for name in architectures:
        stock = getattr(transformers, name.removeprefix(PREFIX), None)
        if name.startswith(PREFIX) and isinstance(stock, type):
            for module in modules:
                setattr(module, name, depth_class(stock))


def _register(module: Any) -> None:
    module.CONFIG_MAPPING.register(MARK, SavedConfig, exist_ok=True)


class _AfterImport(MetaPathFinder, Loader):
    """Registers as soon as transformers' Auto configs are imported; importing depthpass alone imports no transformers."""

    def find_spec(self, name, path=None, target=None):
        if name != _MODULE or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _register(module)


def announce() -> None:
    """Make saved models known to the Auto classes of this process, now or when they are imported."""
    if (module := sys.modules.get(_MODULE)) is not None and hasattr(module, "CONFIG_MAPPING"):
        _register(module)
    elif not any(isinstance(f, _AfterImport) for f in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())
