"""docs/huggingface.md: every block runs, in order."""

import re
import warnings
from pathlib import Path

import pytest

import depthpass as dp

PAGE = Path(__file__).parents[2] / "docs" / "huggingface.md"


@pytest.mark.usefixtures("one_capture")
def test_every_block_of_the_page_runs(tmp_path, capsys):
    pytest.importorskip("peft")
    pytest.importorskip("accelerate")
    page = PAGE.read_text(encoding="utf-8")
    blocks = list(re.finditer(r"^```python\n(.*?)^```", page, re.M | re.S))
    assert len(blocks) >= 7
    names: dict[str, object] = {"folder": str(tmp_path)}
    for block in blocks:
        line = page[: block.start(1)].count("\n")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)
            exec(compile("\n" * line + block.group(1), str(PAGE), "exec"), names)
    assert isinstance(names["merged"], dp.DepthModel) and "delay 3" in capsys.readouterr().out
    assert not isinstance(names["base"], dp.DepthModel)
