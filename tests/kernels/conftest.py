"""Kernel tests: shared cases on the path, and child processes for Triton.

Triton's interpreter and its compiler cannot share a process (the interpreter patches `triton.language` for
good), and the interpreter must be chosen before the first import. So each runs in a child, which prints one
JSON object per line.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent
KERNELS = HERE.parents[1] / "kernels"
sys.path.append(str(HERE))  # for kernel_cases; importlib mode adds no test folder

Child = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="session")
def child() -> Child:
    """Run a script of this folder in a fresh interpreter and return the JSON lines it prints."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed: it is the optional extra depthpass[triton]")

    def run(script: str, *arguments: str, **environment: str) -> list[dict[str, Any]]:
        env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH")}
        env |= {"PYTHONPATH": os.pathsep.join([str(KERNELS), str(HERE)]), "OMP_NUM_THREADS": "1"}
        env |= {"TRITON_DEFAULT_FP_FUSION": "1", **environment}
        command = [sys.executable, str(HERE / script), *arguments]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{script} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]

    return run


@pytest.fixture
def nan_memory() -> Iterator[None]:
    """Fill uninitialised tensors with NaN, so that an element nobody writes shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
