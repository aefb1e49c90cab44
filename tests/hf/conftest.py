"""Shared by the Hugging Face tests."""

import pytest

import depthpass.hf.model


@pytest.fixture
def captures(monkeypatch):
    """A list that grows by one entry per capture."""
    models = []
    real = depthpass.hf.model.capture

    def capture(model, tensors, static):
        models.append(tuple(tensors))
        return real(model, tensors, static)

    monkeypatch.setattr(depthpass.hf.model, "capture", capture)
    return models
