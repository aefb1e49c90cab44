"""``doctor``, ``calibrate``, ``demo``: this machine and installation."""

from __future__ import annotations

import argparse
import json

from depthpass.cli.inputs import dtype_of, given_config
from depthpass.cli.output import Bar, check_outputs, working, write_text
from depthpass.prompt import listing


def doctor(args: argparse.Namespace) -> int:
    from depthpass.doctor import examine

    findings = examine(given_config(args.config))
    if args.form == "json":
        print(json.dumps([{"topic": f.topic, "result": f.result, "ok": f.ok} for f in findings], indent=2))
    else:
        marks = {True: "ok", False: "NO", None: "  "}
        listing([(marks[f.ok], f.topic, f.result) for f in findings])
    return 1 if any(f.ok is False for f in findings) else 0


def calibrate(args: argparse.Namespace) -> int:
    from depthpass.analysis.roofline import ceilings

    check_outputs(args.out)
    with working("measuring"):
        measured = ceilings(args.device, dtype_of(args.dtype))
    data = json.dumps({name: value for name, value, _ in measured.rows()}, indent=2)
    if args.out:
        write_text(args.out, data + "\n")
    if args.form == "json":
        print(data)
    else:
        print("\n".join(f"{name:<12} {value if isinstance(value, str) else f'{value:.4g}'} {unit}".rstrip()
                        for name, value, unit in measured.rows()))
    return 0


def demo(args: argparse.Namespace) -> int:
    from depthpass.demo import run_demo

    lines: list[str] = []
    options = {"write": lines.append} if args.form == "json" else {}
    with Bar("training") as bar:
        code = run_demo(steps=args.steps, group=args.group, on_step=bar, **options)
    if args.form == "json":
        print(json.dumps({"ok": code == 0, "lines": "\n".join(lines).splitlines()}, indent=2))
    return code
