"""Saved models and transformers' Auto classes: what tells a transformed model from its base, on disk and in memory.

A folder that held the base's ``model_type`` would be loaded as the base, in silence, by every tool that goes through the
Auto classes. So ``config.json`` names a model type of its own. With depthpass imported the Auto classes know it and give the
transformed model; without, they stop with an error that quotes it, and it says what to do. Stock classes stop as well.

In memory a transformed model's config is of a class of its own, under the stock class's name and with its ``model_type``
(which PEFT, Trainer and others look up): Auto classes then map it to the transformed class.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.abc import Loader, MetaPathFinder
from typing import Any

from depthpass.errors import SpecError
from depthpass.limits import VISITS, shown

MARK = "depthpass (import depthpass as dp; dp.from_pretrained)"
"""The ``model_type`` of saved models. Transformers quotes it where nobody has imported depthpass."""

GUARD = "tie_word_embeddings"
"""A field that every config checks: with :data:`REFUSAL` in its place no stock config can be made of a saved one, and so no
stock model by naming its class (PEFT's ``auto_mapping`` does so)."""

REFUSAL = "this model is transformed: load it with dp.from_pretrained, or save it with save_pretrained(..., stock=True)"

PREFIX = "Depthpass"
"""Before the architecture's name on disk, so that no tool takes it for the stock class of that name."""

_DEPTHS = ("num_hidden_layers", "n_layer", "num_layers")
"""Fields that count blocks: configs and models make one after the other."""

_MODULE = "transformers.models.auto.configuration_auto"

_as_stock: ContextVar[bool] = ContextVar("depthpass_as_stock", default=False)


@contextmanager
def as_stock() -> Iterator[None]:
    """Configs written inside look like the base's own, so that stock code loads the base."""
    token = _as_stock.set(True)
    try:
        yield
    finally:
        _as_stock.reset(token)


def marked(settings: dict[str, Any]) -> dict[str, Any]:
    """The fields of a transformed model's config as they are written to ``config.json``."""
    held = settings.get("depthpass")
    if not isinstance(held, dict) or _as_stock.get():
        return settings
    # Custom code (auto_map) of the base would be loaded in place of the transformed model.
    stock = {k: settings[k] for k in ("model_type", GUARD, "auto_map") if k in settings}
    found = {k: v for k, v in settings.items() if k != "auto_map"} | {GUARD: REFUSAL}
    names = [PREFIX + n.removeprefix(PREFIX) for n in settings.get("architectures") or ()]
    return found | {"model_type": MARK, "architectures": names or None, "depthpass": {**held, "stock": stock}}


def unmarked(settings: dict[str, Any], where: str = "config") -> dict[str, Any]:
    """The fields that :func:`marked` has written, with the base's model type again; others as they are.

    Raises:
        SpecError: it does not say what the base is.
    """
    for name in _DEPTHS:
        if isinstance(count := settings.get(name), int) and count > VISITS:
            raise SpecError(f"{where}: config.{name}: expected at most {VISITS} blocks, got {shown(count)}.")
    if settings.get("model_type") != MARK:
        return settings
    held = settings.get("depthpass")
    stock = held.get("stock") if isinstance(held, dict) else None
    if not isinstance(stock, dict) or not isinstance(stock.get("model_type"), str):
        raise SpecError(f"{where}: config.depthpass: expected the base model's type under stock.model_type, got {stock!r}. The "
                        "config was changed by hand; save the model again.")
    held = {k: v for k, v in held.items() if k != "stock"}
    return {k: v for k, v in settings.items() if k != GUARD} | stock | {"depthpass": held}


class _NoCode(dict):
    """The ``auto_map`` of a config that names no code of its own; the first entry makes it one that does."""

    def __init__(self, config: Any):
        super().__init__()
        self._config = config

    def __setitem__(self, key, value):
        self._config.auto_map = {**self, key: value}


class _AutoMap:
    """``config.auto_map`` where there is none: libraries read it of every architecture that transformers does not name."""

    def __get__(self, config, owner=None):
        return self if config is None else _NoCode(config)


class Marked:
    """Mixin of the configs of transformed models; see :func:`marked_class`."""

    _stock_config: type
    auto_map = _AutoMap()

    def to_json_file(self, json_file_path, use_diff: bool = True) -> None:
        settings = marked(json.loads(self.to_json_string(use_diff=use_diff)))
        with open(json_file_path, "w", encoding="utf-8") as file:
            file.write(json.dumps(settings, indent=2, sort_keys=True) + "\n")

    @classmethod
    def get_config_dict(cls, *args, **kwargs):
        settings, rest = super().get_config_dict(*args, **kwargs)
        return unmarked(settings), rest

    def __reduce_ex__(self, protocol):
        return _bare, (type(self)._stock_config,), self.__dict__.copy()


def _bare(stock: type) -> Any:
    cls = marked_class(stock)
    return cls.__new__(cls)


@functools.cache
def marked_class(stock: type) -> type:
    """The config class of transformed models whose stock config is of class ``stock``."""
    if issubclass(stock, Marked):
        return stock

    # Both would be made anew for a subclass, from its fields alone.
    def __init__(self, *args, **kwargs):
        stock.__init__(self, *args, **kwargs)

    def __eq__(self, other):
        return hasattr(other, "to_dict") and self.to_dict() == other.to_dict()

    return type(stock.__name__, (Marked, stock), {
        "__init__": __init__, "__eq__": __eq__, "__hash__": None, "__module__": stock.__module__,
        "__qualname__": stock.__qualname__, "__doc__": stock.__doc__, "_stock_config": stock,
    })


@functools.cache
def known_class(stock: type) -> type:
    """The same, once the Auto classes know it."""
    made = marked_class(stock)
    _register_models(made._stock_config, made)
    return made


def mark(config: Any) -> None:
    """Make a config one of a transformed model."""
    config.__class__ = known_class(type(config))


def unmark(config: Any) -> None:
    """Make a transformed model's config a stock one again."""
    config.__class__ = getattr(type(config), "_stock_config", type(config))


def _register_models(stock: type, made: type) -> None:
    """Let every Auto class that has a model for a stock config have the transformed one for its marked class."""
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.auto_factory import _LazyAutoMapping

    from depthpass.hf.model import depth_class

    for mapping in vars(modeling_auto).values():
        if not isinstance(mapping, _LazyAutoMapping) or stock not in mapping:
            continue
        try:
            found = mapping[stock]
        except (ImportError, AttributeError, KeyError):  # a head with requirements that are not installed
            continue
        classes = found if isinstance(found, tuple | list) else (found,)
        depth = tuple(depth_class(c) for c in classes if hasattr(c, "forward"))
        if depth:
            # Not `register`: before 5.24 it leaves out classes that say they are transformers' own.
            mapping._extra_content[made] = depth if isinstance(found, tuple | list) else depth[0]


class SavedConfig:
    """What ``AutoConfig`` finds under :data:`MARK`: reads the base's config and marks it."""

    model_type = MARK

    @classmethod
    def from_dict(cls, settings: dict[str, Any], **kwargs: Any) -> Any:
        from transformers import CONFIG_MAPPING

        settings = unmarked(settings)
        kind = settings["model_type"]
        if kind not in CONFIG_MAPPING:
            raise SpecError(f"config.depthpass.stock.model_type: expected a model type that transformers knows, got {kind!r}. "
                            "Import or register the base's own code first, or update transformers.")
        _name_classes(settings.get("architectures") or ())
        return known_class(CONFIG_MAPPING[kind]).from_dict(settings, **kwargs)


def _name_classes(architectures: Iterable[str]) -> None:
    """Put transformed classes where tools look for the architecture of a config they have read: ``transformers serve`` does."""
    import transformers

    from depthpass.hf.model import depth_class

    for name in architectures:
        stock = getattr(transformers, name.removeprefix(PREFIX), None)
        if name.startswith(PREFIX) and isinstance(stock, type) and not hasattr(transformers, name):
            setattr(transformers, name, depth_class(stock))


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
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        _register(module)


def announce() -> None:
    """Make saved models known to the Auto classes of this process, now or when they are imported."""
    if (module := sys.modules.get(_MODULE)) is not None and hasattr(module, "CONFIG_MAPPING"):
        _register(module)
    elif not any(isinstance(f, _AfterImport) for f in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())
