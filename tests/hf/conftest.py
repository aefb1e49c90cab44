"""Shared by the Hugging Face tests."""

import json

import pytest

import depthpass.hf.model

_ABOUT_FILES = ("_name_or_path", "architectures", "dtype", "transformers_version")


def _signature(model, tensors, static):
    settings = {k: v for k, v in model.config.to_dict().items() if k not in _ABOUT_FILES}
    return (
        json.dumps(settings, sort_keys=True, default=str), tuple((n, _kind(m)) for n, m in model.named_modules()),
        tuple((n, p.shape, p.dtype) for n, p in model.named_parameters()),
        tuple((n, t.dtype, t.dim()) for n, t in sorted(tensors.items())), tuple(static),
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


@pytest.fixture(scope="session")
def _kept():
    return {}


@pytest.fixture
def one_capture(_kept, monkeypatch):
    """Capture equal stock models only once in a test run; what runs on the captures stays each model's own.

    A capture is a pure function of what the key holds, and takes most of the time of these tests.
    """
    real = depthpass.hf.model.capture

    def capture(model, tensors, static, *asked):
        key = _signature(model, tensors, static)
        if key not in _kept:
            _kept[key] = real(model, tensors, static, *asked)
        return _kept[key]

    monkeypatch.setattr(depthpass.hf.model, "capture", capture)


@pytest.fixture
def captures(monkeypatch):
    """A list that grows by one entry per capture."""
    made = []
    real = depthpass.hf.model.capture

    def capture(model, tensors, static, *asked):
        made.append(tuple(tensors))
        return real(model, tensors, static, *asked)

    monkeypatch.setattr(depthpass.hf.model, "capture", capture)
    return made
