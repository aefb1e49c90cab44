"""docs/serving.md: every block runs, in order."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "serving.md"


def test_every_block_of_the_page_runs(tmp_path):
    page = PAGE.read_text(encoding="utf-8")
    blocks = list(re.finditer(r"^```python\n(.*?)^```", page, re.M | re.S))
    assert len(blocks) >= 3
    names: dict[str, object] = {"folder": str(tmp_path)}
    for block in blocks:
        line = page[: block.start(1)].count("\n")
        exec(compile("\n" * line + block.group(1), str(PAGE), "exec"), names)
