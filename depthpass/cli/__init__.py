"""The command line ``depthpass``; ``depthpass --help`` lists its commands.

argparse, because the whole interface then needs nothing beyond the standard library, starts in the time that it takes to
import it, and refuses abbreviated options; shtab writes the shell completion from the same parser.

Exit codes: 0 done, 1 the answer is no (``doctor`` found a problem), 2 bad input; errors go to standard error.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from depthpass.errors import DepthpassError


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: arguments without the program name; None = those of the process.

    Returns:
        The exit code.
    """
    try:
        with _few_collections():
            from depthpass.cli.parser import parser

            args = parser().parse_args(argv)
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


@contextmanager
def _few_collections() -> Iterator[None]:
    """Look for garbage seldom: while torch and transformers are imported nearly everything stays, and looking at it again and
    again takes an eighth of a report's time."""
    before = gc.get_threshold()
    gc.set_threshold(200_000, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
