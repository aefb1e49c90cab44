"""Equal stock models are captured once in a test run; what runs on the captures stays each model's own.

A capture is a pure function of what :func:`signature` holds, and takes most of the time of many tests.
"""

import json
from contextlib import contextmanager

import pytest

import depthpass.capture
import depthpass.hf.model

_NOT_CAPTURED = ("_name_or_path", "architectures", "dtype", "transformers_version", "depthpass")
"""What a config says of files and of the program: the decoder does not read it."""
_KEPT: dict = {}


def signature(model, tensors, static):
    """All that the capture of a tiny model depends on: its config, modules, tensors, and the arguments."""
    settings = {k: v for k, v in model.config.to_dict().items() if k not in _NOT_CAPTURED}
    rows = max((t.shape[0] for t in tensors.values() if t.dim()), default=1)
    return (
        json.dumps(settings, sort_keys=True, default=str), tuple((n, _kind(m)) for n, m in model.named_modules()),
        tuple((n, type(p), p.shape, p.dtype, p.device) for n, p in (*model.named_parameters(), *model.named_buffers())),
        tuple((n, t.dtype, t.dim(), t.dim() > 0 and t.shape[0] == rows) for n, t in tensors.items()), repr(static),
    )


def _kind(module):
    adapter = _adapter_state(module) if hasattr(module, "merged_adapters") else None
    return type(module), module.training, module.__dict__.get("p"), adapter


def _adapter_state(module):
    """The switches of a PEFT layer that a trace bakes in."""
    scaling = getattr(module, "scaling", None)
    return (
        module.disable_adapters, tuple(module.active_adapters), tuple(module.merged_adapters),
        tuple(scaling.items()) if isinstance(scaling, dict) else None,
    )


@contextmanager
def captured_once():
    """Equal stock models that are called while this is open share their captures."""
    real = depthpass.hf.model.capture

    def capture(model, tensors, static):
        key = signature(model, tensors, static)
        if key not in _KEPT:
            _KEPT[key] = real(model, tensors, static)
        return _KEPT[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(depthpass.hf.model, "capture", capture)
        patch.setattr(depthpass.capture, "capture", capture)  # where costs are counted
        yield
