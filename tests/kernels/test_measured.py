"""The table that ``auto`` reads."""

import json

import pytest
from depthpass_kernels import measured


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Two devices, two sizes, made up: the kernel wins for few queries on one and never on the other."""
    def row(capability, queries, keys, naive, triton, what="forward"):
        return {"op": "slot_attention", "what": what, "capability": capability, "batch": 8, "queries": queries, "keys": keys,
                "microseconds": {"naive": naive, "triton": triton, "sdpa": 1.0}}

    path = tmp_path / "measured.json"
    path.write_text(json.dumps({"rows": [
        row([9, 0], 4, 160, 40, 5), row([9, 0], 512, 512, 40, 50), row([8, 0], 4, 160, 10, 11),
        row([9, 0], 4, 160, 3, 5, "forward and backward"),
    ]}))
    monkeypatch.setattr(measured, "TABLE", path)
    clear()
    yield
    monkeypatch.undo()
    clear()


def clear():
    measured.rows.cache_clear()
    measured.fastest.cache_clear()


def test_the_nearest_case_on_the_nearest_device_decides(table):
    assert measured.fastest("slot_attention", "forward", (9, 0), 8, 8, 200) == "triton"
    assert measured.fastest("slot_attention", "forward", (9, 0), 8, 400, 400) == "naive"
    assert measured.fastest("slot_attention", "forward", (8, 6), 8, 4, 160) == "naive"
    assert measured.fastest("slot_attention", "forward", (10, 0), 8, 4, 160) == "triton"
    assert measured.fastest("slot_attention", "forward and backward", (9, 0), 8, 4, 160) == "naive"


def test_an_op_that_nobody_measured_takes_its_kernel(table):
    assert measured.fastest("gated_attention", "forward", (9, 0), 8, 4, 160) == "triton"


def test_the_table_in_the_repository_comes_from_a_run():
    assert measured.rows(), "benchmarks/attention_table.py has written nothing"
    for row in measured.rows():
        assert {"device", "versions", "capability", "microseconds"} <= row.keys() and min(row["microseconds"].values()) > 0
