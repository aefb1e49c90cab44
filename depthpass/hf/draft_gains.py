"""How many tokens are worth drafting."""

from __future__ import annotations

from depthpass.hf.drafts import Draft

MOST = 8
"""Tokens that are drafted at once at most with ``draft_tokens="auto"``."""
_PRIOR = (0.6, 1.5)
"""Acceptance that is assumed at first, and how many drafted tokens that assumption weighs."""
_PROBES = (4, 2)
"""Rounds of one drafted token, which cost next to nothing, before more are drafted: at first, and after a pause."""
_FORGET = 0.97
"""Weight of what was seen per round."""
_EXTRA = 0.04
"""What one more token of a chunk costs, of a chunk of one."""
_PAUSE = (16, 512)
"""Tokens decoded plainly before drafts that do not pay are tried again: at first, and at most."""


class Gains:
    """How many tokens are worth drafting: costs in visits, so that the choice is the same in every run."""

    def __init__(self, draft: Draft):
        self.draft = draft
        self.kept, self.seen = _PRIOR[0] * _PRIOR[1], _PRIOR[1]
        self.wait, self.probes = _PAUSE[0], _PROBES[0]

    def see(self, kept: int, seen: int) -> None:
        if seen:
            self.kept, self.seen = self.kept * _FORGET + kept / seen, self.seen * _FORGET + 1

    def gain(self, count: int, acceptance: float | None = None) -> float:
        """Visits of plain decoding over those of drafting so many, per token."""
        a, d = self.kept / self.seen if acceptance is None else acceptance, self.draft
        tokens = sum(a**i for i in range(count))
        check = (d.model if d.rest is None else d.rest).cost
        return d.model.cost * tokens / (count * d.draft.cost + check * (1 + _EXTRA * (count - 1)))

    @property
    def hopeless(self) -> bool:
        """Whether drafts would not pay if every token of them were kept."""
        return max(self.gain(count, 1.0) for count in range(1, MOST + 1)) <= 1

    def best(self) -> int:
        """How many to draft now."""
        return 1 if self.probes > 0 else self.most()

    def most(self) -> int:
        return max(range(1, MOST + 1), key=self.gain)

    def pause(self) -> int:
        """Tokens to decode plainly before the next draft."""
        self.probes -= 1
        if self.probes > 0:
            return 0
        if self.gain(self.most()) > 1.02:
            self.wait = _PAUSE[0]
            return 0
        now, self.wait, self.probes = self.wait, min(2 * self.wait, _PAUSE[1]), _PROBES[1]
        return now
