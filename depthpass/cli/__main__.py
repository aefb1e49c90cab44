"""``python -m depthpass.cli``."""

from depthpass.cli import command

command()
