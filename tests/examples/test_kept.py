"""Kept results: what the page says of them is what stands in their files."""

import json
from pathlib import Path

import pytest

from examples import run
from examples.harness import pages
from examples.harness.experiment import Runner
from examples.harness.settings import settings
from examples.harness.store import Store

DOCS = Path(run.ROOT) / "docs"
KEPT = sorted(p.stem for p in (DOCS / "results").glob("*.json"))
PAGE = (DOCS / "results.md").read_text(encoding="utf-8")


def test_an_experiment_stands_behind_every_result():
    assert set(KEPT) <= set(run.names())
    assert {n for n in run.names() if pages.marks(n)[0] in PAGE} == set(KEPT)


@pytest.mark.parametrize("name", KEPT)
def test_seeds_costs_and_places(name, tmp_path):
    held = json.loads((DOCS / "results" / f"{name}.json").read_text(encoding="utf-8"))
    assert held["experiment"] == name and held["command"].startswith(f"python examples/run.py {name} --seeds ")
    by_arm: dict[str, list] = {}
    for one in held["runs"]:
        by_arm.setdefault(one["arm"], []).append(one)
    for arm, runs in by_arm.items():
        assert {r["seed"] for r in runs} >= {0, 1, 2} and len({r["settings"] for r in runs}) == 1, arm
        rate, tried = f"{runs[0]['lr']:g}", held["sweep"][arm]
        assert tried[rate] == max(tried.values()) and len({r["lr"] for r in runs}) == 1, arm
        for r in runs:
            assert {"parameters", "depth", "FLOPs forward", "weight bytes", "KV bytes", "line bytes"} <= set(r["costs"])
            assert r["date"] and r["machine"] and r["steps"] > 0 and r["flops"] > 0 and r["curve"]
    runner = Runner(name, run.load(name), settings(name), Store(tmp_path / "none.jsonl"), 3)
    for arm, runs in by_arm.items():  # today's settings are those it was made with
        assert runner.fingerprint(runner.arms[arm]) == runs[0]["settings"], arm
    begin, end = pages.marks(name)
    text = PAGE[PAGE.index(begin) : PAGE.index(end)]
    assert f"`{held['command']}`" in text and all(f"\n| {arm} |" in text for arm in by_arm)
    assert f"(images/results_{name}.png)" in PAGE and (DOCS / "images" / f"results_{name}.png").exists()
    assert f"(results/{name}.json)" in PAGE
