"""docs/support.md says what the captures say."""

from __future__ import annotations

import zoo
from capture.support_table import PAGE, page, results


def test_support_page_is_current(request):
    found = results()
    assert list(found) == zoo.SUPPORTED and len(found) == 33
    text = page(found)
    if request.config.getoption("--update-golden"):
        PAGE.write_text(text, encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == text, "run this test with --update-golden if the change is meant"
