"""Commands and their options."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any

from depthpass import __version__
from depthpass.cli import machine, models, names, reports
from depthpass.cli.types import positive, positive_list, positive_number, python_name, share
from depthpass.errors import did_you_mean

Run = Callable[[argparse.Namespace], int]
Add = Callable[[str, Run, str], argparse.ArgumentParser]
"""Adds a command: its name, what runs it, and what it does."""


RUN_MODELS = ("contraction", "emit", "search", "calibrate", "demo", "tasks")
"""Commands that run models, or make data of any size."""


class Parser(argparse.ArgumentParser):
    """Adds the nearest spelling to usage errors, and says them with the usage of the command that was given."""

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        words = sys.argv[1:] if args is None else list(args)
        if words and words[0] not in self._words() and (near := did_you_mean(words[0], self._words())):
            self.error(f"unknown command or option {words[0]!r}.{near}")
        known, rest = self.parse_known_args(words, namespace)
        if rest:
            command = self.commands[known.command]
            hint = command.meant(rest[0])
            command.error(f"unrecognized arguments: {' '.join(rest)}{hint and '.' + hint}")
        return known

    @property
    def commands(self) -> dict[str, Parser]:
        """Parsers of commands by their names."""
        return {name: subparser for action in self._actions if isinstance(action, argparse._SubParsersAction)
                for name, subparser in action.choices.items()}

    def meant(self, word: str) -> str:
        """What may have been meant by a word that stands where none is taken."""
        if word.startswith("-"):
            return did_you_mean(word.split("=")[0], self._words())
        if "--spec" not in self._words():
            return ""
        from depthpass.passes.registry import ALIASES, pass_names
        from depthpass.spec import SUFFIXES

        if word.endswith(SUFFIXES) or set(word) & set("{:") or word in (*pass_names(), *ALIASES):
            return f" A spec is given with --spec {shlex.quote(word)}"
        return ""

    def error(self, message: str) -> Any:
        hint = ""
        if "invalid choice" in message:
            # "... invalid choice: 'repotr' (choose from ...)"
            hint = did_you_mean(message.partition("invalid choice: ")[2].split(" ")[0].strip("'"), self._words())
        super().error(message + hint)

    def _words(self) -> list[str]:
        """Commands and options of this parser, and the words that its options choose from."""
        chosen = [str(c) for a in self._actions if a.choices and not isinstance(a.choices, dict) for c in a.choices]
        return [*(s for a in self._actions for s in a.option_strings), *self.commands, *chosen]


def parser() -> argparse.ArgumentParser:
    top = Parser(prog="depthpass", description="Depth, cost and schedule of rewired transformers.",
                     allow_abbrev=False)
    top.add_argument("--version", action="version", version=f"depthpass {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Run, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(run=run, runs_models=name in RUN_MODELS)
        return sub

    for group in (_reports, _checkpoints, _search, _words, _machine):
        group(add)
    return top


def _reports(add: Add) -> None:
    p = add("report", reports.report, "Depth, schedule, state and cost of a spec on a model, from its config alone.")
    _config(p, optional=True)
    _spec(p)
    p.add_argument("--program", metavar="FILE", help="a program text to report on instead of a spec")
    _sizes(p)
    p.add_argument("--task", metavar="NAME[:SIZE[,SIZE][,FORM]]",
                   help="hold a computation against the depth: parity, parity:64, parity:64,chain; names: depthpass tasks")
    _form(p, "json", "markdown", "dot")
    p.add_argument("--full", action="store_true", help="every number, the critical path and what is proven")
    p.add_argument("--html", metavar="FILE", help="also write one self-contained HTML page")

    p = add("show", reports.show, "The program text before and after each pass, or the lowered program of a call.")
    _config(p)
    _spec(p)
    p.add_argument("--lowered", nargs="?", const="train", metavar="CALL",
                   help="what a call runs: train (default), score, prefill, chunk or token")
    _form(p, "json")

    p = add("compare", reports.compare, "Several specs side by side.")
    _config(p)
    p.add_argument("specs", nargs="+", metavar="SPEC", help="'stock', a file, YAML text, a preset, or a pass by name")
    p.add_argument("--diff", action="store_true", help="only numbers that differ, with ratios to the first spec's")
    _sizes(p)
    _form(p, "json", "markdown")
    p.add_argument("--html", metavar="FILE", help="also write the table as one self-contained HTML page")

    p = add("sweep", reports.sweep, "One spec at several groups: what depth costs.")
    _config(p)
    _spec(p, group=False)
    p.add_argument("--group", required=True, type=positive_list, metavar="N,N,...", help="groups in tokens")
    _sizes(p, chunk=False)
    _form(p, "json", "markdown")
    p.add_argument("--plot", metavar="FILE", help="also write depth and serial calls against the group as SVG")


def _checkpoints(add: Add) -> None:
    p = add("contraction", models.contraction, "How much of the added depth a saved transformed model uses.")
    p.add_argument("checkpoint", metavar="FOLDER", help="what save_pretrained wrote")
    p.add_argument("--ids", metavar="FILE", help="token ids as JSON: a list of rows of equal length (default: random ids)")
    p.add_argument("--seq-len", type=positive, default=256, metavar="N", help="random tokens per row (default: 256)")
    p.add_argument("--batch", type=positive, default=1, metavar="B", help="random rows (default: 1)")
    p.add_argument("--eps", type=positive_number, default=1e-3, help="relative error that counts as right (default: 0.001)")
    p.add_argument("--max-sweeps", type=positive, metavar="K", help="stop after so many sweeps")
    _form(p, "json")

    p = add("emit", models.emit, "A saved transformed model as plain transformers code that needs no depthpass.")
    p.add_argument("checkpoint", metavar="FOLDER", help="what save_pretrained wrote")
    p.add_argument("--out", required=True, metavar="DIR", help="a folder that does not exist or is empty")
    p.add_argument("--name", type=python_name, metavar="NAME",
                   help="of modeling_NAME.py and the model type (default: depth_ and the stock one)")
    p.add_argument("--copies", action="store_true", help="store repeated blocks once per visit (pipeline parallelism)")
    _form(p, "json")


def _search(add: Add) -> None:
    p = add("search", models.search, "Which blocks to skip and repeat, from samples, with controls.")
    p.add_argument("checkpoint", metavar="FOLDER", help="a causal language model that save_pretrained wrote")
    p.add_argument("--samples", required=True, metavar="FILE",
                   help="JSON or JSON lines of [prompt, answer] pairs: token ids, or text for the folder's tokenizer")
    p.add_argument("--score", default="exact_match",
                   help="exact_match, greedy_match, log_prob or perplexity (default: exact_match)")
    p.add_argument("--space", default="cola", metavar="NAME|YAML",
                   help="cola, dr_llm, polar, rys, training_free, or fields as '{skip: [1, 2], repeat: any, edits: 1}' "
                        "(default: cola)")
    p.add_argument("--method", default="mcts", help="mcts, beam, random, sweep or exhaustive (default: mcts)")
    p.add_argument("--budget", type=positive, metavar="N", help="programs to score (default: 200, or all for sweep, exhaustive)")
    p.add_argument("--seed", type=int, default=0, metavar="S", help="of split, search and random control (default: 0)")
    p.add_argument("--per-sample", action="store_true", help="a search for each sample, its answer in sight (an oracle)")
    p.add_argument("--held-out", type=share, default=0.5, metavar="SHARE", help="samples kept for comparison (default: 0.5)")
    p.add_argument("--batch", type=positive, default=32, metavar="B", help="rows of a call (default: 32)")
    p.add_argument("--resume", metavar="FILE", help="keep every scored program in FILE; the same command after a stop goes on")
    p.add_argument("--out", metavar="FILE|FOLDER", help="write the best spec (.yaml, .json), or a folder with everything")
    p.add_argument("--plot", metavar="FILE", help="also write score against visits as SVG")
    p.add_argument("--heat-map", metavar="FILE", help="also write scores by start and end of a range run twice as SVG")
    _form(p, "json")


def _words(add: Add) -> None:
    from depthpass.tasks import command as tasks

    tasks.arguments(add("tasks", tasks.run, "List algorithmic tasks, or draw instances of one with trace and DAG."))

    p = add("passes", names.passes, "What a spec can be made of, or the options of one pass.")
    p.add_argument("name", nargs="?", metavar="NAME", help="a pass or its alias: its documentation and options")
    _form(p, "json")

    p = add("presets", names.presets, "Published layouts and search spaces that have names.")
    _form(p, "json")

    p = add("completion", names.completion, "Shell completion: eval \"$(depthpass completion bash)\"; "
            "fish: depthpass completion fish | source.")
    p.add_argument("shell", choices=("bash", "zsh", "fish", "tcsh", "powershell"))
    p.set_defaults(parser=parser)


def _machine(add: Add) -> None:
    p = add("doctor", machine.doctor, "Versions, devices, and whether a config can be treated.")
    _config(p, optional=True, kept=False)
    _form(p, "json")

    p = add("calibrate", machine.calibrate, "Measure this machine's FLOP and byte rates, for --ceilings.")
    p.add_argument("--device", default="cpu", help="a torch device (default: cpu)")
    p.add_argument("--dtype", default="bfloat16", help="bfloat16, float16 or float32 (default: bfloat16)")
    p.add_argument("--out", metavar="FILE", help="also write a file for --ceilings")
    _form(p, "json")

    p = add("demo", machine.demo, "Transform a small model, check it, report on it, train it a little, generate; no download.")
    p.add_argument("--steps", type=positive, default=60, help="training steps (default: 60)")
    p.add_argument("--group", type=positive, default=4, help="group of the bridges (default: 4)")
    _form(p, "json")


def _config(p: argparse.ArgumentParser, *, optional: bool = False, kept: bool = True) -> None:
    p.add_argument("config", nargs="?" if optional else None, metavar="CONFIG",
                   help="a config.json, a folder that holds one, a model id of the hub, whose config alone is fetched, or - for "
                        "standard input")
    if kept:
        p.add_argument("--fresh", action="store_true", help="count anew, whatever an earlier call has kept of this config")


def _spec(p: argparse.ArgumentParser, *, group: bool = True) -> None:
    p.add_argument("--spec", metavar="FILE|YAML|NAME",
                   help="passes as a .yaml or .json file (a mergekit passthrough config, too), as text, as a pass's name (mor), "
                        "or - for standard input")
    p.add_argument("--preset", metavar="NAME", help="a published TurboConn layout: llama-1b, llama-8b, sparse")
    if group:
        p.add_argument("--group", type=positive, metavar="N", help="delay in tokens, instead of the spec's own")


def _sizes(p: argparse.ArgumentParser, *, chunk: bool = True) -> None:
    p.add_argument("--seq-len", type=positive, default=1024, metavar="N", help="tokens per row (default: 1024)")
    p.add_argument("--batch", type=positive, default=1, metavar="B", help="rows (default: 1)")
    if chunk:
        p.add_argument("--chunk", type=positive, metavar="C", help="smaller chunks than the largest legal ones")
    p.add_argument("--no-cost", action="store_true", help="skip the cost analysis, which captures the model")
    p.add_argument("--ceilings", metavar="DEVICE|FILE|F,W",
                   help="bound times: a known device (a100, h100, h200), a file of calibrate, or FLOP/s,byte/s")


def _form(p: argparse.ArgumentParser, *forms: str) -> None:
    group = p.add_mutually_exclusive_group()
    for form in forms:
        group.add_argument(f"--{form}", action="store_const", const=form, dest="form", help=f"print {form.upper()}")
