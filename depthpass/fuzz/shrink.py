"""Make a failing case smaller while it fails in the same way, and print it as a script."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

from depthpass.fuzz.cases import Case

SIMPLE: Case = {
    "lowering": "eager", "chunk": None, "stack": True, "schedule": "sequential", "positions": True, "mask": True, "arch": "llama",
    "side": "left",
}
NEEDED = {
    "loop": ("start", "end"), "repeat": ("start", "end"), "skip": ("start",), "layer_program": ("layers",),
    "pad": ("tokens", "token"), "intra_layer_recurrence": ("reuse",), "taps": ("at",), "turboconn": ("bridges", "rank"),
    "parallel_loop": ("window",), "t2mlr": ("start", "end"), "masked_diffusion": ("steps", "mask_token"),
}
LISTS = ("bridges", "layers", "at", "blocks")


def shrink(case: Case, fault: dict[str, Any], run: Callable[[Case], dict[str, Any]], tries: int = 80) -> Case:
    """The smallest case that fails with the same kind of fault.

    Args:
        fault: what ``run`` says of ``case``.
        tries: largest number of runs.
    """
    best, left = case, tries
    again = True
    while again and left > 0:
        again = False
        for smaller in candidates(best):
            left -= 1
            if left < 0:
                break
            got = run(smaller)
            if got["result"] == "fault" and got["kind"] == fault["kind"]:
                best, again = smaller, True
                break
    return best


def candidates(case: Case) -> Iterator[Case]:
    """Simpler cases, the largest steps first."""
    def with_(**more: Any) -> Case:
        return copy.deepcopy(case) | more

    checks, spec, lengths = case["checks"], case["spec"], case["lengths"]
    for i in range(len(checks)):
        if len(checks) > 1:
            yield with_(checks=checks[:i] + checks[i + 1 :])
    for i in range(len(spec)):
        if len(spec) > 1:
            yield with_(spec=spec[:i] + spec[i + 1 :])
    for i in range(len(lengths)):
        if len(lengths) > 1:
            yield with_(lengths=lengths[:i] + lengths[i + 1 :])
    for key, value in SIMPLE.items():
        if case[key] != value and (key != "side" or case["side"] == "right"):
            yield with_(**{key: value})
    for i, check in enumerate(checks):
        yield from (with_(checks=_put(checks, i, c)) for c in _checks(check))
    for i, one in enumerate(spec):
        yield from (with_(spec=_put(spec, i, p)) for p in _passes(one))
    for i, n in enumerate(lengths):
        if n > 2:
            yield with_(lengths=_put(lengths, i, n - 1) if case["side"] != "none" else [n - 1] * len(lengths))


def _checks(check: Case) -> Iterator[Case]:
    events, sizes = check.get("events", []), check.get("sizes", [])
    for j, event in enumerate(events):
        if len(events) > 1:
            yield check | {"events": events[:j] + events[j + 1 :], "sizes": sizes[:j] + sizes[j + 1 :]}
        if event is not None:
            yield check | {"events": _put(events, j, None)}
    if check.get("loss"):
        yield check | {"loss": False}
    for key in ("beams", "new"):
        if check.get(key, 1) > 1:
            yield check | {key: check[key] - 1}


def _passes(one: Case) -> Iterator[Case]:
    for key, value in one.items():
        if key != "pass" and key not in NEEDED.get(one["pass"], ()):
            yield {k: v for k, v in one.items() if k != key}
        if key in LISTS and isinstance(value, list) and len(value) > 1:
            for j in range(len(value)):
                yield one | {key: value[:j] + value[j + 1 :]}


def _put(items: list, i: int, item: Any) -> list:
    return [*items[:i], item, *items[i + 1 :]]


def script(case: Case, fault: dict[str, Any]) -> str:
    """A Python script that runs a case and prints what it finds."""
    text = json.dumps(case, indent=4)
    for word, name in (("null", "None"), ("true", "True"), ("false", "False")):
        text = text.replace(f": {word}", f": {name}").replace(f" {word},", f" {name},").replace(f" {word}\n", f" {name}\n")
    return (f"# {fault['kind']}\n# {fault['message'].splitlines()[0]}\nfrom depthpass.fuzz import run_case\n\n"
            f"result = run_case({text})\nprint(result['result'], result.get('trace', result.get('kind', '')))\n")
