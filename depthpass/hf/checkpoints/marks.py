"""What tells a transformed model from its base, on disk and in memory: the marks on its config.

A folder that held the base's ``model_type`` would be loaded as the base, in silence, by every tool that goes through the
Auto classes. So ``config.json`` names a model type of its own. With depthpass imported the Auto classes know it and give the
transformed model; without, they stop with an error that quotes it, and it says what to do. Stock classes stop as well.

In memory a transformed model's config is of a class of its own, under the stock class's name and with its ``model_type``
(which PEFT, Trainer and others look up): Auto classes then map it to the transformed class.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from depthpass.errors import SpecError
from depthpass.limits import VISITS, shown

if TYPE_CHECKING:
    from transformers import PreTrainedConfig as _Config
else:
    _Config = object

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
    written = {k: v for k, v in settings.items() if k != "auto_map"} | {GUARD: REFUSAL}
    names = [PREFIX + n.removeprefix(PREFIX) for n in settings.get("architectures") or ()]
    return written | {"model_type": MARK, "architectures": names or None, "depthpass": {**held, "stock": stock}}


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
    kept = {k: v for k, v in settings["depthpass"].items() if k != "stock"}
    return {k: v for k, v in settings.items() if k != GUARD} | stock | {"depthpass": kept}


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


class Marked(_Config):
    """Mixin of the configs of transformed models; see :func:`marked_class`."""

    _stock_config: type
    auto_map: Any = _AutoMap()

    def to_json_file(self, json_file_path: Any, use_diff: bool = True) -> None:
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
def marked_class(stock: Any) -> Any:
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
def known_class(stock: type, depth_class: Callable[[type], type]) -> Any:
    """The same, once the Auto classes know it and the models that ``depth_class`` makes for it."""
    config_class = marked_class(stock)
    _register_models(config_class._stock_config, config_class, depth_class)
    return config_class


def mark(config: Any, depth_class: Callable[[type], type]) -> None:
    """Make a config one of a transformed model."""
    config.__class__ = known_class(type(config), depth_class)


def unmark(config: Any) -> None:
    """Make a transformed model's config a stock one again."""
    config.__class__ = getattr(type(config), "_stock_config", type(config))


def _register_models(stock: type, config_class: type, depth_class: Callable[[type], type]) -> None:
    """Let every Auto class that has a model for a stock config have the transformed one for its marked class."""
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.auto_factory import _LazyAutoMapping

    for mapping in vars(modeling_auto).values():
        if not isinstance(mapping, _LazyAutoMapping) or stock not in mapping:
            continue
        try:
            models = mapping[stock]
        except (ImportError, AttributeError, KeyError):  # a head with requirements that are not installed
            continue
        classes: Any = models if isinstance(models, tuple | list) else (models,)
        depth = tuple(depth_class(c) for c in classes if hasattr(c, "forward"))
        if depth:
            # Not `register`: before 5.24 it leaves out classes that say they are transformers' own.
            mapping._extra_content[config_class] = depth if isinstance(models, tuple | list) else depth[0]
