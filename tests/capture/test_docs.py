"""The example of docs/capture.md runs."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "capture.md"


def test_example_of_the_page_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    exec(compile(code, "docs/capture.md", "exec"), {})
    assert "depthpass_capture_calls_attend" in capsys.readouterr().out
