"""``from_pretrained``: load a transformed model that was saved."""

from __future__ import annotations

import os
from typing import Any

from transformers import PreTrainedModel

from depthpass.errors import InputError
from depthpass.hf.checkpoints.loading import check_safetensors, settings_of, stock_class
from depthpass.hf.checkpoints.save import spec_of
from depthpass.hf.model import DepthModel, depth_class


def from_pretrained(path: str | os.PathLike[str] | None, *, model_class: type | None = None, **kwargs: Any) -> DepthModel:
    """Load a transformed model that ``save_pretrained`` has written.

    Args:
        path: folder or hub id; None with ``config=`` and ``state_dict=``.
        model_class: the stock class to load, in place of the one that was saved: a class of your own that is not
            imported under the name it had, or another head.
        kwargs: what the stock ``from_pretrained`` takes: ``dtype``, ``device_map``, ``revision``,
            ``attn_implementation``, ``output_loading_info``, ...

    Returns:
        the model (with ``output_loading_info=True``: and a dict), in eval mode, of the class that was saved.

    Raises:
        SpecError: not a depthpass checkpoint, or its weights under ``depth.`` are not those of its spec.
        CheckpointError: the files are damaged.
        InputError: ``use_safetensors=False`` was asked for.
    """
    check_safetensors(kwargs)
    settings = settings_of(path, kwargs)
    spec_of(settings, str(path))
    if model_class is None:
        model_class = stock_class(settings, str(path))
    elif not (isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)):
        raise InputError(f"model_class: expected a class of transformers models, got {model_class!r}.")
    return depth_class(getattr(model_class, "_stock_class", model_class))._load(path, (), kwargs, settings)
