"""``report``, ``show``, ``compare``, ``sweep``: from a config alone."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from depthpass.cli.inputs import named_spec, options_of, passes_of, program_text, subject_of, task_of
from depthpass.cli.output import check_outputs, working, write_text
from depthpass.cli.output import show as show_result
from depthpass.errors import InputError, SpecError
from depthpass.spec import SUFFIXES

if TYPE_CHECKING:
    from depthpass.ir import Program


def report(args: argparse.Namespace) -> int:
    check_outputs(args.html)
    passes, program = passes_of(args), program_text(args)
    if args.config is None and program is None:
        raise InputError("report: expected the path of a config.json, or --program FILE, got neither.")
    options = options_of(args) | {"task": task_of(args.task, args.seq_len)}
    subject = subject_of(args)
    with working("capturing and counting" if options["cost"] else "analysing"):
        result = subject.report(passes, program=program, **options)
    if args.html:
        write_text(args.html, result.to_html())
    show_result(result, "text" if args.full and args.form is None else args.form)
    return 0


def show(args: argparse.Namespace) -> int:
    from depthpass.ir import plain
    from depthpass.plan import compile_spec

    passes, subject = passes_of(args), subject_of(args)
    ctx = subject.context
    stock = plain(ctx.model, ctx.blocks, ctx.width)
    shown: list[tuple[str, Program]] = [("stock", stock)]
    if passes is not None:
        compile_spec(passes, ctx, on_pass=lambda p, _, after: shown.append((p.label, after)))
    if args.lowered is not None:
        print(_lowered(shown[-1][1], args.lowered, args.form))
    elif args.form == "json":
        print(json.dumps([{"after": label, "program": str(p)} for label, p in shown], indent=2))
    else:
        print("\n\n".join(f"# {label if label == 'stock' else 'after ' + label}\n{p}" for label, p in shown))
    return 0


def _lowered(program: Program, call: str, form: str | None) -> str:
    """What a call of a program runs, as text or JSON."""
    from depthpass.lowered import lower
    from depthpass.schedule import schedule

    plan = schedule(program)
    text = str(lower(plan, call, step=plan.step(1) if call == "token" else None))
    return json.dumps({"call": call, "lowered": text}, indent=2) if form == "json" else text


def compare(args: argparse.Namespace) -> int:
    from depthpass.passes.turboconn_layout import PRESETS
    from depthpass.report.tables import compare

    specs = [(name, named_spec(name)) for name in args.specs]
    names = [name if spec is None or name in PRESETS else _column(name, spec) for name, spec in specs]
    if len(set(names)) < len(names):
        names = list(args.specs)
    pairs = [(name, spec) for name, (_, spec) in zip(names, specs)]
    check_outputs(args.html)
    subject = subject_of(args)
    with working("comparing"):
        table = compare(subject, pairs, **options_of(args))
    shown = table.diff() if args.diff else table
    if args.html:
        write_text(args.html, shown.to_html())
    show_result(shown, args.form)
    return 0


def _column(name: str, spec: Any) -> str:
    """A file's name, or what the spec says."""
    return Path(name).stem if name.lower().endswith(SUFFIXES) else ", ".join(p.describe() for p in spec)


def sweep(args: argparse.Namespace) -> int:
    from depthpass.report.tables import sweep

    check_outputs(args.plot)
    passes = passes_of(args)
    if passes is None:
        raise SpecError("sweep: expected --spec or --preset, got neither.")
    subject = subject_of(args)
    with working("sweeping"):
        table = sweep(subject, passes, args.group, **options_of(args))
    if args.plot:
        write_text(args.plot, table.to_svg())
    show_result(table, args.form)
    return 0
