"""The command line ``depthpass``; ``depthpass --help`` lists its commands.

argparse, because the whole interface then needs nothing beyond the standard library, starts in the time that it takes to
import it, and refuses abbreviated options; shtab writes the shell completion from the same parser.

Exit codes: 0 done, 1 the answer is no (``doctor`` found a problem), 2 bad input; errors go to standard error.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from depthpass.errors import DepthpassError


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: arguments without the program name; None = those of the process.

    Returns:
        The exit code.
    """
    from depthpass.cli.parser import parser

    try:
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
