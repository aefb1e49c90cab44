"""The error tree. Every message says what was expected, what was got and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DepthpassError(Exception):
    """Root of every error raised on purpose by depthpass."""


class SpecError(DepthpassError, ValueError):
    """A spec, or one of its fields, cannot be honoured."""


class CheckpointError(SpecError, OSError):
    """A saved model is damaged; the message names the file."""


class UnsupportedModelError(DepthpassError, NotImplementedError):
    """The model contains something depthpass cannot treat soundly."""


class VerifyError(DepthpassError, ValueError):
    """A program breaks a rule of the depth IR."""


class ParseError(VerifyError):
    """A program text cannot be read."""


class PassError(DepthpassError, ValueError):
    """A pass cannot be applied to this program."""


class InputError(DepthpassError, ValueError):
    """A call got inputs that the transformed model cannot honour."""


class CacheError(DepthpassError, ValueError):
    """A cache does not belong to this model, program or batch."""


class LoweringError(DepthpassError, RuntimeError):
    """A lowering that was asked for by name cannot run here."""


def did_you_mean(word: object, valid: Iterable[str]) -> str:
    """Return ``' Did you mean X?'`` for the nearest valid spelling, or an empty string."""
    near = difflib.get_close_matches(str(word), list(valid), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""
