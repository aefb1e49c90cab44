"""Shared by the tests of programs on real models: stock models are captured once per architecture."""

from __future__ import annotations

import pytest

import depthpass.hf.model

_ABOUT_FILES = ("_name_or_path", "architectures", "dtype", "transformers_version")


@pytest.fixture(scope="session")
def kept():
    """Captures by architecture, for all modules of this folder."""
    return {}


@pytest.fixture(scope="module", autouse=True)
def one_capture(kept):
    """Capture equal stock models only once; what runs on the captures stays each model's own."""
    real = depthpass.hf.model.capture

    def capture(model, tensors, static, *asked):
        settings = {k: v for k, v in model.config.to_dict().items() if k not in _ABOUT_FILES}
        key = (
            repr(sorted(settings.items(), key=str)), type(model), model.training, next(model.parameters()).dtype,
            tuple((n, t.dtype, t.dim()) for n, t in sorted(tensors.items())), tuple(static),
            tuple(n for n, _ in model.named_parameters()),
        )
        if key not in kept:
            kept[key] = real(model, tensors, static, *asked)
        return kept[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(depthpass.hf.model, "capture", capture)
        yield
