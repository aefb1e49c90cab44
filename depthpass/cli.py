"""The command line: ``depthpass report | show | compare | sweep | contraction | search | doctor | calibrate | demo``.

Exit codes: 0 done, 1 the answer is no (``doctor`` found a problem), 2 bad input; errors go to standard error.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from depthpass.errors import DepthpassError, InputError, SpecError, did_you_mean

if TYPE_CHECKING:
    from depthpass.analysis.roofline import Ceilings
    from depthpass.analysis.tasks import TaskDAG
    from depthpass.ir import Program
    from depthpass.passes import Pass

COMMANDS = ("report", "show", "compare", "sweep", "contraction", "search", "doctor", "calibrate", "demo")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: arguments without the program name; None = those of the process.

    Returns:
        The exit code.
    """
    try:
        args = _parser().parse_args(argv)
        return args.run(args)
    except SystemExit as stop:
        # argparse has already printed help or a usage error.
        return stop.code if isinstance(stop.code, int) else 2
    except BrokenPipeError:
        # The reader has gone (`depthpass ... | head`); keep the interpreter from complaining about it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (DepthpassError, OSError) as error:
        print(f"depthpass: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("depthpass: interrupted", file=sys.stderr)
        return 130


class _Parser(argparse.ArgumentParser):
    """Adds the nearest spelling to usage errors."""

    def error(self, message: str) -> Any:
        hint = ""
        if "unrecognized" in message or "invalid choice" in message:
            # "unrecognized arguments: --sec-len 5" or "... invalid choice: 'repotr' (choose from ...)"
            given = message.rpartition(": ")[2].split(" ")[0].strip("'").split("=")[0]
            hint = did_you_mean(given, [*COMMANDS, *self._options()])
        super().error(message + hint)

    def _options(self) -> list[str]:
        """Options of this parser and of its commands."""
        found = [s for a in self._actions for s in a.option_strings]
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                found += [s for p in action.choices.values() for a in p._actions for s in a.option_strings]
        return found


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="depthpass", description="Depth, cost and schedule of rewired transformers.",
                     allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(run=run)
        return sub

    p = add("report", _report, "Depth, schedule, state and cost of a spec on a model, from its config alone.")
    _config(p, optional=True)
    _spec(p)
    p.add_argument("--program", metavar="FILE", help="a program text to report on instead of a spec")
    _sizes(p)
    p.add_argument("--task", metavar="NAME:SIZE[,SIZE]", help="hold a computation against the depth, e.g. parity:64")
    _form(p, "json", "markdown", "dot")
    p.add_argument("--html", metavar="FILE", help="also write one self-contained HTML page")

    p = add("show", _show, "The program text before and after each pass, or the lowered program of a call.")
    _config(p)
    _spec(p)
    p.add_argument("--lowered", nargs="?", const="train", metavar="CALL",
                   help="what a call runs: train (default), score, prefill, chunk or token")
    _form(p, "json")

    p = add("compare", _compare, "Several specs side by side.")
    _config(p)
    p.add_argument("specs", nargs="+", metavar="SPEC", help="file, YAML text, preset name, or 'stock'")
    _sizes(p)
    _form(p, "json", "markdown")

    p = add("sweep", _sweep, "One spec at several groups: what depth costs.")
    _config(p)
    _spec(p, group=False)
    p.add_argument("--group", required=True, type=_positive_list, metavar="N,N,...", help="groups in tokens")
    _sizes(p, chunk=False)
    _form(p, "json", "markdown")
    p.add_argument("--plot", metavar="FILE", help="also write depth and serial calls against the group as SVG")

    p = add("contraction", _contraction, "How much of the added depth a saved transformed model uses.")
    p.add_argument("checkpoint", metavar="FOLDER", help="what save_pretrained wrote")
    p.add_argument("--ids", metavar="FILE", help="token ids as JSON: a list of rows of equal length (default: random ids)")
    p.add_argument("--seq-len", type=_positive, default=256, metavar="N", help="random tokens per row (default: 256)")
    p.add_argument("--batch", type=_positive, default=1, metavar="B", help="random rows (default: 1)")
    p.add_argument("--eps", type=float, default=1e-3, help="relative error that counts as right (default: 0.001)")
    p.add_argument("--max-sweeps", type=_positive, metavar="K", help="stop after so many sweeps")
    _form(p, "json")

    p = add("search", _search, "Which blocks to skip and repeat, from samples, with controls.")
    p.add_argument("checkpoint", metavar="FOLDER", help="a causal language model that save_pretrained wrote")
    p.add_argument("--samples", required=True, metavar="FILE",
                   help="JSON or JSON lines of [prompt, answer] pairs: token ids, or text for the folder's tokenizer")
    p.add_argument("--score", default="exact_match",
                   help="exact_match, greedy_match, log_prob or perplexity (default: exact_match)")
    p.add_argument("--space", default="cola", metavar="NAME|YAML",
                   help="cola, dr_llm, polar, rys, or fields as '{skip: [1, 2], repeat: any, edits: 1}' (default: cola)")
    p.add_argument("--method", default="mcts", help="mcts, beam, random, sweep or exhaustive (default: mcts)")
    p.add_argument("--budget", type=int, metavar="N", help="programs to score (default: 200, or all for sweep, exhaustive)")
    p.add_argument("--seed", type=int, default=0, metavar="S", help="of split, search and random control (default: 0)")
    p.add_argument("--per-sample", action="store_true", help="a search for each sample, its answer in sight (an oracle)")
    p.add_argument("--held-out", type=float, default=0.5, metavar="SHARE", help="samples kept for comparison (default: 0.5)")
    p.add_argument("--batch", type=_positive, default=32, metavar="B", help="rows of a call (default: 32)")
    p.add_argument("--out", metavar="FILE|FOLDER", help="write the best spec (.yaml, .json), or a folder with everything")
    p.add_argument("--plot", metavar="FILE", help="also write score against visits as SVG")
    p.add_argument("--heat-map", metavar="FILE", help="also write scores by start and end of a range run twice as SVG")
    _form(p, "json")

    p = add("doctor", _doctor, "Versions, devices, and whether a config can be treated.")
    _config(p, optional=True)
    _form(p, "json")

    p = add("calibrate", _calibrate, "Measure this machine's FLOP and byte rates, for --ceilings.")
    p.add_argument("--device", default="cpu", help="a torch device (default: cpu)")
    p.add_argument("--dtype", default="bfloat16", help="bfloat16, float16 or float32 (default: bfloat16)")
    p.add_argument("--out", metavar="FILE", help="also write a file for --ceilings")
    _form(p, "json")

    p = add("demo", _demo, "Transform a small model, check it, report on it, train it a little, generate; no download.")
    p.add_argument("--steps", type=_positive, default=60, help="training steps (default: 60)")
    p.add_argument("--group", type=_positive, default=4, help="group of the bridges (default: 4)")
    return parser


def _config(p: argparse.ArgumentParser, *, optional: bool = False) -> None:
    p.add_argument("config", nargs="?" if optional else None, metavar="CONFIG",
                   help="a config.json or a folder that holds one; nothing is downloaded")


def _spec(p: argparse.ArgumentParser, *, group: bool = True) -> None:
    p.add_argument("--spec", metavar="FILE|YAML", help="passes as a .yaml or .json file, or as text")
    p.add_argument("--preset", metavar="NAME", help="a published TurboConn layout: llama-1b, llama-8b, sparse")
    if group:
        p.add_argument("--group", type=_positive, metavar="N", help="delay in tokens, instead of the spec's own")


def _sizes(p: argparse.ArgumentParser, *, chunk: bool = True) -> None:
    p.add_argument("--seq-len", type=_positive, default=1024, metavar="N", help="tokens per row (default: 1024)")
    p.add_argument("--batch", type=_positive, default=1, metavar="B", help="rows (default: 1)")
    if chunk:
        p.add_argument("--chunk", type=_positive, metavar="C", help="smaller chunks than the largest legal ones")
    p.add_argument("--no-cost", action="store_true", help="skip the cost analysis, which captures the model")
    p.add_argument("--ceilings", metavar="DEVICE|FILE|F,W",
                   help="bound times: a known device (a100, h100, h200), a file of calibrate, or FLOP/s,byte/s")


def _form(p: argparse.ArgumentParser, *forms: str) -> None:
    group = p.add_mutually_exclusive_group()
    for form in forms:
        group.add_argument(f"--{form}", action="store_const", const=form, dest="form", help=f"print {form.upper()}")


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
    return value


def _positive_list(text: str) -> list[int]:
    return [_positive(part.strip()) for part in text.split(",")]


# Commands.


def _report(args: argparse.Namespace) -> int:
    passes, program = _passes(args), _program_text(args)
    if args.config is None and program is None:
        raise InputError("report: expected the path of a config.json, or --program FILE, got neither.")
    options = _options(args) | {"task": _task(args.task)}
    made = _subject(args.config).report(passes, program=program, **options)
    if args.html:
        _write(args.html, made.to_html())
    _emit(made, args.form)
    return 0


def _show(args: argparse.Namespace) -> int:
    from depthpass.ir import plain
    from depthpass.passes import apply_spec

    passes, subject = _passes(args), _subject(args.config)
    # Not before the arguments are known to be right: it imports transformers.
    from depthpass.hf.transform import context_of

    ctx = context_of(subject.stock)
    stock = plain(ctx.model, ctx.blocks, ctx.width)
    shown: list[tuple[str, Program]] = [("stock", stock)]
    if passes is not None:
        apply_spec(stock, passes, ctx, on_pass=lambda p, _, after: shown.append((p.label, after)))
    if args.lowered is not None:
        from depthpass.lowered import lower
        from depthpass.schedule import schedule

        plan = schedule(shown[-1][1])
        lowered = lower(plan, args.lowered, step=plan.step(1) if args.lowered == "token" else None)
        print(json.dumps({"call": args.lowered, "lowered": str(lowered)}, indent=2) if args.form == "json" else lowered)
    elif args.form == "json":
        print(json.dumps([{"after": label, "program": str(p)} for label, p in shown], indent=2))
    else:
        print("\n\n".join(f"# {label if label == 'stock' else 'after ' + label}\n{p}" for label, p in shown))
    return 0


def _compare(args: argparse.Namespace) -> int:
    from depthpass.report.tables import compare

    specs = [(name, _named_spec(name)) for name in args.specs]
    names = [Path(name).stem if Path(name).suffix else name for name in args.specs]
    if len(set(names)) < len(names):
        names = list(args.specs)
    pairs = [(name, spec) for name, (_, spec) in zip(names, specs)]
    _emit(compare(_subject(args.config), pairs, **_options(args)), args.form)
    return 0


def _sweep(args: argparse.Namespace) -> int:
    from depthpass.report.tables import sweep

    passes = _passes(args)
    if passes is None:
        raise SpecError("sweep: expected --spec or --preset, got neither.")
    table = sweep(_subject(args.config), passes, args.group, **_options(args))
    if args.plot:
        _write(args.plot, table.to_svg())
    _emit(table, args.form)
    return 0


def _contraction(args: argparse.Namespace) -> int:
    import torch

    from depthpass.analysis.contraction import contraction
    from depthpass.hf.save import from_pretrained

    rows = None if args.ids is None else _rows(args.ids)
    if not Path(args.checkpoint).is_dir():
        raise InputError(f"contraction: expected a folder that save_pretrained wrote, got {args.checkpoint!r}.")
    model: Any = from_pretrained(args.checkpoint)
    size = model.config.get_text_config(decoder=True).vocab_size
    if rows is None:
        ids = torch.randint(size, (args.batch, args.seq_len), generator=torch.Generator().manual_seed(0))
        print("note: random token ids; the rate depends on the text, give some with --ids", file=sys.stderr)
    else:
        ids = torch.tensor(rows)
        if int(ids.min()) < 0 or int(ids.max()) >= size:
            raise InputError(f"--ids: expected token ids of 0 to {size - 1}, got {int(ids.min())} to {int(ids.max())}.")
    _emit(contraction(model, {"input_ids": ids, "labels": ids}, eps=args.eps, max_sweeps=args.max_sweeps), args.form)
    return 0


def _search(args: argparse.Namespace) -> int:
    from depthpass.search.files import read_samples
    from depthpass.search.methods import load_method
    from depthpass.search.run import search
    from depthpass.search.scores import load_score
    from depthpass.search.space import load_space

    text, space = _read(args.samples, "samples"), load_space(_space(args.space))
    # Before a model is loaded, which may take long.
    load_method(args.method), load_score(args.score)
    from depthpass.hf.checkpoints import load_language_model, load_tokenizer

    samples = read_samples(text, args.samples, lambda: load_tokenizer(args.checkpoint))
    found = search(
        load_language_model(args.checkpoint), samples, score=args.score, space=space, method=args.method, budget=args.budget,
        seed=args.seed, per_sample=args.per_sample, held_out=args.held_out, batch=args.batch,
    )
    if args.out:
        found.save(args.out)
    if args.plot:
        _write(args.plot, found.to_svg())
    if args.heat_map:
        _write(args.heat_map, found.heat_map().to_svg())
    _emit(found, args.form)
    return 0


def _space(text: str) -> Any:
    import yaml

    if not text.lstrip().startswith(("{", "[")):
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"--space: expected a name or fields as YAML, got {text!r}: {error}.") from None


def _rows(path: str) -> list[list[int]]:
    """Rows of token ids from a JSON file."""
    try:
        rows = json.loads(_read(path, "ids"))
    except json.JSONDecodeError as error:
        raise InputError(f"--ids: {path!r} is not JSON: {error}.") from None
    good = isinstance(rows, list) and rows and all(
        isinstance(r, list) and r and len(r) == len(rows[0]) and all(type(i) is int for i in r) for r in rows
    )
    if not good:
        raise InputError(f"--ids: expected {path!r} to hold a list of rows of equal length, each a list of token ids, as in "
                         "[[1, 5, 9], [1, 7, 2]].")
    return rows


def _doctor(args: argparse.Namespace) -> int:
    from depthpass.doctor import examine

    findings = examine(args.config)
    if args.form == "json":
        print(json.dumps([{"topic": f.topic, "result": f.result, "ok": f.ok} for f in findings], indent=2))
    else:
        marks = {True: "ok", False: "NO", None: "  "}
        print("\n".join(f"{marks[f.ok]}  {f.topic:<20} {f.result}" for f in findings))
    return 1 if any(f.ok is False for f in findings) else 0


def _calibrate(args: argparse.Namespace) -> int:
    from depthpass.analysis.roofline import ceilings

    found = ceilings(args.device, _dtype(args.dtype))
    data = json.dumps({name: value for name, value, _ in found.rows()}, indent=2)
    if args.out:
        _write(args.out, data + "\n")
    if args.form == "json":
        print(data)
    else:
        print("\n".join(f"{name:<12} {value if isinstance(value, str) else f'{value:.4g}'} {unit}".rstrip()
                        for name, value, unit in found.rows()))
    return 0


def _demo(args: argparse.Namespace) -> int:
    from depthpass.demo import run_demo

    return run_demo(steps=args.steps, group=args.group)


# What commands share.


def _subject(config: str | None) -> Any:
    from depthpass.report.subject import Subject

    return Subject.of(config)


def _options(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "seq_len": args.seq_len, "batch": args.batch, "chunk": getattr(args, "chunk", None), "cost": not args.no_cost,
        "ceilings": _ceilings(args.ceilings),
    }


def _passes(args: argparse.Namespace) -> list[Pass] | None:
    """The spec of --spec or --preset, with --group put in; None without either."""
    from depthpass.report.tables import with_group
    from depthpass.spec import load_spec

    group = args.group if isinstance(args.group, int) else None
    if args.spec is not None and args.preset is not None:
        raise SpecError("--preset: expected either --spec or --preset, got both.")
    if args.spec is None and args.preset is None:
        if group is not None:
            raise SpecError("--group: expected --spec or --preset beside it, got neither.")
        return None
    passes = list(load_spec(_preset(args.preset) if args.preset is not None else args.spec or ""))
    if group is None:
        return passes
    changed = with_group(passes, group)
    if not any(hasattr(p, "group") for p in passes):
        raise SpecError(f"--group: no pass of the spec has a group, got {', '.join(p.name for p in passes)}.")
    return changed


def _preset(name: str) -> Pass:
    from depthpass.passes.turboconn import PRESETS, TurboConn

    if name not in PRESETS:
        raise SpecError(f"--preset: expected one of {', '.join(PRESETS)}, got {name!r}.{did_you_mean(name, PRESETS)}")
    return TurboConn(preset=name)  # type: ignore[arg-type]


def _named_spec(text: str) -> Any:
    """A spec of ``compare``: stock, a preset, a file or YAML text."""
    from depthpass.passes.turboconn import PRESETS
    from depthpass.spec import load_spec

    if text == "stock":
        return None
    return load_spec(_preset(text) if text in PRESETS else text)


def _program_text(args: argparse.Namespace) -> str | None:
    if args.program is None:
        return None
    if args.spec is not None or args.preset is not None:
        raise SpecError("--program: expected a spec or a program, got both.")
    return _read(args.program, "program")


def _task(text: str | None) -> TaskDAG | None:
    if text is None:
        return None
    from depthpass.analysis.tasks import task

    name, _, sizes = text.partition(":")
    try:
        return task(name, *(int(s) for s in sizes.split(",") if s))
    except ValueError as error:
        if isinstance(error, DepthpassError):
            raise
        raise InputError(
            f"--task: expected NAME:SIZE such as parity:64 or edit_distance:30,30, got {text!r}."
        ) from None


def _ceilings(text: str | None) -> Ceilings | None:
    """A known device, a file written by ``calibrate``, or two numbers."""
    if text is None:
        return None
    from depthpass.analysis.roofline import Ceilings, assumed

    numbers = _numbers(text)
    if numbers is not None:
        return Ceilings("given", _dtype("bfloat16"), *numbers, source="given on the command line", assumed=True)
    if not text.endswith(".json"):
        return assumed(text)
    try:
        data = json.loads(_read(text, "ceilings"))
        return Ceilings(data["device"], _dtype(data["dtype"]), data["FLOP rate"], data["weight rate"], data["source"],
                        assumed=False)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise InputError(f"ceilings file {text!r}: expected what 'depthpass calibrate --out' writes, got "
                         f"{type(error).__name__}: {error}.") from None


def _numbers(text: str) -> tuple[float, float] | None:
    try:
        flops, rate = (float(part) for part in text.split(","))
    except ValueError:
        return None
    return flops, rate


def _dtype(name: str) -> Any:
    import torch

    known = ("bfloat16", "float16", "float32")
    if name not in known:
        raise InputError(f"dtype: expected one of {', '.join(known)}, got {name!r}.{did_you_mean(name, known)}")
    return getattr(torch, name)


def _read(path: str, what: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        folder = Path(path).parent
        near = did_you_mean(Path(path).name, [p.name for p in folder.iterdir()] if folder.is_dir() else [])
        raise InputError(f"{what} file {path!r} cannot be read: {reason}.{near}") from None


def _write(path: str, text: str) -> None:
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path!r} cannot be written: {error.strerror}.") from None


def _emit(made: Any, form: str | None) -> None:
    """Print a report or a table: a chosen form, rich text on a terminal, plain text elsewhere."""
    if form is not None:
        print(getattr(made, f"to_{form}")())
    elif sys.stdout.isatty():
        from rich.console import Console

        Console().print(made)
    else:
        print(made)


if __name__ == "__main__":
    sys.exit(main())
