"""The pages about programs run as written."""

import re
import shlex
from pathlib import Path

import pytest
import zoo

from depthpass.cli import main

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.filterwarnings("ignore:materialize")
@pytest.mark.parametrize("page", ["loops", "plt", "routing", "constructions", "lowering"])
def test_every_block_of_a_page_runs(page):
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / f"{page}.md").read_text(encoding="utf-8"), flags=re.M | re.S)
    assert blocks
    names: dict = {}
    for block in blocks:
        exec(compile(block, f"{page}.md", "exec"), names)


def test_every_system_as_a_command(tmp_path, monkeypatch, capsys):
    zoo.config("granite", 4).save_pretrained(tmp_path)
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^\$ depthpass (report config\.json .*)$", (DOCS / "loops.md").read_text(encoding="utf-8"), flags=re.M)
    assert len(commands) > 10
    for command in commands:
        assert main([*shlex.split(command), "--no-cost"]) == 0, command
        assert re.search(r"depth", capsys.readouterr().out), command
