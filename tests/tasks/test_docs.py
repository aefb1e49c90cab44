"""docs/tasks.md: every block runs, in order, and the page names every task."""

import re
from pathlib import Path

from depthpass.tasks import TASKS

PAGE = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text(encoding="utf-8")


def test_every_block_of_the_page_runs(capsys):
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
    assert len(blocks) >= 7
    names: dict[str, object] = {"__name__": "tasks_page"}
    for block in blocks:
        exec(compile(block, "tasks.md", "exec"), names)
    assert "the program does not cover this DAG" in capsys.readouterr().out


def test_the_page_names_every_task():
    assert set(TASKS) <= set(re.findall(r"`(\w+)`", PAGE))
    assert not re.search(r"\bneeds\b", PAGE)
