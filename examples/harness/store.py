"""Finished runs as JSON lines: what was run once is not run again, and a summary is made from them at any time."""

from __future__ import annotations

import datetime
import json
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers


@dataclass(frozen=True)
class Store:
    """One file of runs; a run's key is its arm, seed, learning rate and the fingerprint of its settings."""

    path: Path

    def records(self) -> list[dict[str, Any]]:
        """All runs; a line that was cut off by a crash is left out."""
        if not self.path.exists():
            return []
        records = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return records

    def find(self, arm: str, seed: int, lr: float, print_: str) -> dict[str, Any] | None:
        return next((r for r in self.records() if (r["arm"], r["seed"], r["lr"], r["settings"]) == (arm, seed, lr, print_)), None)

    def take(self, records: Iterable[Mapping[str, Any]]) -> int:
        """Add those runs that are not here yet; how many they were."""
        more = [r for r in records if self.find(r["arm"], r["seed"], r["lr"], r["settings"]) is None]
        for record in more:
            self.add(record)
        return len(more)

    def add(self, record: Mapping[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        before = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(("\n" if before and not before.endswith("\n") else "") + json.dumps(record) + "\n")


def conditions(device: str) -> dict[str, Any]:
    """Where and with what a run was made."""
    where = f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s)"
    if device != "cpu":
        where = torch.cuda.get_device_name()
    return {
        "date": datetime.date.today().isoformat(), "machine": where, "torch": torch.__version__.split("+")[0],
        "transformers": transformers.__version__,
    }


def spread(values: Iterable[float]) -> dict[str, Any]:
    """Mean, least and most."""
    held = list(values)
    return {"mean": sum(held) / len(held), "min": min(held), "max": max(held), "n": len(held)}
