"""Lossless self-speculation: a shallower program of the model drafts tokens, the whole program checks them in one chunk.

With p the model's distribution of a token and q the draft's, a drafted token x is kept with probability min(1, p(x) / q(x)); the
first that is not is drawn again from max(p - q, 0), normalised (arXiv 2211.17192). So every token is distributed as the model
alone would draw it, and greedy decoding gives the very tokens. Where both programs begin alike (a loop and fewer iterations of
it), the draft's keys and its last common stream are taken over, and the check runs the rest alone.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from depthpass.errors import CacheError
from depthpass.hf.caches.cache import DepthCache
from depthpass.hf.decoding.draft_gains import MOST, Gains
from depthpass.hf.decoding.draft_report import DraftReport
from depthpass.hf.decoding.draft_running import Runner, cropped
from depthpass.hf.decoding.drafts import ENTRY, Draft, draft_of
from depthpass.hf.decoding.own_decoding import check_combined, named, with_stop_strings
from depthpass.hf.decoding.tokens import Tokens, real_tokens
from depthpass.log import fallback

if TYPE_CHECKING:
    from depthpass_lowering.state import State


def draft_generate(model: Any, generate: Any, args: tuple, kwargs: dict[str, Any], cache: Any, spec: Any, tokens: Any) -> Any:
    """``generate`` with a draft.

    Args:
        generate: the stock method.
        spec, tokens: ``draft`` and ``draft_tokens``.

    Raises:
        InputError, CacheError: before anything runs.
    """
    kwargs = named(generate, args, kwargs)
    check_combined(model, kwargs, cache, tokens)
    kwargs = with_stop_strings(model, kwargs)
    draft, streamer = draft_of(model, spec), kwargs.get("streamer")
    report = DraftReport(shared=draft.rest is not None)

    def decode(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
        mask = real_tokens(model_kwargs, "draft")
        run = _Decoding(model, draft, tokens, logits_processor, stopping_criteria, generation_config, streamer, report)
        return run.decode(input_ids, mask)

    out = generate(model, custom_generate=decode, **kwargs)
    model._depth.drafted = report
    return out


class _Decoding(Tokens):
    """One call: the states of both programs, and how much to draft."""

    def __init__(self, model, draft: Draft, tokens, processors, criteria, config, streamer, report: DraftReport):
        super().__init__(processors, criteria, config, streamer)
        self.draft, self.run, self.tokens, self.report = draft, Runner(model), tokens, report
        self.room = config.max_length
        if tokens == "auto" and Gains(draft, None).hopeless:
            fallback(f"draft_tokens='auto' drafts nothing: a draft costs {draft.draft.cost} visits of {draft.model.cost}, which "
                     "would not pay if every token were kept", asked=True)

    def decode(self, ids: Tensor, mask: Tensor | None) -> Any:
        """What ``generate`` returns for ``[batch, prompt]``."""
        from depthpass_lowering.state import State

        self.mask = mask
        self.start(ids)
        self.gains = Gains(self.draft, self.room - ids.shape[1] - 1 if self.room is not None else None)
        self.whole: State = State(record=True)
        self.ahead: State = State(record=True)
        self.next(self._prompt()[:, -1])
        pause = 0
        while bool(self.running.any()):
            plain = pause > 0 or self._timing() or (self.tokens == "auto" and self.gains.idle)
            count = 0 if plain else self._count()
            started = time.perf_counter()
            before, spent = self.ids.shape[1], self.report.visits
            if count == 0:
                self._plain()
                took = time.perf_counter() - started
                self.report.plain_seconds = min(self.report.plain_seconds or took, took)
                pause -= 1
            else:
                self._round(count)
                self.report.seconds += time.perf_counter() - started
                self.report._drafted_tokens += self.ids.shape[1] - before
                self.gains.spend(self.report.visits - spent, self.ids.shape[1] - before)
                pause = self.gains.pause() if self.tokens == "auto" else 0
                if pause > 0:
                    fallback("draft_tokens='auto' decodes plainly for a while, because too few drafted tokens are kept; "
                             "model.depth_drafted tells how many", asked=False)
            self.report.chosen.append(count)
        self.report.tokens = self.ids.shape[1] - ids.shape[1]
        self.report.plain_visits = (self.report.tokens - 1) * self.draft.model.cost
        return self.outcome(self._cache())

    def _cache(self) -> DepthCache:
        """All tokens but the last, as plain decoding leaves them."""
        cache = DepthCache(self.run.model, record=True)
        cache.state = self.whole
        return cache

    def _timing(self) -> bool:
        """Whether a plain token is to be timed: the first one, and as that one is slow, in a long call the second one, too."""
        seen = len(self.report.chosen)
        return seen == 0 or (seen == 1 and self.tokens == "auto" and self.room is not None
                             and self.room - self.ids.shape[1] > 2 * MOST)

    def _count(self) -> int:
        """How many tokens to draft; no more than can still be used."""
        count = self.gains.best() if self.tokens == "auto" else self.tokens
        return min(count, max(self.room - self.ids.shape[1], 1)) if self.room is not None else count

    def _columns(self) -> Tensor | None:
        """Real tokens so far; what was decoded is real."""
        if self.mask is None:
            return None
        new = self.ids.shape[1] - self.mask.shape[1]
        return torch.cat((self.mask, self.mask.new_ones(len(self.mask), new)), 1) if new > 0 else self.mask

    def _mask_for(self, extra: int) -> Tensor | None:
        mask = self._columns()
        return mask if mask is None else torch.cat((mask, mask.new_ones(len(mask), extra)), 1)

    def _prompt(self) -> Tensor:
        """Run the prompt; logits of its last token."""
        rest = self.draft.rest
        if rest is None:
            streams, self.whole = self.run.advance(self.draft.model, self.ids, self._columns(), self.whole)
            return self.run.logits(streams, 1)
        streams, self.ahead = self.run.advance(self.draft.draft, self.ids, self._columns(), self.ahead)
        streams = self._check(self.ids, streams.get(ENTRY))
        return self.run.logits(streams, 1)

    def _check(self, ids: Tensor, entry: Tensor | None) -> dict[str, Tensor]:
        """The whole program on tokens that the draft's state already holds, from the draft's own stream."""
        rest = self.draft.rest
        assert rest is not None
        streams, state = self.run.advance(rest, ids, self._mask_for(ids.shape[1]), self._own(), entry)
        self.whole = self._with_draft(state)
        return streams

    def _own(self) -> State:
        """The whole program's state without what it takes over from the draft."""
        shared, lines = set(self.draft.slots.values()), set(self.draft.lines.values())
        return replace(self.whole, slots={k: s for k, s in self.whole.slots.items() if k not in shared},
                       lines={k: t for k, t in self.whole.lines.items() if k not in lines})

    def _with_draft(self, state: State) -> State:
        """A state with the draft's slots and lines in place of the same ones; no memory is taken twice."""
        held = self.ahead
        return replace(state, slots=state.slots | {there: held.slots[here] for here, there in self.draft.slots.items()
                                                   if here in held.slots},
                       lines=state.lines | {there: held.lines[here] for here, there in self.draft.lines.items()
                                            if here in held.lines})

    def _with_whole(self) -> State:
        """The draft's state, with the whole program's slots in place of the same ones."""
        held = self.whole
        return replace(self.ahead, slots=self.ahead.slots | {here: held.slots[there]
                                                             for here, there in self.draft.slots.items() if there in held.slots})

    def _plain(self) -> None:
        """One token by the whole program; the draft's state lags behind and catches up in its next chunk."""
        streams, self.whole = self.run.advance(self.draft.model, self.ids[:, self.whole.length :], self._columns(), self.whole)
        self.report.visits += self.draft.model.cost
        self.next(self.run.logits(streams, 1)[:, -1])

    def _round(self, count: int) -> None:
        """Draft ``count`` tokens, check them in one chunk, keep what the model agrees with."""
        before_whole, before_ahead, known = self.whole, self.ahead, self.ids.shape[1]
        row, guesses, chances, entries, processors = self.ids, [], [], [], self.drafting()
        for _ in range(count):
            fresh = row[:, self.ahead.length :]
            mask = self._mask_for(row.shape[1] - known)
            streams, self.ahead = self.run.advance(self.draft.draft, fresh, mask, self.ahead)
            guess, chance, _ = self.pick(self.run.logits(streams, 1)[:, -1], row, processors)
            guesses.append(self.padded(guess))
            chances.append(chance)
            entries.append(streams[ENTRY][:, -1:] if ENTRY in streams else None)
            row = torch.cat((row, guesses[-1][:, None]), 1)
        asked = row[:, before_whole.length : -1]
        if self.draft.rest is None:
            streams, self.whole = self.run.advance(self.draft.model, asked, self._mask_for(count - 1), self.whole)
            self.report.visits += self.draft.model.cost
            self.ahead = self._with_whole()
        else:
            entry = None if entries[0] is None else torch.cat(entries, 1)
            streams = self._check(asked, entry)
            self.report.visits += self.draft.rest.cost
        self.report.visits += count * self.draft.draft.cost
        self._judge(self.run.logits(streams, count), guesses, chances)
        # Of what both programs have run, the tokens that were kept and the one that asked for the first that was not.
        length = self.ids.shape[1] - 1
        self._take_back(before_whole, before_ahead, row[:, :length], length)

    def _judge(self, logits: Tensor, guesses: Sequence[Tensor], chances: Sequence[Tensor | None]) -> None:
        """Append drafted tokens while every row keeps them, and the model's own in place of the first that one does not.

        Rows go on together: the first token that any row does not keep ends the round for all. That is a stopping time of each
        row's own tokens, so what the others keep stays distributed as it should. So is a row's end: what follows it are pads,
        which were not drafted.
        """
        for i, guess in enumerate(guesses):
            live, raw = self.live, logits[:, i]
            scores = self.processors(self.ids, raw.clone())
            if not self.sample:
                own = scores.argmax(-1)
                agrees = own == guess
            else:
                own, agrees = _redrawn(torch.softmax(scores, -1), cast(Tensor, chances[i]), guess)
            self.report.drafted += int(live.sum())
            self.report.accepted += int((agrees & live).sum())
            self.gains.see(int((agrees & live).sum()), int(live.sum()))
            agrees = agrees | ~live
            self.append(torch.where(agrees, guess, own), raw, scores)
            if not bool(agrees.all()) or not torch.equal(self.live, live) or not bool(self.running.any()):
                return

    def _take_back(self, before_whole: State, before_ahead: State, row: Tensor, length: int) -> None:
        """Both states after ``length`` columns."""
        if self.whole.length == length == self.ahead.length:
            return
        try:
            whole, ahead = cropped(self.whole, length), cropped(self.ahead, length)
        except CacheError:
            # Routed slots hold what was routed to them: run the tokens that were kept again.
            mask = self._columns()
            _, ahead = self.run.advance(self.draft.draft, row[:, before_ahead.length :], mask, before_ahead)
            _, whole = self.run.advance(self.draft.model, row[:, before_whole.length :], mask, before_whole)
            self.report.visits += self.draft.draft.cost + self.draft.model.cost
        self.whole, self.ahead = whole, ahead
        if self.draft.rest is not None:
            self.whole = self._with_draft(self.whole)


def _redrawn(p: Tensor, q: Tensor, guess: Tensor) -> tuple[Tensor, Tensor]:
    """What to put in place of a drafted token, and whether it is kept.

    Args:
        p, q: the model's and the draft's distributions, ``[batch, vocabulary]``.
        guess: drawn from q, ``[batch]``.
    """
    at = guess[:, None]
    agrees = torch.rand(len(p), device=p.device, dtype=p.dtype) * q.gather(1, at)[:, 0] < p.gather(1, at)[:, 0]
    left = (p - q).clamp(min=0)
    # Nothing is left only where both are the same, and then the token is kept (but for rounding).
    left = torch.where(left.sum(-1, keepdim=True) > 0, left, p)
    return torch.multinomial(left, 1)[:, 0], agrees
