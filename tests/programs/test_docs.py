"""The pages about programs run as written."""

import re
import shlex
from pathlib import Path

import pytest

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


@pytest.mark.parametrize(("page", "count"), [("loops", 15), ("tasks", 3), ("search", 5)])
def test_every_command_of_a_page_runs_in_an_empty_folder(page, count, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^\$ (.*)$", (DOCS / f"{page}.md").read_text(encoding="utf-8"), flags=re.M)
    assert len(commands) == count
    for program, *words in map(shlex.split, commands):
        if program == "python":
            exec(words[1], {})
        elif program == "echo":
            Path(words[2]).write_text(words[0])
        else:
            assert main([*words, *(["--no-cost"] if words[0] == "report" else [])]) == 0, words
            assert re.search(r"depth|best", capsys.readouterr().out), words
