"""The Triton kernels: numbers from the interpreter (or a GPU), code from the compiler, each in a child."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

Child = Callable[..., list[dict[str, Any]]]
TOLERANCE = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 1e-2}  # the interpreter truncates to bfloat16
SHARED = {80: 166_912, 90: 232_448, 100: 232_448}
CHECKS = {"float32": 55, "half": 22}  # how many each precision reports
MATRIX = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}


@pytest.mark.parametrize("precision, checks", CHECKS.items())
def test_interpreter_equals_reference(child: Child, precision: str, checks: int) -> None:
    compare(child("run_numerics.py", precision, "cpu", TRITON_INTERPRET="1"), checks)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision, checks", CHECKS.items())
def test_gpu_equals_reference(child: Child, precision: str, checks: int) -> None:
    compare(child("run_numerics.py", precision, "cuda"), checks)


def compare(records: list[dict[str, Any]], checks: int) -> None:
    if "skip" in records[0]:
        pytest.skip(records[0]["skip"])
    assert len(records) == checks
    bad = [r for r in records if not all(e <= TOLERANCE[r["dtype"]] for e in r["errors"].values())]
    assert not bad


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_compiles_ahead_of_time(child: Child, arch: int, tmp_path: Path) -> None:
    records = child("run_aot.py", str(arch), TRITON_CACHE_DIR=str(tmp_path))
    assert {r["kernel"] for r in records} >= {
        "forward_kernel",
        "dq_kernel",
        "dkv_kernel",
        "up_kernel",
        "norm_kernel",
        "gated_forward_kernel",
        "gated_dq_kernel",
        "gated_dkv_kernel",
        "copy_kernel",
    }
    for record in records:
        assert record["cubin"] > 0 and record["shared"] <= SHARED[arch], record
        # Spills show as STACK; LOCAL stays 0 even when hundreds of bytes spill. ptxas parks up to four
        # registers to reach the next occupancy step, which is no spill to worry about.
        assert record["local"] == 0 and record["stack"] <= 16, record
        kernel = record["kernel"].removeprefix("gated_")
        if kernel in ("forward_kernel", "dq_kernel", "dkv_kernel", "up_kernel"):
            small = record["rows"] < 64 and kernel != "dkv_kernel"
            assert ("mma.sync" if small else MATRIX[arch]) in record["matrix"], record
            assert record["copies"] > 0, record  # operands are prefetched while the last block is multiplied
