"""A plain transformers model that computes what a transformed one does, on its weights: for what reads stock layers only."""

from __future__ import annotations

import hashlib
import linecache
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from depthpass.emit.folder import config_of, load_module, weights_of, written_of
from depthpass.errors import DepthpassError, InputError


def twin(model: Any, who: str) -> nn.Module:
    """The emitted model of the program in force, in memory, sharing every weight.

    Args:
        model: a transformed model, not inside a wrapper.
        who: what asks, for the message.

    Raises:
        InputError: layers of the program need more of earlier tokens than each its own keys, or it cannot be emitted.
    """
    try:
        stock, config, written = written_of(model, "depth_twin", False)
    except DepthpassError as error:
        raise InputError(f"{who}: it runs stock layers on pages of keys and values, and this program cannot be written as such "
                         f"layers. Use generate with a left-padded batch. ({error})") from error
    if written.stateful:
        raise InputError(f"{who}: it keeps keys and values in pages and nothing else of earlier tokens, and this program has "
                         "delays or reads keys of other visits, which stand in a DepthCache that has no pages. Use generate "
                         "with a left-padded batch.")
    name = f"depthpass_twin_{hashlib.sha256(written.text.encode()).hexdigest()[:16]}"
    loaded = sys.modules.get(name)
    if loaded is None:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"{name}.py"
            file.write_text(written.text)
            loaded = load_module(file, name)
            # transformers reads a class's source before it lets a model's attention be set, as pages of keys need it set.
            linecache.cache[str(file)] = (len(written.text), None, written.text.splitlines(keepends=True), str(file))
    made_config = config_of(loaded, written, config, stock, "depth_twin")
    made_config._attn_implementation = stock.config._attn_implementation
    with torch.device("meta"):
        emitted = getattr(loaded, written.outer)(made_config)
    emitted.load_state_dict(weights_of(stock, model, model.depth_program, False), strict=False, assign=True)
    emitted.tie_weights()
    _share_buffers(emitted, stock, model)
    emitted.generation_config = stock.generation_config
    return emitted.train(model.training)


def _share_buffers(emitted: nn.Module, stock: nn.Module, model: Any) -> None:
    """Buffers that no file holds: rotary tables and the like."""
    layers = model._depth.layers + "."
    for key, buffer in list(emitted.named_buffers()):
        if buffer.is_meta:
            theirs = key
            if key.startswith(layers):
                place, _, rest = key[len(layers) :].partition(".")
                theirs = f"{layers}{model.depth_program.visits[int(place)]['index']}.{rest}"
            parent, _, leaf = key.rpartition(".")
            emitted.get_submodule(parent)._buffers[leaf] = stock.get_buffer(theirs)
