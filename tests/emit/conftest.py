"""Shared by the tests of emitted folders."""

import json

import pytest

import depthpass.hf.model

_ABOUT_FILES = ("_name_or_path", "architectures", "dtype", "transformers_version")


@pytest.fixture(scope="session")
def _kept():
    return {}


@pytest.fixture
def one_capture(_kept, monkeypatch):
    """Capture equal stock models only once; what runs on the captures stays each model's own."""
    real = depthpass.hf.model.capture

    def capture(model, tensors, static, *asked):
        settings = {k: v for k, v in model.config.to_dict().items() if k not in _ABOUT_FILES}
        key = (
            json.dumps(settings, sort_keys=True, default=str), type(model), model.training,
            tuple((n, p.shape, p.dtype) for n, p in model.named_parameters()),
            tuple((n, t.dtype, t.dim()) for n, t in sorted(tensors.items())), tuple(static),
        )
        if key not in _kept:
            _kept[key] = real(model, tensors, static, *asked)
        return _kept[key]

    monkeypatch.setattr(depthpass.hf.model, "capture", capture)


@pytest.fixture(autouse=True)
def _modules(tmp_path_factory, monkeypatch):
    """Code that loading copies goes to a folder of its own."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
