"""The published effects, at the settings of ``--quick``: the direction, by margins that noise does not cross."""

import pytest

from examples import run
from examples.harness.experiment import value


def quick(name, path):
    summary = run.run(name, seeds=1, overlay="quick", out=path)
    assert all(path.joinpath(f"{name}-quick").with_suffix(s).stat().st_size for s in (".json", ".jsonl", ".md", ".png"))
    return {arm: runs[0] for arm, runs in summary.runs.items()}


@pytest.mark.slow
def test_a_bridge_every_second_token_carries_parity_as_far_as_the_row_goes(tmp_path):
    result = quick("parity", tmp_path)
    turbo, stock = result["TurboConn g=2"], result["stock, window 2"]
    assert turbo["length"] == 12 and value(turbo, "at.48.accuracy") > 0.95  # four times the trained length
    assert value(stock, "at.48.accuracy") < 0.65
    assert stock["costs"]["depth"] == 4 < turbo["costs"]["depth"]


@pytest.mark.slow
def test_a_block_that_is_looped_hops_further(tmp_path):
    result = quick("p_hop", tmp_path)
    looped, once = result["1 block x 4"], result["1 block (equal parameters)"]
    assert looped["costs"]["parameters"] == once["costs"]["parameters"]
    assert value(looped, "at.32.accuracy") > 0.8 and value(once, "at.32.accuracy") < 0.75
