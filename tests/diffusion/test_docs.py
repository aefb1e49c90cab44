"""docs/diffusion.md: every block runs, in order."""

import re
from pathlib import Path

from depthpass.passes.masked_diffusion import ORDERS

PAGE = (Path(__file__).parents[2] / "docs" / "diffusion.md").read_text(encoding="utf-8")


def test_every_block_of_the_page_runs(capsys):
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
    assert len(blocks) >= 6
    names: dict[str, object] = {"__name__": "diffusion_page"}
    for block in blocks:
        exec(compile(block, "diffusion.md", "exec"), names)
    assert "T * L with L = 3" in capsys.readouterr().out


def test_the_page_names_every_order():
    assert set(ORDERS) <= set(re.findall(r"^\| `(\w+)` \|", PAGE, re.M))
