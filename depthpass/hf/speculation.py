"""Lossless self-speculation: a shallower program of the model drafts tokens, the whole program checks them in one chunk.

With p the model's distribution of a token and q the draft's, a drafted token x is kept with probability min(1, p(x) / q(x)); the
first that is not is drawn again from max(p - q, 0), normalised (arXiv 2211.17192). So every token is distributed as the model
alone would draw it, and greedy decoding gives the very tokens. Where both programs begin alike (a loop and fewer iterations of
it), the draft's keys and its last common stream are taken over, and the check runs the rest alone.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers.generation.utils import GenerateDecoderOnlyOutput

from depthpass.errors import CacheError, InputError
from depthpass.hf.cache import NAMES, DepthCache
from depthpass.hf.doors import call_names
from depthpass.hf.drafts import ENTRY, Draft, Part, draft_of
from depthpass.hf.head import apply_head, logits_of
from depthpass.hf.host import StockHost, depth_module
from depthpass.hf.inputs import normalise, warn_frozen
from depthpass.hf.placement import gather_new
from depthpass.hf.running import embedded
from depthpass.hf.tokens import Tokens
from depthpass.prompt import at_prompt

if TYPE_CHECKING:
    from depthpass_lowering.state import State

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


def check_draft(model: Any, args: tuple, kwargs: dict[str, Any], cache: Any, tokens: Any, who: str = "draft") -> None:
    """Refuse what a draft cannot be combined with, before anything runs; ``who`` is the argument that asks.

    Raises:
        InputError, CacheError: naming the argument.
    """
    if tokens != "auto" and (type(tokens) is not int or tokens < 1):
        raise InputError(f"draft_tokens: expected a number of at least 1 or 'auto', got {tokens!r}.")
    if cache is not None:
        raise CacheError(f"{who}: expected no cache of your own, got a {type(cache).__name__}. It keeps several states, which "
                         "are made afresh.")
    config = kwargs.get("generation_config", args[1] if len(args) > 1 else None) or model.generation_config
    for name, plain in (("num_beams", 1), ("use_cache", True), ("output_scores", False),
                        ("output_logits", False), ("output_attentions", False), ("output_hidden_states", False),
                        ("assistant_model", None), ("prompt_lookup_num_tokens", None), ("custom_generate", None),
                        ("inputs_embeds", None), ("prefill_chunk_size", None), ("guidance_scale", None),
                        ("penalty_alpha", None), ("constraints", None)):
        given = kwargs.get(name, getattr(config, name, None))
        if given not in (None, plain) and not (name == "guidance_scale" and given == 1):
            raise InputError(f"{who}: expected {name}={plain!r} beside it, got {given!r}. Leave one of them out.")


def draft_generate(model: Any, generate: Any, args: tuple, kwargs: dict[str, Any], cache: Any, spec: Any, tokens: Any) -> Any:
    """``generate`` with a draft.

    Args:
        generate: the stock method.
        spec, tokens: ``draft`` and ``draft_tokens``.

    Raises:
        InputError, CacheError: before anything runs.
    """
    check_draft(model, args, kwargs, cache, tokens)
    made = draft_of(model, spec)
    streamer = kwargs.pop("streamer", None)
    report = DraftReport(shared=made.rest is not None)

    def decode(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
        run = _Decoding(model, made, tokens, logits_processor, stopping_criteria, generation_config, streamer, report)
        sequences = run.decode(input_ids, model_kwargs)
        if streamer is not None:
            streamer.end()
        if not generation_config.return_dict_in_generate:
            return sequences
        return GenerateDecoderOnlyOutput(sequences=cast(Any, sequences))

    out = generate(model, *args, custom_generate=decode, **kwargs)
    model._depth.drafted = report
    return out


class _Runner:
    """Advances states of parts of a model's program."""

    def __init__(self, model: Any):
        self.model = model
        self.decoder = model.get_submodule(model._depth.decoder)
        self.names = call_names(type(self.decoder)._stock_class)
        self.captured: Any = None
        warn_frozen(model)
        gather_new(depth_module(model))

    def advance(self, part: Part, ids: Tensor, mask: Tensor | None, state: State, entry: Tensor | None = None):
        """Streams by name and the state behind some tokens.

        Args:
            ids: the new tokens, ``[batch, n]``.
            mask: real tokens, of this call's and earlier columns at least; None = all.
            entry: the stream that takes the embedding's place.
        """
        from depthpass_lowering.executors.eager import run

        model, end = self.model, state.length + ids.shape[1]
        cache = DepthCache(model, record=True)
        cache.state = state
        given: dict[str, Any] = {"input_ids": ids, "use_cache": True, NAMES[0]: cache}
        if mask is not None:
            given["attention_mask"] = mask[:, :end]
            if "position_ids" in self.names:
                given["position_ids"] = (mask[:, :end].long().cumsum(-1) - 1).clamp(min=0)[:, state.length :]
        call = normalise(model, self.decoder, self.names, given, None)
        captured = self.captured = model._captured(call, self.names)
        host = StockHost(model, captured, ())
        hidden, sides = embedded(model, host, call)
        rung = model._depth.lowering
        ran = run(part.schedule, host, hidden if entry is None else entry, sides, captured.side_axes, state, call.valid, True,
                  part.types, "auto" if rung in ("inductor", "cudagraph") else rung)
        return ran.streams, ran.state

    def logits(self, streams: dict[str, Tensor], last: int) -> Tensor:
        """Logits of the last so many tokens, in float32 as ``generate`` reads them."""
        normed = streams["output"][:, -last:]
        return logits_of(apply_head(self.model, self.captured, normed), "draft", "another model").to(torch.float32)


class _Decoding(Tokens):
    """One call: the states of both programs, and how much to draft."""

    def __init__(self, model, draft: Draft, tokens, processors, criteria, config, streamer, report: DraftReport):
        super().__init__(processors, criteria, config, streamer)
        self.draft, self.run, self.tokens, self.report = draft, _Runner(model), tokens, report
        self.room = config.max_length
        self.gains = _Gains(draft)

    def decode(self, ids: Tensor, given: dict[str, Any]) -> Tensor:
        """``[batch, prompt]`` -> ``[batch, prompt + new]``."""
        from depthpass_lowering.state import State

        mask = given.get("attention_mask")
        self.mask = mask if mask is not None and not bool(mask.all()) else None
        self.start(ids)
        self.whole: State = State(record=True)
        self.ahead: State = State(record=True)
        self.emit(self.pick(self._prompt()[:, -1], self.ids)[0][:, None])
        pause = 0
        while bool(self.running.any()):
            plain = pause > 0 or self.report.plain_seconds == 0.0 or (self.tokens == "auto" and self.gains.hopeless)
            count = 0 if plain else self._count()
            started = time.perf_counter()
            before = self.ids.shape[1]
            if count == 0:
                self._plain()
                took = time.perf_counter() - started
                self.report.plain_seconds = min(self.report.plain_seconds or took, took)
                pause -= 1
            else:
                self._round(count)
                self.report.seconds += time.perf_counter() - started
                self.report._drafted_tokens += self.ids.shape[1] - before
                pause = self.gains.pause() if self.tokens == "auto" else 0
            self.report.chosen.append(count)
        self.report.tokens = self.ids.shape[1] - ids.shape[1]
        self.report.plain_visits = (self.report.tokens - 1) * self.draft.model.cost
        return self.ids

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
        """A state with the draft's slots and lines in the place of the same ones; no memory is taken twice."""
        held = self.ahead
        return replace(state, slots=state.slots | {there: held.slots[here] for here, there in self.draft.slots.items()
                                                   if here in held.slots},
                       lines=state.lines | {there: held.lines[here] for here, there in self.draft.lines.items()
                                            if here in held.lines})

    def _with_whole(self) -> State:
        """The draft's state, with the whole program's slots in the place of the same ones."""
        held = self.whole
        return replace(self.ahead, slots=self.ahead.slots | {here: held.slots[there]
                                                             for here, there in self.draft.slots.items() if there in held.slots})

    def _plain(self) -> None:
        """One token by the whole program; the draft's state lags behind and catches up in its next chunk."""
        streams, self.whole = self.run.advance(self.draft.model, self.ids[:, self.whole.length :], self._columns(), self.whole)
        self.report.visits += self.draft.model.cost
        self.emit(self.pick(self.run.logits(streams, 1)[:, -1], self.ids)[0][:, None])

    def _round(self, count: int) -> None:
        """Draft ``count`` tokens, check them in one chunk, keep what the model agrees with."""
        before_whole, before_ahead, known = self.whole, self.ahead, self.ids.shape[1]
        row, guesses, chances, entries = self.ids, [], [], []
        for _ in range(count):
            fresh = row[:, self.ahead.length :]
            mask = self._mask_for(row.shape[1] - known)
            streams, self.ahead = self.run.advance(self.draft.draft, fresh, mask, self.ahead)
            guess, chance = self.pick(self.run.logits(streams, 1)[:, -1], row)
            guesses.append(guess)
            chances.append(chance)
            entries.append(streams[ENTRY][:, -1:] if ENTRY in streams else None)
            row = torch.cat((row, guess[:, None]), 1)
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
        logits = self.run.logits(streams, count)
        taken, tokens = self._judge(logits, row, known, guesses, chances)
        # Of what both programs have run, the tokens that were kept and the one that asked for the first that was not.
        length = known + min(taken, count - 1)
        self._take_back(before_whole, before_ahead, row[:, :length], length)
        self.emit(tokens)

    def _judge(self, logits: Tensor, row: Tensor, known: int, guesses: Sequence[Tensor], chances: Sequence[Tensor | None]):
        """How many drafted tokens every row keeps, and the tokens that follow: those, and the model's own for the next.

        Rows go on together: the first token that any row does not keep ends the round for all. That is a stopping time of each
        row's own tokens, so what the others keep stays distributed as it should.
        """
        kept: list[Tensor] = []
        for i, guess in enumerate(guesses):
            scores = self.processors(row[:, : known + i], logits[:, i])
            if not self.sample:
                own = scores.argmax(-1)
                agrees = own == guess
            else:
                own, agrees = _redrawn(torch.softmax(scores, -1), cast(Tensor, chances[i]), guess)
            agrees = agrees | ~self.running
            live = self.running
            self.report.drafted += int(live.sum())
            self.report.accepted += int((agrees & live).sum())
            self.gains.see(int((agrees & live).sum()), int(live.sum()))
            kept.append(torch.where(agrees, guess, own))
            if not bool(agrees.all()):
                return i, torch.stack(kept, 1)
        return len(guesses), torch.stack(kept, 1)

    def _take_back(self, before_whole: State, before_ahead: State, row: Tensor, length: int) -> None:
        """Both states after ``length`` columns."""
        if self.whole.length == length == self.ahead.length:
            return
        try:
            whole, ahead = _cropped(self.whole, length), _cropped(self.ahead, length)
        except CacheError:
            # Routed slots hold what was routed to them: run the tokens that were kept again.
            mask = self._mask_for(length - self.ids.shape[1])
            _, ahead = self.run.advance(self.draft.draft, row[:, before_ahead.length :], mask, before_ahead)
            _, whole = self.run.advance(self.draft.model, row[:, before_whole.length :], mask, before_whole)
            self.report.visits += self.draft.draft.cost + self.draft.model.cost
        self.whole, self.ahead = whole, ahead
        if self.draft.rest is not None:
            self.whole = self._with_draft(self.whole)


def _redrawn(p: Tensor, q: Tensor, guess: Tensor) -> tuple[Tensor, Tensor]:
    """What to put in the place of a drafted token, and whether it is kept.

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


def _cropped(state: State, length: int) -> State:
    """A state after its first columns, which grows again in the memory it has.

    Only for states whose later columns nobody reads any more.
    """
    from depthpass_lowering.state import Place, crop

    if state.length == length:
        return state
    made = crop(state, length)
    for number, slot in made.slots.items():
        places = state.slots[number].places
        if places is None or any(p is None for p in places):
            continue
        drop = state.length - length
        ends = tuple(Place(p.room, p.end - drop) for p in places if p is not None)
        for place in ends:
            place.room.used = min(place.room.used, place.end)
        made.slots[number] = replace(slot, places=ends)
    return made


class _Gains:
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
