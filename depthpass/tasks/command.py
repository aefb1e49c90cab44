"""``depthpass tasks``, and what ``--task`` names."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from depthpass.errors import InputError
from depthpass.prompt import listing

if TYPE_CHECKING:
    from depthpass.tasks.dags import TaskDAG


def arguments(p: argparse.ArgumentParser) -> None:
    """Arguments of ``depthpass tasks``."""
    p.add_argument("name", nargs="?", metavar="NAME", help="a task; left out = list all of them")
    p.add_argument("--lengths", default="S", metavar="S|N|A-B", help="a range by name, a length, or a span (default: S)")
    p.add_argument("--count", type=int, default=1, metavar="N", help="instances to draw (default: 1)")
    p.add_argument("--seed", type=int, default=0, metavar="S", help="of all instances (default: 0)")
    p.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="an option of the task; may be repeated")
    p.add_argument("--answer-only", action="store_true", help="leave the traces out")
    p.add_argument("--json", action="store_true", help="print a JSON object per line")


def run(args: argparse.Namespace) -> int:
    """``depthpass tasks [NAME]``."""
    from depthpass.tasks.data import draw
    from depthpass.tasks.registry import get

    if args.name is None:
        return _list(args.json)
    if args.count < 1:
        raise InputError(f"--count: expected an integer of at least 1, got {args.count}.")
    task, lengths = get(args.name, **dict(map(_option, args.option))), _lengths(args.lengths)
    task.span(lengths)
    for i in range(args.count):
        instance = draw(task, lengths, i, seed=args.seed)
        if args.json:
            print(json.dumps(instance.record(trace=not args.answer_only)))
            continue
        print(f"# {task.name}, length {instance.length}" + ("" if args.answer_only else
              f": {instance.dag.size} states, depth {instance.dag.depth}, width {instance.dag.width}"))
        print(f"{instance.prompt}\nanswer {instance.answer}" if args.answer_only else instance.text)
    return 0


def _list(as_json: bool) -> int:
    from depthpass.tasks.registry import TASKS, get

    tasks = list(map(get, TASKS))
    if as_json:
        print("\n".join(json.dumps({"task": t.name, "family": t.family, "unit": t.unit, "ranges": t.ranges}) for t in tasks))
    else:
        listing([(t.name, t.family, "  ".join(f"{k} {a}-{b}" for k, (a, b) in t.ranges.items()), t.unit) for t in tasks])
    return 0


def _lengths(text: str) -> Any:
    parts = text.split("-")
    if not all(p.isdigit() for p in parts):
        return text
    return int(text) if len(parts) == 1 else tuple(map(int, parts))


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise InputError(f"--option: expected NAME=VALUE such as reverse=true, got {text!r}.")
    try:
        return name, json.loads(value.lower())
    except json.JSONDecodeError:
        return name, tuple(value.split(","))


def task_dag(text: str) -> TaskDAG:
    """The DAG that ``NAME:SIZE[,SIZE][,FORM]`` names.

    Raises:
        InputError: not of this form, an unknown task, sizes out of range.
    """
    from depthpass.tasks.registry import dag

    name, _, rest = text.partition(":")
    parts = [p.strip() for p in rest.split(",") if p.strip()]
    forms = [p for p in parts if not p.lstrip("-").isdigit()]
    if len(forms) > 1 or len(parts) == len(forms) or forms != parts[len(parts) - len(forms) :]:
        raise InputError(f"--task: expected NAME:SIZE[,SIZE][,FORM] such as parity:64 or edit_distance:30,30, got {text!r}.")
    sizes = [int(p) for p in parts if p not in forms]
    return dag(name, *sizes, form=forms[0] if forms else None)
