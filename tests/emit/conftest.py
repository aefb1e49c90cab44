"""Shared by the tests of emitted folders."""

import pytest


@pytest.fixture(autouse=True)
def _modules(tmp_path_factory, monkeypatch):
    """Code that loading copies goes to a folder of its own."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
