"""``depthpass tasks`` and ``depthpass report --task``."""

import json
import re

import pytest

from depthpass.cli import main
from depthpass.tasks import TASKS, get


@pytest.fixture
def run(capsys):
    def call(*args):
        code = main([str(a) for a in args])
        return code, *capsys.readouterr()

    return call


def test_the_list_names_every_task(run):
    code, out, _ = run("tasks")
    assert code == 0 and {line.split()[0] for line in out.splitlines()} == set(TASKS)
    assert [json.loads(x)["task"] for x in run("tasks", "--json")[1].splitlines()] == list(TASKS)


def test_instances_are_drawn(run):
    code, out, _ = run("tasks", "bubble_sort", "--lengths", "4", "--seed", "3")
    assert code == 0 and out.startswith("# bubble_sort, length 4: 12 states, depth 5, width 4\nsort ")
    prompt, response = out.split("\n", 2)[1:]
    assert get("bubble_sort").check(prompt, response)
    lines = run("tasks", "lcs", "--lengths", "7-9", "--count", 3, "--json", "--answer-only")[1].splitlines()
    rows = [json.loads(x) for x in lines]
    assert len(rows) == 3 and all(7 <= r["length"] <= 9 and "trace" not in r for r in rows)
    assert "a=1203 b=1230 : " in run("tasks", "s5_word_problem", "--option", "generators=1203,1230")[1]


@pytest.mark.parametrize(("args", "message"), [
    (("tasks", "lsc"), "Did you mean 'lcs'"),
    (("tasks", "lcs", "--lengths", "XL"), "expected one of S, M, L"),
    (("tasks", "lcs", "--lengths", "0"), "got 0"),
    (("tasks", "lcs", "--count", "0"), "--count"),
    (("tasks", "lcs", "--option", "reverse"), "NAME=VALUE"),
    (("tasks", "lcs", "--option", "reverse=true"), "expected options among none"),
    (("report", "--program", "PROGRAM", "--task", "parity:x,y"), "expected NAME:SIZE"),
    (("report", "--program", "PROGRAM", "--task", "parity:4,tre"), "Did you mean 'tree'"),
    (("report", "--program", "PROGRAM", "--task", "dijkstra:1"), "got 1"),
])
def test_bad_arguments(run, tmp_path, args, message):
    file = tmp_path / "program.txt"
    file.write_text("program M blocks=2 width=32\n %0 = embed\n %1 = block 1 (%0) slot 0\n output %1\n")
    code, _, error = run(*(file if a == "PROGRAM" else a for a in args))
    assert code == 2 and message in error


def test_a_report_says_whether_the_depth_covers_a_dag(run, tmp_path):
    file = tmp_path / "program.txt"
    blocks = "%1 = block 1 (%0) slot 0\n %2 = block 2 (%1) slot 1"
    file.write_text(f"program M blocks=4 width=32\n %0 = embed\n {blocks}\n output %2\n")

    def said(task, n=64):
        return run("report", "--program", file, "--seq-len", n, "--no-cost", "--full", "--task", task)[1]

    tree, chain, graph = said("parity:4"), said("parity:4,chain"), said("dijkstra:5")
    assert re.search(r"depth and tokens cover this DAG +yes", tree) and re.search(r"cover this DAG +no", chain)
    assert re.search(r"depth of its DAG +4 rounds", chain) and re.search(r"missing +2 block visits", chain)
    asked = ("report", "--program", file, "--seq-len", 4, "--no-cost", "--task")
    short = [run(*asked, t)[1] for t in ("parity:4", "parity:8,chain")]
    assert "task parity(4, tree): covers this DAG: its DAG has depth 2, at hand 2" in short[0]
    assert "does not cover this DAG: its DAG has depth 8, at hand 2, missing 6 block visits" in short[1]
    assert "its widest level is 8 tokens, at hand 4" in short[1]
    assert "dijkstra(5, seed 0)" in graph and not re.search(r"\bneed", chain[chain.index("Task:") :][:900])
