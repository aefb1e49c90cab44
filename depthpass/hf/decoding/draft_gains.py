"""How many tokens are worth drafting."""

from __future__ import annotations

from depthpass.hf.decoding.drafts import Draft

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
_TRIES = 0.045
"""Visits that tries may cost besides, of those that plain decoding of the whole call takes."""


class Gains:
    """How many tokens are worth drafting: costs in visits, so that the choice is the same in every run.

    Args:
        draft: the programs.
        tokens: that are to be decoded at most; None = nobody knows.
    """

    def __init__(self, draft: Draft, tokens: int | None):
        self.draft = draft
        self.budget = _TRIES * tokens * draft.model.cost if tokens is not None else float("inf")
        self.lost = 0
        self.dearest = draft.draft.cost + (draft.model if draft.rest is None else draft.rest).cost - draft.model.cost
        self.kept, self.seen = _PRIOR[0] * _PRIOR[1], _PRIOR[1]
        self.wait, self.probes = _PAUSE[0], _PROBES[0]

    def see(self, kept: int, seen: int) -> None:
        if seen:
            self.kept, self.seen = self.kept * _FORGET + kept / seen, self.seen * _FORGET + 1

    def spend(self, visits: int, tokens: int) -> None:
        """A round took so many visits for so many tokens."""
        lost = visits - tokens * self.draft.model.cost
        self.lost += lost
        self.dearest = max(self.dearest, lost) if self.probes > 0 else self.dearest

    @property
    def trying(self) -> bool:
        """Whether one more try is within what tries may cost."""
        return self.lost + self.dearest <= self.budget

    def gain(self, count: int, acceptance: float | None = None) -> float:
        """Visits of plain decoding over those of drafting so many, per token."""
        a, d = self.kept / self.seen if acceptance is None else acceptance, self.draft
        tokens = sum(a**i for i in range(count))
        check = (d.model if d.rest is None else d.rest).cost
        return d.model.cost * tokens / (count * d.draft.cost + check * (1 + _EXTRA * (count - 1)))

    @property
    def idle(self) -> bool:
        """Whether to decode plainly now: drafts cannot pay, or it is not known that they do and no try is left."""
        return self.hopeless or (self.probes > 0 and not self.trying)

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
        self.probes = self.probes - 1 if self.trying else 0
        if self.probes > 0:
            return 0
        if self.gain(self.most()) > 1.02:
            self.wait = _PAUSE[0]
            return 0
        now, self.wait, self.probes = self.wait, min(2 * self.wait, _PAUSE[1]), _PROBES[1]
        return now
