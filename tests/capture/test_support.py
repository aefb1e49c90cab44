"""docs/support.md says what the captures say, and the example of docs/capture.md runs."""

from __future__ import annotations

import re

import zoo
from capture.support_table import PAGE, page, results


def test_support_page_is_current(request):
    result = results()
    assert list(result) == zoo.SUPPORTED and len(result) == 33
    text = page(result)
    if request.config.getoption("--update-golden"):
        PAGE.write_text(text, encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == text, "run this test with --update-golden if the change is meant"


def test_example_of_the_page_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", (PAGE.parent / "capture.md").read_text(encoding="utf-8"), re.S)
    exec(compile(code, "docs/capture.md", "exec"), {})
    assert "depthpass_capture_calls_attend" in capsys.readouterr().out
