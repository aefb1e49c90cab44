"""What ran a serial region in a call."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Lowered:
    """How one serial region was run in one call.

    Attributes:
        blocks: physical blocks of the region's visits.
        tokens, chunk: new columns of the call, and how many ran at once.
        rung: rung of the ladder that ran it: ``eager``, ``scheduled``, ``inductor`` or ``cudagraph``.
        reason: why it was not a higher rung, where the model asks for one; None = it is what was asked for.
        padded: columns of nobody that the rung put behind the rows, so that rows of similar length share one recording.
        recomputed: whether activations are computed again in the backward pass (gradient checkpointing).
    """

    blocks: tuple[int, ...]
    tokens: int
    chunk: int
    rung: str
    reason: str | None = None
    padded: int = 0
    recomputed: bool = False

    def __str__(self) -> str:
        text = f"blocks {', '.join(map(str, self.blocks))}: {self.tokens} tokens in chunks of {self.chunk}, rung {self.rung!r}"
        text += f", {self.padded} columns of padding" if self.padded else ""
        text += ", activations recomputed" if self.recomputed else ""
        return text + (f" ({self.reason})" if self.reason else "")
