"""Everything that needs a GPU, in one run that cannot be wasted: stages in order of worth, each a process of its own.

    python benchmarks/gpu.py --out results [--budget 540] [--stages kernels,training] [--resume] [--rehearse]

| stage | what |
|---|---|
| environment | versions; two ceilings (copy, bf16 product) and what a chunk's products and launches cost |
| kernels | each Triton kernel against float64, forward and backward, all option combinations |
| sanitizer | one shape of each under compute-sanitizer |
| levels | each lowering level against the eager one, small models, float32 and bf16, replayed |
| attention | kernel, SDPA, FlexAttention, varlen: what ``auto`` takes, see attention_table.py |
| training | TurboConn step at the Llama-3.2-1B shape: stock, naive, every level, floor, peak memory |
| decode | a token at batch 1, 8, 64: stock, TurboConn, loop, PLT, MoR |
| fixed_point | one long row by sweeps |
| parity | 100 training steps at the 1B shape |
| profile | kernels of a training step and of decoded tokens by their time |

Stages compile and check side by side and measure one at a time. Each writes its JSON after every result, has a time limit of
its own and skips what an earlier one showed broken. ``--resume`` runs what has no finished JSON. ``--rehearse`` runs the same
code on tiny CPU tensors, kernels in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Plan:
    """A stage's processes: how many share its cases, and how long each may take, in seconds."""

    name: str
    module: str
    limit: int
    shards: int = 1
    letter: str = ""


PLANS = (
    Plan("environment", "gpu_ops", 60, letter="a"),
    Plan("levels", "gpu_checks", 260, shards=3, letter="c"),
    Plan("training", "gpu_times", 360, shards=5, letter="e"),
    Plan("kernels", "gpu_checks", 240, shards=8, letter="b"),
    Plan("attention", "gpu_ops", 330, letter="d"),
    Plan("decode", "gpu_times", 330, shards=5, letter="f"),
    Plan("fixed_point", "gpu_times", 200, letter="g"),
    Plan("sanitizer", "gpu_checks", 150, letter="b2"),
    Plan("parity", "gpu_times", 240, letter="h"),
    Plan("profile", "gpu_times", 240, letter="p"),
)
"""In the order they are started. What compiles longest starts early; the order of worth decides who is ended first."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu_results"), help="folder of the results")
    parser.add_argument("--budget", type=float, default=540, help="seconds for all stages together")
    parser.add_argument("--stages", help="comma-separated names or letters; all without")
    parser.add_argument("--resume", action="store_true", help="skip stages that have finished in this folder")
    parser.add_argument("--rehearse", action="store_true", help="tiny CPU tensors through the same code")
    parser.add_argument("--jobs", type=int, help="processes at a time; 16, and 1 in a rehearsal")
    parser.add_argument("--cache", type=Path, help="folder of compiled kernels to use and to keep; a new one without")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--shard", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        return run_stage(args)
    if not args.rehearse:
        import torch

        if not torch.cuda.is_available():
            print("benchmarks/gpu.py needs a CUDA device; torch.cuda.is_available() is False. Nothing was run. "
                  "--rehearse runs the same code on tiny CPU tensors.")
            return 1
    try:
        chosen = select(args.stages)
    except ValueError as error:
        parser.error(str(error))
    args.out.mkdir(parents=True, exist_ok=True)
    return run_all(args, chosen)


def select(names: str | None) -> list[tuple[Plan, int]]:
    """The stages and shards asked for (``training`` or ``training.1``), in the order they are started."""
    every = [(p, i) for p in PLANS for i in range(p.shards)]
    if names is None:
        return every
    wanted = set(filter(None, names.split(",")))
    of = {(p, i): {p.name, p.letter, f"{p.name}.{i}", f"{p.letter}.{i}"} for p, i in every}
    if unknown := sorted(wanted - set().union(*of.values())):
        raise ValueError(f"--stages: unknown {', '.join(unknown)}; expected some of {', '.join(p.name for p in PLANS)}.")
    return [each for each in every if of[each] & wanted]


@dataclass
class Process:
    """A running process of a stage."""

    plan: Plan
    shard: int
    handle: subprocess.Popen
    began: float

    @property
    def path(self) -> str:
        return f"{self.plan.name}.json" if self.plan.shards == 1 else f"{self.plan.name}.{self.shard}.json"


def run_all(args: argparse.Namespace, chosen: list[tuple[Plan, int]]) -> int:
    """Start stages as places come free; end those that outlive their limit or the budget. 0 = all done and nothing wrong."""
    began = time.monotonic()
    jobs = args.jobs or (1 if args.rehearse else 16)
    waiting = list(chosen)
    if args.resume:
        waiting = [(p, i) for p, i in waiting if status_of(args.out, p, i) != "done"]
    running: list[Process] = []
    with tempfile.TemporaryDirectory() as fresh:
        cache = str(args.cache or fresh)
        while waiting or running:
            left = args.budget - (time.monotonic() - began)
            # The first stage's ceilings are read by the others, and it measures alone.
            while waiting and left > 0 and len(running) < jobs and not any(r.plan.name == "environment" for r in running):
                running.append(start(args, *waiting.pop(0), cache))
            for process in list(running):
                over = time.monotonic() - process.began > limit_of(process.plan, args.rehearse) or left <= 0
                if process.handle.poll() is None and not over:
                    continue
                running.remove(process)
                finish(args.out, process)
            if left <= 0 and not running:
                break
            time.sleep(0.2)
    return report(args.out, list(dict.fromkeys(p for p, _ in chosen)), time.monotonic() - began)


def limit_of(plan: Plan, rehearse: bool) -> float:
    """Seconds until a process is ended: a rehearsal has a share of a few cores in the place of a machine of its own."""
    return plan.limit * (4 if rehearse else 1)


def start(args: argparse.Namespace, plan: Plan, shard: int, cache: str) -> Process:
    paths = [ROOT, ROOT / "lowering", ROOT / "kernels", ROOT / "benchmarks"]
    extra = {
        "PYTHONPATH": os.pathsep.join(map(str, paths)), "TORCHINDUCTOR_CACHE_DIR": str(Path(cache) / "inductor"),
        "TRITON_CACHE_DIR": str(Path(cache) / "triton"), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "2", "TORCHINDUCTOR_COMPILE_THREADS": "4",
    }
    if args.rehearse:
        # Threads would wait for each other where other work has the cores.
        extra |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--run", plan.name, "--shard", str(shard), "--out", str(args.out)]
    log = open(args.out / f"{plan.name}.{shard}.log", "w")  # noqa: SIM115
    handle = subprocess.Popen(
        [*command, *(["--rehearse"] if args.rehearse else [])], env=os.environ | extra, stdout=log, stderr=subprocess.STDOUT
    )
    log.close()
    return Process(plan, shard, handle, time.monotonic())


def finish(out: Path, process: Process) -> None:
    """End a process and say in its JSON how it ended."""
    code = process.handle.poll()
    if code is None:
        process.handle.kill()
        process.handle.wait()
    path = out / process.path
    record = json.loads(path.read_text()) if path.exists() else {"stage": process.plan.name, "results": []}
    if code != 0:
        record["status"] = f"ended after {time.monotonic() - process.began:.0f} s" if code is None else f"failed with {code}"
        log = out / f"{process.plan.name}.{process.shard}.log"
        record["log"] = log.read_text(errors="replace")[-2500:]
        path.write_text(json.dumps(record, indent=1))
    print(f"# {process.path}: {record['status']}, {time.monotonic() - process.began:.0f} s", flush=True)


def status_of(out: Path, plan: Plan, shard: int) -> str | None:
    path = out / (f"{plan.name}.json" if plan.shards == 1 else f"{plan.name}.{shard}.json")
    return json.loads(path.read_text())["status"] if path.exists() else None


def report(out: Path, chosen: list[Plan], seconds: float) -> int:
    """Print every result in a line, what failed last, and write them all into one file."""
    everything, bad = [], []
    for plan in chosen:
        for path in sorted(out.glob(f"{plan.name}*.json")):
            record = json.loads(path.read_text())
            everything.append(record)
            print(f"## {path.stem}: {record.get('status')}")
            if record.get("status") != "done":
                bad.append(f"{path.stem}: {record.get('status')}: {record.get('log', '')[-700:]}")
            for row in record["results"]:
                if row.get("error") or row.get("wrong"):
                    bad.append(f"{path.stem}: {row['label']}: {row.get('error') or row.get('wrong')}")
                elif "prepare" not in row["label"]:
                    print("  ", row["label"], {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()
                                               if k not in ("label", "at", "trace")})
        if not any(f["stage"] == plan.name for f in everything):
            bad.append(f"{plan.name}: not started within the budget")
    (out / "all.json").write_text(json.dumps(everything, indent=1))
    print(f"## {len(bad)} failures, {seconds:.0f} s")
    for line in bad:
        print("!!", line[:900])
    return 1 if bad else 0


def run_stage(args: argparse.Namespace) -> int:
    """This process is one of a stage's."""
    import importlib
    import warnings

    from stage import Device, Stage

    warnings.filterwarnings("ignore")
    plan = next(p for p in PLANS if p.name == args.run)
    stage = Stage(plan.name, args.out, Device("rehearsal" if args.rehearse else "cuda"), args.shard, plan.shards)
    stage.write("running")
    getattr(importlib.import_module(plan.module), plan.name)(stage)
    stage.write("done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
