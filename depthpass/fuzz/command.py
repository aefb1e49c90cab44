"""``python -m depthpass.fuzz --cases 10000 --seed 0 --jobs 2``: run many cases, count, shrink what fails."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns 1 when a fault was found, 2 when the cases cannot be written."""
    options = _parser().parse_args(arguments)
    try:
        return _run(options)
    except OSError as error:
        print(f"depthpass.fuzz: error: {options.out}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("depthpass.fuzz: interrupted" + (f"; the same command goes on from {options.out}" if options.out else ""),
              file=sys.stderr)
        return 130


def _run(options: argparse.Namespace) -> int:
    done = _done(options.out, options.seed)
    todo = [i for i in range(options.first, options.first + options.cases) if i not in done]
    counts, kinds = Counter(r["result"] for r in done.values()), Counter(r["kind"] for r in done.values() if "kind" in r)
    if done:
        print(f"{len(done)} cases of seed {options.seed} are in {options.out} already; {len(todo)} to run.")
    faults: list[dict[str, Any]] = []
    with _out(options.out) as out:
        for number, result in _bar(_results(todo, options), len(todo), counts):
            counts[result["result"]] += 1
            kinds.update([result["kind"]] if "kind" in result else [])
            print(json.dumps({"seed": options.seed, "number": number, **result}), file=out, flush=True)
            if result["result"] == "fault":
                faults.append({"number": number, **result})
    _summary(counts, kinds)
    for result in faults[: options.shrink]:
        _show(result, options)
    return 1 if counts["fault"] else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m depthpass.fuzz", description="Random models and programs against an oracle.")
    parser.add_argument("--cases", type=_positive, default=1000, help="how many (default 1000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case (default 0)")
    parser.add_argument("--jobs", type=_positive, default=1, help="processes (default 1)")
    parser.add_argument("--out", type=Path, help="JSON lines, one per case; cases that are in the file are not run again")
    parser.add_argument("--shrink", type=int, default=3, help="faults to make smaller and print as scripts (default 3)")
    parser.add_argument("--models", nargs="+", type=_architecture, metavar="NAME", help="architectures (default: all 33)")
    parser.add_argument("--compiled", type=float, default=0.004, help="share of cases that compile with inductor (default 0.004)")
    return parser


def _positive(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
    return int(text)


def _architecture(text: str) -> str:
    from depthpass.errors import did_you_mean
    from depthpass.fuzz.models import ARCHITECTURES

    if text not in ARCHITECTURES:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(ARCHITECTURES)}, got {text!r}."
                                         f"{did_you_mean(text, ARCHITECTURES)}")
    return text


def _done(out: Path | None, seed: int) -> dict[int, dict[str, Any]]:
    if out is None or not out.exists():
        return {}
    lines = (json.loads(line) for line in out.read_text(encoding="utf-8").splitlines() if line.endswith("}"))
    return {r["number"]: r for r in lines if r["seed"] == seed}


def _out(out: Path | None) -> Any:
    return open(os.devnull if out is None else out, "a", encoding="utf-8")


def _drawn(options: argparse.Namespace) -> dict[str, Any]:
    return {"seed": options.seed, "compiled": options.compiled} | ({"models": options.models} if options.models else {})


def _one(task: tuple[int, dict[str, Any]]) -> tuple[int, dict[str, Any]]:
    import torch

    from depthpass.fuzz import make_case, run_case

    torch.set_num_threads(1)  # tiny models run fastest on one, and jobs share the cores
    number, drawn = task
    case = make_case(number=number, **drawn)
    return number, run_case(case) | {"arch": case["arch"], "passes": [s["pass"] for s in case["spec"]]}


def _results(todo: list[int], options: argparse.Namespace) -> Iterator[tuple[int, dict[str, Any]]]:
    tasks = [(i, _drawn(options)) for i in todo]
    if options.jobs == 1:
        yield from map(_one, tasks)
        return
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        yield from pool.imap_unordered(_one, tasks, chunksize=4)


def _bar(results: Iterator, total: int, counts: Counter) -> Iterator:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("fuzz"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total)
        for result in results:
            yield result
            progress.update(task, advance=1, description=", ".join(f"{n} {k}" for k, n in sorted(counts.items())))


def _summary(counts: Counter, kinds: Counter) -> None:
    total = sum(counts.values())
    print(f"{total} cases: {counts['ok']} ok, {counts['refused']} refused, {counts['fault']} faults.")
    for kind, n in kinds.most_common(40):
        print(f"{n:6} {kind}")


def _show(result: dict[str, Any], options: argparse.Namespace) -> None:
    from depthpass.fuzz import make_case, run_case
    from depthpass.fuzz.shrink import script, shrink

    case = make_case(number=result["number"], **_drawn(options))
    small = shrink(case, result, run_case)
    again = run_case(small) if small != case else result
    print(f"\n# Case {result['number']} of seed {options.seed}, made smaller:\n{script(small, again)}")

