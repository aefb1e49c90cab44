"""Adapters that a model was transformed with: PEFT saves what it has added itself, so the new parameters go into its files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load, save_file
from torch import Tensor, nn

from depthpass.errors import InputError
from depthpass.hf.modules.context import inner_model

_NOTE = {"depthpass": "new parameters are in these files: load them around a transformed model"}
"""In the adapter's config: PEFT warns of a field it does not know, and so around a stock model, which takes the adapter alone."""


def new_state(model: nn.Module, state: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """The new parameters under their names in ``model``; none where PEFT has a copy for each adapter, which it saves."""
    inner = inner_model(model)
    if hasattr(inner.depth, "modules_to_save"):
        return {}
    prefix = next(n for n, m in model.named_modules() if m is inner.depth) + "."
    return {k: v for k, v in (model.state_dict() if state is None else state).items() if k.startswith(prefix)}


class AdapterSave:
    """``save_pretrained`` of a PEFT model around a transformed one; on the object, for the class stays PEFT's.

    Without it the bridges that were trained with an adapter were in no file, and a checkpoint took back the adapter alone.
    """

    def __init__(self, model: Any):
        self.model = model

    def __call__(self, save_directory, safe_serialization: bool = True, selected_adapters=None, *args, **kwargs):
        if not safe_serialization:
            raise InputError("safe_serialization: expected True, got False; adapters of a transformed model are saved as "
                             "safetensors only. Leave the argument out.")
        type(self.model).save_pretrained(self.model, save_directory, True, selected_adapters, *args, **kwargs)
        new = {k: v.detach().clone() for k, v in new_state(self.model, kwargs.get("state_dict")).items()}
        writes = args[1] if len(args) > 1 else kwargs.get("is_main_process", True)
        for name in (selected_adapters or self.model.peft_config) if writes and new else ():
            path = Path(save_directory, "" if name == "default" else name, "adapter_model.safetensors")
            save_file({**load(path.read_bytes()), **new}, path, metadata={"format": "pt"})
            config = path.with_name("adapter_config.json")
            config.write_text(json.dumps(json.loads(config.read_text()) | _NOTE, indent=2))
