"""``python -m depthpass``: the command."""

from depthpass.cli import command

command()
