"""docs/search.md: every block runs, in order."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "search.md"


def test_every_block_of_the_page_runs(tmp_path, capsys):
    page = PAGE.read_text(encoding="utf-8")
    blocks = list(re.finditer(r"^```python\n(.*?)^```", page, re.M | re.S))
    assert len(blocks) == 7
    names: dict[str, object] = {"folder": str(tmp_path)}
    for block in blocks:
        exec(compile("\n" * page[: block.start(1)].count("\n") + block.group(1), str(PAGE), "exec"), names)
    out = capsys.readouterr().out
    assert "control: random" in out and "Pareto front" in out and "the prefix memo saved" in out


def test_the_page_names_every_preset_method_and_score():
    from depthpass.search.named import methods
    from depthpass.search.scores import SCORES
    from depthpass.search.space import PRESETS

    cells = set(re.findall(r"^\| `(\w+)` \|", PAGE.read_text(encoding="utf-8"), re.M))
    assert cells == {*PRESETS, *methods(), *SCORES}
