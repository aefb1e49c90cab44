"""docs/recipes: every page runs as pasted, by itself, and is as short as it says."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import yaml

PAGES = Path(__file__).parents[2] / "docs" / "recipes"
NEEDS = {"trl": ("trl", "datasets", "peft"), "lm_eval": ("lm_eval",), "accelerate": ("accelerate",), "Trainer": ("accelerate",)}
LINES = 40


def scripts(language: str = "python") -> list[tuple[str, int, str]]:
    """(page, its place in it, text) of every script."""
    return [
        (page.stem, i, text)
        for page in sorted(PAGES.glob("*.md"))
        for i, text in enumerate(re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S))
    ]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("page", "at", "text"), scripts(), ids=lambda v: str(v) if len(str(v)) < 30 else "")
def test_every_script_runs_as_pasted(page: str, at: int, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = [m for word, modules in NEEDS.items() if word in text for m in modules if importlib.util.find_spec(m) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    monkeypatch.chdir(tmp_path)
    exec(compile(text, f"{page}.md", "exec"), {"__name__": "__main__"})


def test_scripts_are_short_and_name_the_real_model() -> None:
    for page, _, text in scripts():
        assert len(text.splitlines()) <= LINES, page
        assert "yours: " in text and "small(" in text, page


def test_every_page_is_listed() -> None:
    listed = set(re.findall(r"\]\((\w[\w-]*\.md)\)", (PAGES / "README.md").read_text(encoding="utf-8")))
    assert listed == {p.name for p in PAGES.glob("*.md")} - {"README.md"}


def test_accelerate_reads_the_config_files(tmp_path: Path) -> None:
    config_args = pytest.importorskip("accelerate.commands.config.config_args")
    found = {}
    for _, _, text in scripts("yaml"):
        name = text.split()[1]
        (tmp_path / name).write_text(text)
        found[name] = config_args.load_config_from_file(str(tmp_path / name))
        assert yaml.safe_load(text)["num_processes"] == found[name].num_processes == 8
    assert found["ddp.yaml"].distributed_type == "MULTI_GPU" and found["fsdp2.yaml"].fsdp_config["fsdp_version"] == 2
