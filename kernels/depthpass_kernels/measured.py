"""What ``implementation="auto"`` takes on a GPU: the fastest in a table of measurements.

`measured.json` is written by `benchmarks/attention_table.py` from a run of `benchmarks/gpu.py`; nothing else decides. A call
is held against the measured case that is nearest in rows, queries and keys on a factor scale, on the measured device whose
capability is nearest. Ops that the table does not hold take the kernel, unmeasured.
"""

import functools
import json
import math
from pathlib import Path

TABLE = Path(__file__).with_name("measured.json")


@functools.cache
def rows() -> tuple[dict, ...]:
    """The measurements: op, device, capability, what (forward; forward and backward), sizes, microseconds."""
    return tuple(json.loads(TABLE.read_text())["rows"]) if TABLE.exists() else ()


@functools.lru_cache(maxsize=4096)
def fastest(op: str, what: str, capability: tuple[int, int], batch: int, queries: int, keys: int) -> str:
    """`"triton"` or `"naive"`: the faster one in the nearest measured case; `"triton"` where there is none."""
    cases = [r for r in rows() if r["op"] == op and r["what"] == what and {"naive", "triton"} <= r["microseconds"].keys()]
    if not cases:
        return "triton"
    nearest = min(cases, key=lambda r: (
        abs(r["capability"][0] - capability[0]), abs(r["capability"][1] - capability[1]),
        sum(abs(math.log(max(a, 1) / max(b, 1))) for a, b in zip((r["batch"], r["queries"], r["keys"]), (batch, queries, keys))),
    ))
    return min(("triton", "naive"), key=nearest["microseconds"].__getitem__)
