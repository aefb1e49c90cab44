"""What decides a result on a CPU besides the code: load, threads, allocator, product library and its rates."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO
from unittest import mock

import torch
import torch.nn.functional as F
from declare import Product

QUIET = 0.5
"""Load average per core above which a machine is not quiet."""
CACHES = 1 << 26
"""Bytes of weights that no cache holds: rates are those of weights that come from memory."""


@dataclass(frozen=True)
class Rate:
    """GFLOP/s of one product with weights from memory.

    Attributes:
        packed: the same from packed weights; None = they cannot be packed, or are too small.
        chosen: whether the lowering packs this weight in a token loop that uses it so often.
    """

    product: Product
    plain: float
    packed: float | None
    chosen: bool

    def __str__(self) -> str:
        p = self.product
        packed = "not packed" if self.packed is None else f"packed {self.packed:.0f}"
        return (f"{p.rows} rows by [{p.outputs}, {p.inputs}], {p.uses} uses: plain {self.plain:.0f} GFLOP/s, {packed}; "
                f"packed products {'chosen' if self.chosen else 'not chosen'} in a token loop")


@dataclass(frozen=True)
class Conditions:
    """The machine as a run found it, without its name."""

    machine: str
    threads: int
    cores: int
    load: float | None
    allocator: str
    library: str
    warmup: int
    rates: tuple[Rate, ...] = ()

    @property
    def warning(self) -> str:
        """Why timings of this run mean little; empty on a quiet machine."""
        if self.load is None or self.load <= QUIET * self.cores:
            return ""
        return (f"WARNING: the machine is not quiet: load average {self.load:.2f} on {self.cores} cores at the start. "
                f"Timings need at most {QUIET} per core; do not publish these.")

    def lines(self) -> list[str]:
        load = "unknown" if self.load is None else f"{self.load:.2f}"
        return [
            self.machine,
            f"{self.threads} threads on {self.cores} cores, load average at the start {load}, "
            f"allocator {self.allocator}, {self.warmup} warm-up calls",
            f"product library: {self.library}",
            *map(str, self.rates),
            *([self.warning] if self.warning else []),
        ]

    def to_json(self) -> dict:
        return asdict(self) | {"warning": self.warning}


def observe(device: str, dtype: torch.dtype, products: list[Product], warmup: int, seconds: float = 0.1) -> Conditions:
    """Look at the machine. Load is read first: what follows adds to it."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    if device == "cuda":
        name, library, rates = torch.cuda.get_device_name(), f"cuBLAS of CUDA {torch.version.cuda}", ()
    else:
        name, library = f"CPU {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}", multiplies(dtype)
        rates = tuple(rate(p, dtype, seconds) for p in products)
    versions = f"torch {torch.__version__}, transformers {_version('transformers')}"
    return Conditions(f"{name}, {versions}, {str(dtype).removeprefix('torch.')}", torch.get_num_threads(), _cores(), load,
                      _allocator(), library, warmup, rates)


def multiplies(dtype: torch.dtype) -> str:
    """The library that a plain product of this dtype runs in, as it says itself when it is asked to be verbose."""
    x, w = torch.ones(32, 256, dtype=dtype), torch.ones(512, 256, dtype=dtype)
    said = _heard(lambda: F.linear(x, w))
    if kernel := re.search(r"exec,cpu,\w+,([^,]+)", said):
        return f"oneDNN (mkldnn), {kernel[1]}"
    if "MKL_VERBOSE" in said:
        version = re.search(r"Math Kernel Library Version ([\d.]+)", torch.__config__.show())
        return f"MKL {version[1] if version else ''}".strip()
    blas = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
    return f"{blas[1] if blas else 'unknown'} (torch's build settings; it does not say so itself)"


def _heard(run: Callable[[], object]) -> str:
    """What C code writes to standard output while a call runs with verbose libraries."""
    with _taken(1) as file:
        with torch.backends.mkldnn.verbose(1), torch.backends.mkl.verbose(1):
            run()
        ctypes.CDLL(None).fflush(None)
        file.seek(0)
        return file.read().decode(errors="replace")


@contextmanager
def _taken(stream: int) -> Iterator[BinaryIO]:
    """What goes to standard output (1) or error (2), from C code too, goes to a file for the time of a ``with``."""
    sys.stdout.flush(), sys.stderr.flush()
    ctypes.CDLL(None).fflush(None)
    with tempfile.TemporaryFile() as file:
        kept = os.dup(stream)
        os.dup2(file.fileno(), stream)
        try:
            yield file
        finally:
            os.dup2(kept, stream)
            os.close(kept)


def rate(product: Product, dtype: torch.dtype, seconds: float) -> Rate:
    """Rates of one product, plain and packed, over as many weights as no cache holds."""
    from depthpass_kernels.packed_linear import packed_product
    from depthpass_lowering.products.packed import Products, Weights

    p = product
    count = max(2, int(min(CACHES, CACHES * seconds * 10)) // (p.inputs * p.outputs * dtype.itemsize))
    weights = [torch.full((p.outputs, p.inputs), 0.5, dtype=dtype) for _ in range(count)]
    x = torch.ones(p.rows, p.inputs, dtype=dtype)
    with torch.no_grad():
        plain = _gflops([lambda w=w: F.linear(x, w) for w in weights], p, seconds)
        loop, packed = Products(uses=1 << 20), None
        if loop.packs(Weights((weights[0],), (None,)), x):
            weights_packed = [loop.packed(Weights((w,), (None,)), x) for w in weights]
            packed = _gflops([lambda m=m: packed_product(x, *m) for m in weights_packed], p, seconds)
        chosen = Products(uses=p.uses).packs(Weights((weights[0],), (None,)), x)
    return Rate(p, plain, packed, chosen)


def _gflops(calls: list[Callable[[], object]], p: Product, seconds: float) -> float:
    """Best rate of whole rounds over the calls within so many seconds."""
    best, end = float("inf"), time.perf_counter() + seconds
    for call in calls:
        call()
    while True:
        start = time.perf_counter()
        for call in calls:
            call()
        now = time.perf_counter()
        best = min(best, (now - start) / len(calls))
        if now > end:
            return 2 * p.rows * p.inputs * p.outputs / best / 1e9


def products_called(run: Callable[[], object]) -> dict[str, int]:
    """How many matrix products one call makes, by kind: in panels, else packed, through oneDNN, torch's own."""
    from depthpass_kernels import panels
    from torch.autograd.profiler import profile

    in_panels = mock.Mock(wraps=panels.panel_product)  # no op, which a profiler could count
    # The profiler writes a line to standard error at every start and end.
    with _taken(2), profile(use_kineto=False) as seen, mock.patch.object(panels, "panel_product", in_panels):
        run()
    counts = {e.key: e.count for e in seen.key_averages()}
    own, pointwise = counts.get("depthpass_kernels::packed_linear", 0), counts.get("mkldnn::_linear_pointwise", 0)
    packed = max(0, own - in_panels.call_count)
    calls = {
        "panels": in_panels.call_count, "packed": packed, "oneDNN": pointwise - packed,
        "plain": sum(counts.get(f"aten::{n}", 0) for n in ("mm", "addmm")),
    }
    return {k: n for k, n in calls.items() if n > 0}


def _allocator() -> str:
    """Who answers malloc."""
    maps = Path("/proc/self/maps")
    loaded = maps.read_text() if maps.exists() else ""
    allocator = next((n for n in ("jemalloc", "tcmalloc", "mimalloc") if n in loaded), None)
    name = allocator or " ".join(platform.libc_ver()).strip() or "the system's"
    tuned = [f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith("MALLOC_") or k == "GLIBC_TUNABLES"]
    return " ".join([name, *tuned])


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _version(name: str) -> str:
    from importlib.metadata import version

    return version(name)
