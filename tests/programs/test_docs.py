"""The pages about programs run as written."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.filterwarnings("ignore:materialize")
@pytest.mark.parametrize("page", ["loops", "plt", "routing", "constructions", "lowering"])
def test_every_block_of_a_page_runs(page):
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / f"{page}.md").read_text(encoding="utf-8"), flags=re.M | re.S)
    assert blocks
    names: dict = {}
    for block in blocks:
        exec(compile(block, f"{page}.md", "exec"), names)
