"""Write the table that ``implementation="auto"`` reads, from the results of a GPU run.

    python benchmarks/attention_table.py docs/gpu/h100-2026-11-26/run1 docs/gpu/h100-2026-11-26/run2

Later folders replace what earlier ones say about the same case on the same device; cases of other devices stay.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

TABLE = Path(__file__).resolve().parent.parent / "kernels" / "depthpass_kernels" / "measured.json"
KEYS = ("op", "capability", "what", "batch", "queries", "keys", "width")


def measured(folder: Path) -> list[dict]:
    """The cases of one run that were measured."""
    path = folder / "attention.json"
    if not path.exists():
        return []
    stage = json.loads(path.read_text())
    environment = next(p for p in (folder / "environment.json", *folder.parent.glob("*/environment.json")) if p.exists())
    device = next(r for r in json.loads(environment.read_text())["results"] if r["label"] == "device")
    capability = [int(n) for n in device["capability"].strip("()").split(",")]
    return [
        {
            "op": row.get("op", "slot_attention"), "device": device["name"], "capability": capability,
            "versions": stage["device"],
            **{k: row[k] for k in ("what", "batch", "queries", "keys", "width")}, "microseconds": row["microseconds"],
        }
        for row in stage["results"] if row.get("microseconds")
    ]


def main() -> int:
    folders = [Path(a) for a in sys.argv[1:]]
    if not folders:
        print(__doc__)
        return 2
    old = json.loads(TABLE.read_text())["rows"] if TABLE.exists() else []
    rows = {json.dumps([r[k] for k in KEYS]): r for r in [*old, *(r for f in folders for r in measured(f))]}
    TABLE.write_text("{\"rows\": [\n" + ",\n".join(json.dumps(r) for r in rows.values()) + "\n]}\n")
    print(f"{len(rows)} measured cases in {TABLE.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
