"""The command line ``depthpass``; ``depthpass --help`` lists its commands.

argparse, because the whole interface then needs nothing beyond the standard library, starts in the time that it takes to
import it, and refuses abbreviated options; shtab writes the shell completion from the same parser.

Exit codes: 0 done, 1 the answer is no (``doctor`` found a problem), 2 bad input; errors go to standard error.
"""

from __future__ import annotations

import atexit
import gc
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NoReturn

from depthpass.errors import DepthpassError


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: arguments without the program name; None = those of the process.

    Returns:
        The exit code.
    """
    _open_streams()
    try:
        from depthpass.cli.parser import parser

        args = parser().parse_args(argv)
        with _collecting(SELDOM if args.runs_models else NEVER):
            code = args.run(args)
        sys.stdout.flush()
        return code
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


def command() -> NoReturn:
    """:func:`main` as a process of its own.

    It ends without taking the modules of torch and transformers apart one by one, a quarter of the time of a report: functions
    registered with ``atexit`` run, what was printed is written, and the system takes the memory back.
    """
    _open_streams()
    if not sys.stderr.isatty():
        # Bars of transformers are for a terminal alone, as ours are.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    code = main()
    if any(not thread.daemon for thread in threading.enumerate() if thread is not threading.current_thread()):
        sys.exit(code)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # main has said so
            stream.flush()
    os._exit(code)


def _open_streams() -> None:
    """Give a process that was started with closed streams (``>&-``) some that take everything and hold nothing."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            # Closed when the process ends.
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


SELDOM, NEVER = 200_000, 0
"""New objects after which garbage is looked for. While torch and transformers are imported and a model is traced nearly all of
them stay, and looking at them again and again takes a tenth of a report's time; models that run leave garbage behind."""


@contextmanager
def _collecting(after: int) -> Iterator[None]:
    """Look for garbage after so many new objects."""
    before = gc.get_threshold()
    gc.set_threshold(after, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
