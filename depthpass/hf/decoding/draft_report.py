"""What self-speculation did, in numbers."""

from __future__ import annotations

from dataclasses import dataclass, field

from depthpass.prompt import at_prompt


@at_prompt
@dataclass
class DraftReport:
    """What a call of ``generate`` with a draft did.

    Attributes:
        tokens: decoded per row (behind the prompt, the row's first token included).
        drafted, accepted: tokens that the draft gave, and of those the ones that were kept, over all rows.
        visits: visits of the calls behind the prompt; a chunk counts as one token, as its weights are read once.
        plain_visits: those of plain decoding for the same tokens.
        seconds: wall time of drafting and checking; ``plain_seconds`` of one token decoded plainly, as measured here.
        chosen: how many tokens were drafted in each round; 0 = decoded plainly.
        shared: whether the check started from the draft's own stream.
    """

    tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    visits: int = 0
    plain_visits: int = 0
    seconds: float = 0.0
    plain_seconds: float = 0.0
    chosen: list[int] = field(default_factory=list)
    shared: bool = False
    _drafted_tokens: int = field(default=0, repr=False)

    @property
    def acceptance(self) -> float:
        """Share of drafted tokens that were kept."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def visits_per_token(self) -> float:
        return self.visits / max(self.tokens - 1, 1)

    @property
    def time_ratio(self) -> float:
        """Time of a token with drafts over that of one decoded plainly; below 1 is faster."""
        if not self._drafted_tokens or not self.plain_seconds:
            return 1.0
        return self.seconds / self._drafted_tokens / self.plain_seconds

    def __str__(self) -> str:
        return (f"{self.tokens} tokens: {self.acceptance:.0%} of {self.drafted} drafted tokens kept, "
                f"{self.visits_per_token:.1f} visits per token (plain {self.plain_visits / max(self.tokens - 1, 1):.1f}), "
                f"time ratio {self.time_ratio:.2f}")
