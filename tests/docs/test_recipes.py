"""docs/recipes: every page runs as pasted, by itself, and is as short as it says; so do the pages that others start at."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import subprocess
import sys
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


@pytest.mark.filterwarnings("ignore")
def test_notebooks_run_in_a_kernel(tmp_path: Path) -> None:
    """All three one after another in one kernel, since starting it and importing takes most of the time."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    books = {f.stem: nbformat.read(f, as_version=4) for f in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))}
    forget = nbformat.v4.new_code_cell("%reset -f")
    for name, book in books.items():
        nbformat.validate(book)
        assert not any(c.get("outputs") for c in book.cells), f"{name}: outputs are not kept in the repository"
    whole = nbformat.v4.new_notebook(cells=[c for book in books.values() for c in (*book.cells, forget)])
    nbclient.NotebookClient(whole, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = {name: [o.get("data", {}) for c in book.cells for o in c.get("outputs", ())] for name, book in books.items()}
    assert set(shown) == {"analysis", "training", "serving"}
    assert any("dp-picture" in d.get("text/html", "") for d in shown["analysis"])
    assert any("depth at n = 155" in d.get("text/plain", "") for d in shown["analysis"])
    assert any("program LlamaForCausalLM" in d.get("text/html", "") for d in shown["training"])
    assert any("DepthCache(tokens=" in d.get("text/plain", "") for d in shown["serving"])


ROOT = PAGES.parents[1]
STARTS = ["README.md", "docs/index.md", "docs/report.md", "docs/depth.md", "docs/backend.md",
          *(str(p.relative_to(ROOT)) for p in sorted((ROOT / "docs" / "errors").glob("*.md")))]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", STARTS)
def test_a_page_needs_no_names_from_elsewhere(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.M | re.S)
    blocks = blocks[:1] if page == "README.md" else blocks      # its second one is docs/backend.md's
    names: dict[str, object] = {"__name__": "__main__"}
    for text in blocks:
        exec(compile(text, page, "exec"), names)


PAGES_FOR_USERS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
DIALECT = r"\b(rungs?|sink|sunk|asking|rooms?|sides|swept|doors?)\b"
"""What we call things among ourselves."""


def test_pages_define_every_name_that_they_use(tmp_path: Path) -> None:
    for page in PAGES_FOR_USERS:
        blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
        (tmp_path / f"{page.relative_to(ROOT)}.py".replace("/", "-")).write_text("\n".join(blocks), encoding="utf-8")
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821", "--output-format", "concise",
                           str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_pages_are_in_plain_words() -> None:
    for page in PAGES_FOR_USERS:
        prose = re.sub(r"^(```+).*?^\1", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
        prose = re.sub(r"`[^`]*`|\]\([^)]*\)", "", prose)
        assert not (result := re.search(DIALECT, prose, re.I)), f"{page.name}: {prose[result.start() - 60 : result.end() + 20]!r}"


def test_the_picture_stands_before_the_fold() -> None:
    """What it is, one example, one picture of a real result, one of a report, and recipes, within a screen."""
    start = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## ")[0]
    assert len(start.splitlines()) <= 40 and start.count("![") >= 2 and "docs/recipes/README.md" in start
    for image in re.findall(r"!\[[^]]*\]\(([^)]*)\)", start):
        assert (ROOT / image).stat().st_size > 2000


def test_every_error_has_a_page() -> None:
    from depthpass import errors

    names = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, errors.DepthpassError)}
    pages = {p.stem for p in (ROOT / "docs" / "errors").glob("*.md")} - {"README"}
    assert names == pages
    assert set(re.findall(r"\]\((\w+)\.md\)", (ROOT / "docs/errors/README.md").read_text(encoding="utf-8"))) == pages


def test_the_site_builds_strictly(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="needs the docs extra")
    pytest.importorskip("mkdocstrings_handlers.python", reason="needs the docs extra")
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    completed = subprocess.run([sys.executable, "-m", "mkdocs", "build", "-q", "--strict", "-d", str(tmp_path)], cwd=ROOT,
                          env=environment, capture_output=True, text=True)
    assert completed.returncode == 0, completed.stderr[-2000:]
    api = (tmp_path / "api" / "index.html").read_text(encoding="utf-8")
    wanted = ("hf.transform.transform", "report.report", "passes.loop.Loop", "compared.sweep", "equal.twin", "recipes.huginn",
              "tasks.registry.get", "emit.folder.emit")
    assert [name for name in wanted if f'id="depthpass.{name}"' not in api] == []
    assert "dp-picture" in (tmp_path / "reports" / "turboconn.html").read_text(encoding="utf-8")


def test_the_matrix_names_the_lower_bounds() -> None:
    done = subprocess.run(["bash", ".ci/matrix", "--dry-run", "--python", "3.11,9.9"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "python 9.9: not installed" in done.stdout
    if "3.11: not installed" not in done.stdout:
        assert "torch==2.11.* transformers==5.17.*" in done.stdout
    done = subprocess.run(["bash", ".ci/matrix", "--dry-run", "--environment", sys.prefix, "--environment", "nowhere", "--", "x"],
                          cwd=ROOT, capture_output=True, text=True)
    said = f"{sys.prefix}/bin/python -m pytest -q --codegen x\npython {platform.python_version()}, torch "
    assert done.returncode == 1 and said in done.stdout
    assert "nowhere: no Python with torch and transformers" in done.stdout and "-m venv" not in done.stdout


def test_scripts_are_short_and_name_the_real_model() -> None:
    for page, _, text in scripts():
        assert len(text.splitlines()) <= LINES, page
        assert "yours: " in text and "from depthpass.demo import" in text, page


def test_every_page_is_listed() -> None:
    listed = set(re.findall(r"\]\((\w[\w-]*\.md)\)", (PAGES / "README.md").read_text(encoding="utf-8")))
    assert listed == {p.name for p in PAGES.glob("*.md")} - {"README.md"}


def test_accelerate_reads_the_config_files(tmp_path: Path) -> None:
    config_args = pytest.importorskip("accelerate.commands.config.config_args")
    seen = {}
    for _, _, text in scripts("yaml"):
        name = text.split()[1]
        (tmp_path / name).write_text(text)
        seen[name] = config_args.load_config_from_file(str(tmp_path / name))
        assert yaml.safe_load(text)["num_processes"] == seen[name].num_processes == 8
    assert seen["ddp.yaml"].distributed_type == "MULTI_GPU" and seen["fsdp2.yaml"].fsdp_config["fsdp_version"] == 2


def test_every_process_gets_its_small_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers writes a model in the first of several processes alone; each of them loads a folder of its own."""
    import torch
    from transformers import AutoModelForCausalLM

    from depthpass.demo import small

    alone = AutoModelForCausalLM.from_pretrained(small(blocks=2)).state_dict()
    with monkeypatch.context() as second:
        second.setattr(torch.distributed, "is_initialized", lambda: True)
        second.setattr(torch.distributed, "get_rank", lambda *_: 1)
        small(blocks=2, folder=str(tmp_path))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert loaded.keys() == alone.keys() and all(torch.equal(loaded[k], alone[k]) for k in alone)
