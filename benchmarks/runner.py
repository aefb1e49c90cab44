"""Run one measurement: numbers first, then warm-up, then timings in pairs with the baseline."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from conditions import products_called
from declare import Answer, Measurement, Run, Variant
from gate import TOLERANCES, Gate, check
from memory import peak_memory
from results import Result, Row


@dataclass
class Options:
    """How to measure.

    Attributes:
        repeat: pairs of each variant.
        warmup: calls before the first pair.
        memory: also the peak memory of each row, in a process of its own.
        child: command that does one row in a process of its own, given ``part``, title, label and what is asked; None =
            this process does it (``--tiny``).
    """

    repeat: int = 5
    warmup: int = 1
    memory: bool = False
    device: str = "cpu"
    child: list[str] | None = None
    answers: dict[int, tuple[Callable[[], Answer], Answer]] = field(default_factory=dict)


def say(text: str) -> None:
    """Progress, beside the results."""
    print(f"# {text}", file=sys.stderr, flush=True)


def measure(m: Measurement, options: Options) -> Result:
    """All rows of one measurement. A row whose numbers are wrong or that raises says so and has no time."""
    say(m.title)
    options.answers.clear()
    labels = [m.baseline, *(n for n in m.variants if n != m.baseline)]
    rows = {label: Row(label) for label in labels}
    if m.quantity == "seconds":
        _seconds(m, rows, options)
    else:
        for row in rows.values():
            _value(m, row, options)
    if m.quantity != "seconds" and (base := rows[m.baseline].values):
        for row in rows.values():
            row.ratios = [v / base[0] for v in row.values] if base[0] else []
    return Result(m, list(rows.values()))


def _seconds(m: Measurement, rows: dict[str, Row], options: Options) -> None:
    runs: dict[str, Run] = {}
    for row in rows.values():
        with _reported(row):
            run = m.variants[row.label].make()
            row.gate = gate(m, row.label, run, options)
            if row.gate is None or row.gate.passed:
                runs[row.label] = run
                for _ in range(options.warmup):
                    run()
                row.products = products_called(run) if options.device == "cpu" else {}
                row.note, row.floor = _note(run), _floor(m.variants[row.label])
            else:
                row.failed = f"its {row.gate.where} is off by {row.gate}, at most {row.gate.tolerance:.0e} is allowed"
        say(f"  {row.label}: {row.failed or f'numbers off by {row.gate}' if row.gate or row.failed else 'built'}")
    base = runs.pop(m.baseline, None)
    if base is None:
        for label in runs:
            rows[label].failed = f"the baseline {m.baseline} could not be timed"
        return
    pairs(m, base, runs, rows, options)
    if options.memory:
        for label in (m.baseline, *runs):
            with _reported(rows[label]):
                rows[label].peak_mib = _peak(m, label, base if label == m.baseline else runs[label], options)


def pairs(m: Measurement, base: Run, runs: dict[str, Run], rows: dict[str, Row], options: Options) -> None:
    """Time every variant beside a call of the baseline, first one then the other, turn by turn: drift hits both alike."""
    def timed(label: str, run: Run) -> float:
        _sync(options.device)
        start = time.perf_counter()
        run()
        _sync(options.device)
        seconds = (time.perf_counter() - start) / m.per
        rows[label].values.append(seconds)
        return seconds

    for turn in range(options.repeat):
        for label, run in runs.items():
            if turn % 2:
                mine = timed(label, run)
                rows[label].ratios.append(mine / timed(m.baseline, base))
            else:
                stock = timed(m.baseline, base)
                rows[label].ratios.append(timed(label, run) / stock)
        if not runs:
            timed(m.baseline, base)
        say(f"  turn {turn + 1} of {options.repeat}")
    rows[m.baseline].ratios = [1.0]


def gate(m: Measurement, label: str, run: Run, options: Options) -> Gate | None:
    """A variant's numbers against its oracle's; None where others are held against it."""
    variant: Variant = m.variants[label]
    if variant.oracle is None:
        return None
    # Kept with the function, whose id would otherwise be given to another one.
    kept = options.answers.get(id(variant.oracle))
    if kept is None:
        kept = options.answers[id(variant.oracle)] = variant.oracle, variant.oracle()
    tolerance = TOLERANCES[m.dtype] if variant.tolerance is None else variant.tolerance
    return check(run.answer(), kept[1], tolerance)


def _value(m: Measurement, row: Row, options: Options) -> None:
    with _reported(row):
        if m.isolated and options.child is not None:
            record = _child(m, row.label, "value", options)
        else:
            record = value(m, row.label, options)
        row.note, row.failed = record["note"], record["failed"]
        row.gate = None if record["gate"] is None else Gate(**record["gate"])
        row.values = [] if row.failed else [record["value"]]
    say(f"  {row.label}: {row.failed or row.values[0]}")


def value(m: Measurement, label: str, options: Options) -> dict:
    """What one call of a row returns, then the check of its numbers: the call may be the first one, with all that costs."""
    run = m.variants[label].make()
    measured = float(run())
    checked = gate(m, label, run, options)
    failed = "" if checked is None or checked.passed else (
        f"its {checked.where} is off by {checked}, at most {checked.tolerance:.0e} is allowed"
    )
    return {"value": measured, "note": _note(run), "gate": None if checked is None else vars(checked), "failed": failed}


def _peak(m: Measurement, label: str, run: Run, options: Options) -> float:
    if options.child is None:
        return peak_memory(run)
    return _child(m, label, "peak", options)["value"]


def answer_child(m: Measurement, label: str, asked: str, options: Options) -> None:
    """In the process of a row: print what was asked for as the last line."""
    if asked == "peak":
        record = {"value": peak_memory(m.variants[label].make())}
    else:
        record = value(m, label, options)
    print(json.dumps(record), flush=True)


def _child(m: Measurement, label: str, asked: str, options: Options) -> dict:
    import os

    command = [*options.child, json.dumps([m.part, m.title, label, asked])]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | m.environment)
    if done.returncode:
        raise RuntimeError(f"its process ended with {done.returncode}: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout.splitlines()[-1])


class _reported:
    """An error of a row is that row's result; the others go on."""

    def __init__(self, row: Row):
        self.row = row

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, trace) -> bool:
        if not isinstance(error, Exception):
            return False
        traceback.print_exception(error)
        self.row.failed = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        return True


def _floor(variant: Variant) -> float | None:
    return variant.floor() if callable(variant.floor) else variant.floor


def _note(run: Run) -> str:
    return run.note() if hasattr(run, "note") else ""


def _sync(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
