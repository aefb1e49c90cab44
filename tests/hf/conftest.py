"""Shared by the Hugging Face tests."""

import pytest

import depthpass.hf.model


@pytest.fixture(scope="module")
def one_capture():
    """Capture equal stock models only once; what runs on the captures stays each model's own."""
    kept = {}
    real = depthpass.hf.model.capture

    def capture(model, tensors, static):
        key = (
            model.config.to_json_string(), type(model), model.training, next(model.parameters()).dtype,
            tuple((n, t.dtype, t.dim()) for n, t in sorted(tensors.items())), tuple(static),
        )
        if key not in kept:
            kept[key] = real(model, tensors, static)
        return kept[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(depthpass.hf.model, "capture", capture)
        yield kept
