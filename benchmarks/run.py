"""The one benchmark runner.

    python benchmarks/run.py list
    python benchmarks/run.py NAME [--repeat 5] [--warmup 1] [--tiny] [--only PART,...] [--memory]
                                  [--json out.json] [--markdown out.md] [--plot out.png] [settings of NAME]

Each benchmark is a file of benchmarks/suite: settings, variants, floors, oracles. Before a variant is timed its outputs, and in
training every gradient, are held against its oracle; if they are off it is not timed, and the exit status is 1. Timings are
pairs with the baseline, whose order alternates: medians and ranges of the ratio of a pair. What decides a result on a CPU is
printed first: load, threads, allocator, the library that multiplies, its rate at the row counts of a chunk, plain and packed,
and beside each row how many products it really made of each kind. `--tiny` takes seconds and means nothing but that it runs.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [p for p in (str(HERE),) if p not in sys.path]

import torch  # noqa: E402
from conditions import observe  # noqa: E402
from declare import Benchmark, Setting  # noqa: E402
from results import Report  # noqa: E402
from runner import Options, answer_child, measure, say  # noqa: E402


def names() -> list[str]:
    return sorted(p.stem for p in (HERE / "suite").glob("*.py"))


def load(name: str) -> tuple[Benchmark, str]:
    """A benchmark and its description."""
    module = importlib.import_module(f"suite.{name}")
    return module.BENCHMARK, module.__doc__ or ""


def parser_of(name: str, benchmark: Benchmark, description: str) -> argparse.ArgumentParser:
    """Common options and the benchmark's settings."""
    parser = argparse.ArgumentParser(
        prog=f"run.py {name}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeat", type=_positive, help="pairs of each variant (5; tiny: 1)")
    parser.add_argument("--warmup", type=_positive, help="calls before the first pair (2; tiny: 1)")
    parser.add_argument("--tiny", action="store_true", help="smallest sizes, to see that it runs")
    parser.add_argument("--only", help=f"comma-separated parts of {', '.join(benchmark.parts)}")
    parser.add_argument("--memory", action="store_true", help="peak memory of each row as well (Linux, CPU)")
    parser.add_argument("--json", help="file for all numbers")
    parser.add_argument("--markdown", help="file for the tables")
    parser.add_argument("--plot", help="file for a picture of the ratios")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    for s in benchmark.settings:
        _add(parser, s)
    return parser


def _add(parser: argparse.ArgumentParser, s: Setting) -> None:
    option = "--" + s.name.replace("_", "-")
    shown = ",".join(map(str, s.value)) if isinstance(s.value, tuple) else s.value
    text = f"{s.help} ({shown})".strip()
    if isinstance(s.value, bool):
        parser.add_argument(option, action=argparse.BooleanOptionalAction, default=None, help=text)
    elif isinstance(s.value, tuple):
        kind = type(s.value[0])
        parser.add_argument(option, type=lambda t: _several(t, kind, s.choices), help=text)
    else:
        parser.add_argument(option, type=type(s.value), choices=s.choices or None, help=text)


def _several(text: str, kind: type, choices: tuple) -> tuple:
    try:
        values = tuple(kind(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected {kind.__name__} values as a,b,c, got {text!r}") from error
    if unknown := [v for v in values if choices and v not in choices]:
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(map(str, choices))}, got {unknown[0]}")
    return values


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return int(text)


def settings(args: argparse.Namespace, benchmark: Benchmark) -> argparse.Namespace:
    """Values given, else tiny ones, else the usual ones."""
    chosen = {}
    for s in benchmark.settings:
        given = getattr(args, s.name)
        chosen[s.name] = given if given is not None else s.tiny if args.tiny and s.tiny is not None else s.value
    return argparse.Namespace(**chosen, tiny=args.tiny)


def run(name: str, argv: list[str]) -> int:
    benchmark, description = load(name)
    parser = parser_of(name, benchmark, description)
    args = parser.parse_args(argv)
    wanted = args.only.split(",") if args.only else list(benchmark.parts)
    if unknown := [p for p in wanted if p not in benchmark.parts]:
        parser.error(f"--only: unknown {', '.join(unknown)}; choose from {', '.join(benchmark.parts)}")
    chosen = settings(args, benchmark)
    device = getattr(chosen, "device", "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA device")
    if args.memory and not Path("/proc/self/clear_refs").exists():
        parser.error("--memory: peaks are read from Linux's /proc")
    child = None if args.tiny else [sys.executable, str(Path(__file__).resolve()), name, *argv, "--child"]
    options = Options(
        args.repeat or (1 if args.tiny else 5), args.warmup or (1 if args.tiny else 2), args.memory, device, child,
    )
    if args.child:
        return _as_child(benchmark, chosen, options, args.child)
    shown = {k: v for k, v in vars(chosen).items() if k != "tiny"} | {"repeat": options.repeat}
    dtype = getattr(torch, getattr(chosen, "dtype", "float32"))
    report = Report(name, shown, observe(
        device, dtype, benchmark.products(chosen), options.warmup, 0.002 if args.tiny else 0.2
    ))
    if report.conditions.warning:
        say(report.conditions.warning)
    print(report.head(), flush=True)
    for m in benchmark.measurements(chosen):
        if m.part in wanted:
            report.results.append(measure(m, options))
            print(report.results[-1].markdown() + "\n", flush=True)
            report.write(args.json, args.markdown, args.plot)
    for row in report.failed:
        say(f"FAILED {row.label}: {row.failed}")
    return 1 if report.failed else 0


def _as_child(benchmark: Benchmark, chosen: argparse.Namespace, options: Options, asked: str) -> int:
    part, title, label, what = json.loads(asked)
    for m in benchmark.measurements(chosen):
        if (m.part, m.title) == (part, title):
            answer_child(m, label, what, options)
            return 0
    raise ValueError(f"there is no measurement {title!r}")


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["list"]:
        for name in names():
            benchmark, description = load(name)
            print(f"{name:14} {description.splitlines()[0]} [{', '.join(benchmark.parts)}]")
        return 0
    if not argv or argv[0] not in names():
        print(__doc__)
        print(f"expected list or one of {', '.join(names())}, got {argv[0] if argv else 'nothing'}", file=sys.stderr)
        return 2
    return run(argv[0], argv[1:])


if __name__ == "__main__":
    sys.exit(main())
