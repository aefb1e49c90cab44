"""One small model for all tests of the search."""

from types import SimpleNamespace

import layer_search
import pytest

import depthpass as dp


@pytest.fixture(scope="session")
def small():
    """A stock model, the same one transformed, and samples."""
    stock = layer_search.build()
    return SimpleNamespace(stock=stock, live=dp.transform(stock, dp.Identity()), samples=layer_search.answered(stock, 12))
