"""Shared by the tests of experiments: their stock models are captured once per architecture."""

import pytest
from captured_once import captured_once


@pytest.fixture(scope="module", autouse=True)
def _captured_once():
    with captured_once():
        yield
