"""What options stand for: models, specs, tasks, ceilings, files."""

from __future__ import annotations

import argparse
import json
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from depthpass.cli.output import working
from depthpass.errors import InputError, SpecError, did_you_mean

if TYPE_CHECKING:
    from depthpass.analysis.roofline import Ceilings
    from depthpass.passes import Pass
    from depthpass.tasks.dags import TaskDAG

STDIN = "-"


def subject_of(args: argparse.Namespace) -> Any:
    config = given_config(args.config)
    with working(f"reading {args.config}"):
        from depthpass.report.subject import Subject

        return Subject.of_config(config, keep=not args.fresh) if isinstance(config, str) else Subject.of(config)


def given_config(text: str | None) -> Any:
    """A config's path or hub id as it is, or the fields that standard input holds for ``-``."""
    if text != STDIN:
        return text
    try:
        return json.loads(read_text(text, "config"))
    except json.JSONDecodeError as error:
        raise InputError(f"config on standard input is not JSON: {error}.") from None


def given_spec(text: str) -> str:
    """A spec's file, text or name as it is, or the text behind ``-`` or a pipe: ``--spec <(...)``."""
    return read_text(text, "spec") if text == STDIN or stat.S_ISFIFO(_mode(text)) else text


def _mode(path: str) -> int:
    try:
        return Path(path).stat().st_mode
    except (OSError, ValueError):
        return 0


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "seq_len": args.seq_len, "batch": args.batch, "chunk": getattr(args, "chunk", None), "cost": not args.no_cost,
        "ceilings": ceilings_of(args.ceilings),
    }


def passes_of(args: argparse.Namespace) -> list[Pass] | None:
    """The spec of --spec or --preset, with --group put in; None without either."""
    from depthpass.report.tables import with_group
    from depthpass.spec import load_spec

    group = args.group if isinstance(args.group, int) else None
    if args.spec is not None and args.preset is not None:
        raise SpecError("--preset: expected either --spec or --preset, got both.")
    if args.spec is None and args.preset is None:
        if group is not None:
            raise SpecError("--group: expected --spec or --preset beside it, got neither.")
        return None
    passes = list(load_spec(_preset(args.preset) if args.preset is not None else given_spec(args.spec or "")))
    if group is None:
        return passes
    changed = with_group(passes, group)
    if not any(hasattr(p, "group") for p in passes):
        raise SpecError(f"--group: no pass of the spec has a group, got {', '.join(p.name for p in passes)}.")
    return changed


def _preset(name: str) -> Pass:
    from depthpass.passes.turboconn import TurboConn
    from depthpass.passes.turboconn_layout import PRESETS

    if name not in PRESETS:
        raise SpecError(f"--preset: expected one of {', '.join(PRESETS)}, got {name!r}.{did_you_mean(name, PRESETS)}")
    return TurboConn(preset=name)  # type: ignore[arg-type]


def named_spec(text: str) -> Any:
    """A spec of ``compare``: stock, a preset, a file or YAML text."""
    from depthpass.passes.turboconn_layout import PRESETS
    from depthpass.spec import load_spec

    if text == "stock":
        return None
    try:
        return load_spec(_preset(text) if text in PRESETS else given_spec(text))
    except SpecError as error:
        if "Did you mean" in str(error) or not (near := did_you_mean(text, ("stock", *PRESETS))):
            raise
        raise SpecError(f"{error}{near}") from error


def program_text(args: argparse.Namespace) -> str | None:
    if args.program is None:
        return None
    if args.spec is not None or args.preset is not None:
        raise SpecError("--program: expected a spec or a program, got both.")
    return read_text(args.program, "program")


OF_THE_ROW = ("parity", "s3_word_problem", "s5_word_problem", "a5_word_problem", "arithmetic_formula", "binary_search")
"""Tasks whose DAG is a closed form of one size and grows no faster than it."""


def task_of(text: str | None, tokens: int) -> TaskDAG | None:
    """A task by name, sizes and form; without a size that of the row, or the longest of the task's small instances."""
    if text is None:
        return None
    from depthpass.tasks.command import task_dag
    from depthpass.tasks.registry import get

    if ":" not in text:
        text += f":{tokens if text in OF_THE_ROW else get(text).ranges['S'][1]}"
    return task_dag(text)


def ceilings_of(text: str | None) -> Ceilings | None:
    """A known device, a file written by ``calibrate``, or two numbers."""
    if text is None:
        return None
    from depthpass.analysis.roofline import Ceilings, assumed

    numbers = _numbers(text)
    if numbers is not None:
        return Ceilings("given", dtype_of("bfloat16"), *numbers, source="given on the command line", assumed=True)
    if not text.endswith(".json"):
        return assumed(text)
    try:
        data = json.loads(read_text(text, "ceilings"))
        return Ceilings(data["device"], dtype_of(data["dtype"]), data["FLOP rate"], data["weight rate"], data["source"],
                        assumed=False)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise InputError(f"ceilings file {text!r}: expected what 'depthpass calibrate --out' writes, got "
                         f"{type(error).__name__}: {error}.") from None


def _numbers(text: str) -> tuple[float, float] | None:
    try:
        flops, rate = (float(part) for part in text.split(","))
    except ValueError:
        return None
    return flops, rate


def dtype_of(name: str) -> Any:
    import torch

    known = ("bfloat16", "float16", "float32")
    if name not in known:
        raise InputError(f"dtype: expected one of {', '.join(known)}, got {name!r}.{did_you_mean(name, known)}")
    return getattr(torch, name)


def read_text(path: str, what: str) -> str:
    """What a file holds, or standard input for ``-``."""
    try:
        return sys.stdin.buffer.read().decode() if path == STDIN else Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        folder = Path(path).parent
        near = did_you_mean(Path(path).name, [p.name for p in folder.iterdir()] if folder.is_dir() else [])
        raise InputError(f"{what} file {path!r} cannot be read: {reason}.{near}") from None
