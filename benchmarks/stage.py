"""One stage of the GPU run: its device, its lock, and its results, written to disk after every one of them.

Stages run side by side while they compile and check, and one at a time while they measure: both hold one file lock, shared or
exclusive, case by case, and take turns. A stage that is killed keeps what it has recorded and lets go of the lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Device:
    """Where a stage runs: a CUDA device, or the rehearsal's stand-in, CPU tensors of tiny shapes through the same code."""

    name: str

    @property
    def real(self) -> bool:
        return self.name == "cuda"

    @property
    def torch(self) -> str:
        return "cuda" if self.real else "cpu"

    def pick(self, real, rehearsed):
        """A size: the real one, or the rehearsal's."""
        return real if self.real else rehearsed

    def sync(self) -> None:
        if self.real:
            torch.cuda.synchronize()

    def words(self) -> str:
        """The device in words, with the versions that matter."""
        from importlib.metadata import version

        name = torch.cuda.get_device_name() if self.real else "CPU (rehearsal)"
        return f"{name}, torch {torch.__version__}, transformers {version('transformers')}"

    def free(self) -> None:
        """Give memory back that nobody holds."""
        import gc

        gc.collect()
        if self.real:
            torch.cuda.empty_cache()

    def times(self, run: Callable[[], object], repeat: int) -> list[float]:
        """Seconds of each of ``repeat`` runs, after none of warm-up."""
        times = []
        for _ in range(repeat):
            self.sync()
            start = time.perf_counter()
            run()
            self.sync()
            times.append(time.perf_counter() - start)
        return times

    def peak(self, run: Callable[[], object]) -> float | None:
        """GiB allocated at the peak of a run beyond what was allocated before; None in a rehearsal."""
        if not self.real:
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**30


class Stage:
    """The running stage.

    Attributes:
        out: folder of results and of the lock.
        shard, shards: which part of the stage's cases this process runs.
    """

    def __init__(self, name: str, out: Path, device: Device, shard: int = 0, shards: int = 1):
        self.name, self.out, self.device, self.shard, self.shards = name, out, device, shard, shards
        self.rows: list[dict] = []
        self.began = time.perf_counter()
        self.path = out / (f"{name}.json" if shards == 1 else f"{name}.{shard}.json")

    def record(self, label: str, **values) -> None:
        """Keep a result, on disk at once."""
        self.rows.append({"label": label, "at": round(time.perf_counter() - self.began, 1), **values})
        shown = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items() if k != "trace")
        print(f"[{self.name}] {label}: {shown}", flush=True)
        self.write("running")

    def write(self, status: str) -> None:
        text = json.dumps({
            "stage": self.name, "shard": self.shard, "shards": self.shards, "status": status, "device": self.device.words(),
            "seconds": round(time.perf_counter() - self.began, 1), "results": self.rows,
        }, indent=1)
        part = self.path.with_suffix(".part")
        part.write_text(text)
        part.replace(self.path)

    @contextlib.contextmanager
    def attempt(self, label: str) -> Iterator[None]:
        """A case whose failure is a result; the next one goes on. A device that no longer answers ends the stage."""
        try:
            yield
        except Exception as error:
            self.record(label, error=f"{type(error).__name__}: {str(error)[:600]}", trace=traceback.format_exc()[-3000:])
            # Kernels that have read where they must not take the whole process with them.
            self.device.sync()
            error.__traceback__ = None
        self.device.free()

    @contextlib.contextmanager
    def _locked(self, how: int) -> Iterator[None]:
        with open(self.out / "lock", "a") as file:
            # Whoever waits holds the turn, so that a measurement waits for the cases under way and for no later ones.
            with open(self.out / "turn", "a") as turn:
                fcntl.flock(turn, fcntl.LOCK_EX)
                fcntl.flock(file, how)
            try:
                yield
            finally:
                fcntl.flock(file, fcntl.LOCK_UN)

    def beside_others(self) -> contextlib.AbstractContextManager:
        """Compiling and checking: as many stages at once as there are."""
        return self._locked(fcntl.LOCK_SH)

    def alone(self) -> contextlib.AbstractContextManager:
        """Measuring: begins when the cases that others compile or check are done; none of theirs begins before it ends."""
        return self._locked(fcntl.LOCK_EX)

    def mine(self, cases: list) -> list:
        """This shard's cases."""
        return cases[self.shard :: self.shards]

    def broken(self, stage: str) -> list[str]:
        """Labels of what another stage's processes have shown to be broken so far."""
        labels = []
        for path in self.out.glob(f"{stage}*.json"):
            labels += [r["label"] for r in json.loads(path.read_text())["results"] if r.get("error") or r.get("wrong")]
        return labels


def summary(times: list[float]) -> dict[str, float]:
    """Median, least and most, in milliseconds."""
    return {"ms": 1e3 * statistics.median(times), "least": 1e3 * min(times), "most": 1e3 * max(times)}


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """Norm of the error by the norm of the right value; infinite for what is not finite."""
    got, want = got.detach().double().flatten(), want.detach().double().flatten()
    error = ((got - want).norm() / want.norm().clamp_min(1e-30)).item()
    return error if error == error else float("inf")
