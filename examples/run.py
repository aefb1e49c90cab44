"""The published effects, with controls, in minutes.

    python examples/run.py list
    python examples/run.py NAME [--seeds 3] [--quick | --gpu] [--arms PART,...] [--set key.key=value] [--out runs] [--kept]
    python examples/run.py show NAME [--out runs]          what is finished, without running anything
    python examples/run.py publish NAME [--out runs]       a finished result into docs/

Every finished run (arm, seed, learning rate) is a line of ``OUT/NAME.jsonl`` and is not made again, so that a run that was
interrupted goes on where it was. ``OUT/NAME.json`` holds everything, ``OUT/NAME.md`` the tables, ``OUT/NAME.png`` the picture.
The learning rate of each arm is chosen by its first seed. ``--kept`` begins with the runs of ``docs/results``, so that arms,
seeds and rates are added to them; runs of other settings than today's are not taken up. ``--quick`` takes seconds and shows the
direction; ``--gpu`` is a longer setting for one card.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [p for p in (str(ROOT),) if p not in sys.path]

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn  # noqa: E402

import depthpass as dp  # noqa: E402
from depthpass.errors import did_you_mean  # noqa: E402
from examples.harness import pages, plots, tables  # noqa: E402
from examples.harness.experiment import Experiment, Runner, Summary, folder  # noqa: E402
from examples.harness.settings import settings  # noqa: E402
from examples.harness.store import Store  # noqa: E402


def names() -> list[str]:
    return sorted(p.stem for p in (ROOT / "examples" / "experiments").glob("[a-z]*.py"))


def load(name: str) -> Experiment:
    return importlib.import_module(f"examples.experiments.{name}").EXPERIMENT


def kept(name: str) -> dict | None:
    """The kept result, if there is one."""
    file = ROOT / "docs" / "results" / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def took(name: str) -> str:
    """What the kept result took."""
    held = kept(name)
    if held is None:
        return ""
    date = max(r["date"] for r in held["runs"])
    return f" [kept: {date}" + (f", {held['minutes']:.0f} CPU minutes]" if "minutes" in held else "]")


class Bars:
    """A progress bar for each run, gone when it is done."""

    def __init__(self, progress: Progress):
        self.progress = progress

    def __call__(self, text: str, total: int):
        task = self.progress.add_task(text, total=total, loss="")

        def tick(loss: float, length: int) -> None:
            self.progress.update(task, advance=1, loss=f"loss {loss:.3f}, {length} tokens")

        tick.close = lambda: self.progress.remove_task(task)
        return tick


def parts(text: str) -> list[str]:
    """Parts of names between commas; a comma with a blank behind it belongs to a name (``stock, 2 blocks``)."""
    return re.split(r",(?! )", text)


def writable(stem: Path) -> None:
    """Before any run is made, and not after the first of them."""
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
        with stem.with_suffix(".jsonl").open("a"):
            pass
    except OSError as error:
        raise ValueError(f"--out: expected a folder that can be written, got {stem.parent} ({error.strerror}). Give another "
                         "one with --out.") from error


def run(name: str, *, seeds: int = 3, overlay: str | None = None, out: Path = Path("runs"), arms: list[str] | None = None,
        changes: tuple[str, ...] = (), missing: bool = True, begin: bool = False, console: Console | None = None) -> Summary:
    """Make what is missing of an experiment, or leave it out, and write its files; ``begin`` with the kept runs."""
    experiment, console = load(name), console or Console(width=150)
    stem, chosen = folder(out, name, overlay), settings(name, overlay, changes)
    if missing:
        writable(stem)
    if chosen.get("device", "cpu") != "cpu" and missing and not torch.cuda.is_available():
        raise ValueError(f"{name}: expected a CUDA device, found none. Leave --gpu out to run on the CPU.")
    store, held = Store(stem.with_suffix(".jsonl")), kept(name) if begin else None
    if held is not None:
        count = store.take([*held["runs"], *held.get("others", [])])
        console.print(f"{count} kept runs taken from docs/results/{name}.json", highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"),
               TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        runner = Runner(name, experiment, chosen, store, seeds, only=arms,
                        say=lambda text: console.print(text, highlight=False, markup=False), progress=Bars(progress))
        summary = runner.run(missing)
    if not summary.arms:
        raise ValueError(f"{name}: expected finished runs in {stem}.jsonl, found none with these settings. Run it first.")
    command = f"python examples/run.py {name} --seeds {seeds}" + (f" --{overlay}" if overlay else "") + (
        f' --arms "{",".join(arms)}"' if arms else "") + "".join(f" --set {c}" for c in changes)
    stem.with_suffix(".json").write_text(json.dumps(tables.plain(summary, command), indent=1), encoding="utf-8")
    stem.with_suffix(".md").write_text(tables.page(summary, experiment, command) + "\n", encoding="utf-8")
    plots.save(summary, experiment, stem.with_suffix(".png"))
    console.print(tables.table(tables.results(summary, experiment), experiment.title))
    console.print(tables.table(tables.cost_table(summary), "costs"))
    console.print(f"wrote {stem}.json, .md, .png", highlight=False)
    return summary


def publish(name: str, out: Path) -> None:
    """A result into docs/results, docs/images and the page."""
    docs = ROOT / "docs"
    (docs / "results").mkdir(exist_ok=True)
    stem = folder(out, name, None)
    if not stem.with_suffix(".json").exists():
        raise ValueError(f"publish: expected {stem}.json, found none. Run the experiment first.")
    held = json.loads(stem.with_suffix(".json").read_text(encoding="utf-8"))
    text = json.dumps(pages.thinned(held), separators=(",", ":"))
    (docs / "results" / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    shutil.copy(stem.with_suffix(".png"), docs / "images" / f"results_{name}.png")
    pages.put(docs / "results.md", name, stem.with_suffix(".md").read_text(encoding="utf-8"))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="list, show, publish, or the name of an experiment")
    parser.add_argument("more", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--seeds", type=int, default=3)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--quick", action="store_const", const="quick", dest="overlay")
    kind.add_argument("--gpu", action="store_const", const="gpu", dest="overlay")
    parser.add_argument("--arms", type=parts, help="only arms with one of these in their name")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting")
    parser.add_argument("--kept", action="store_true", help="begin with the runs of docs/results")
    parser.add_argument("--out", type=Path, default=Path("runs"))
    args = parser.parse_args(argv)
    if args.name == "list":
        if args.more:
            parser.error(f"list: expected nothing after it, got {' '.join(args.more)}")
        for name in names():
            print(f"{name:<17}{load(name).title}{took(name)}")
        return 0
    word = args.name if args.name in ("show", "publish") else None
    wanted = args.more if word else [args.name, *args.more]
    if unknown := [n for n in wanted if n not in names()] or (not wanted and ["nothing"]):
        more = "" if word else "list, show, publish or "
        near = did_you_mean(unknown[0], names() if word else [*names(), "list", "show", "publish"])
        parser.error(f"expected {more}one of {', '.join(names())}; got {unknown[0]}.{near}")
    if args.seeds < 1:
        parser.error("--seeds must be at least 1")
    try:
        for name in wanted:
            if word == "publish":
                publish(name, args.out)
            else:
                run(name, seeds=args.seeds, overlay=args.overlay, out=args.out, arms=args.arms, changes=tuple(args.set),
                    missing=word is None, begin=args.kept)
    except (ValueError, dp.DepthpassError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print(f"\ninterrupted; finished runs stand in {args.out}, and the same command goes on from there", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
