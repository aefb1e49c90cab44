"""Rows of one batch with loop counts of their own, decoded together: every iteration runs on the rows that still take it.

The programs of the counts that occur begin alike and end alike. So they are cut where they part: the first piece and the last
one run on all rows, what lies between two counts on the rows with at least the larger one. Rows are ordered by their counts,
so those are always the first ones, and no key is copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from depthpass.errors import DepthpassError, InputError
from depthpass.hf.caches.cache import NAMES, DepthCache
from depthpass.hf.calls.doors import call_names
from depthpass.hf.calls.head import apply_head, logits_of
from depthpass.hf.calls.host import StockHost, depth_module
from depthpass.hf.calls.inputs import normalise, warn_frozen
from depthpass.hf.calls.running import embedded
from depthpass.hf.decoding.drafts import Part, common
from depthpass.hf.decoding.own_decoding import check_combined, named, with_stop_strings
from depthpass.hf.decoding.tokens import Tokens, real_tokens
from depthpass.hf.modules.placement import gather_new
from depthpass.hf.switching.loops import loop_of
from depthpass.ir.program import Op, Program, op
from depthpass.ir.verify import Type, infer, verify
from depthpass.plan import Plan

if TYPE_CHECKING:
    from depthpass_lowering.state import State

_ASIDE = ("embed", "tap", "loss", "average", "retire")


@dataclass(frozen=True)
class Ladder:
    """Programs of several loop counts, cut where they part.

    Attributes:
        first, last: what all rows run.
        steps: what rows with at least the count of the same place in ``counts`` run besides.
        counts: of iterations, ascending; the smallest needs no step.
    """

    first: Part
    steps: tuple[Part, ...]
    last: Part
    counts: tuple[int, ...]

    def visits(self, rows: Sequence[int]) -> int:
        """Visits of one token of every row."""
        outer = self.first.cost + self.last.cost
        return sum(outer + sum(s.cost for s, c in zip(self.steps, self.counts) if n >= c) for n in rows)


def ladder_of(model: Any, counts: Sequence[int]) -> Ladder:
    """Cut the programs of the counts.

    Raises:
        InputError: the spec in force has no one loop, or its iterations are not a chain of one stream.
    """
    plans = model._depth.plans
    passes = list(plans.current.passes)
    try:
        at = loop_of(passes, None, "generate", scoped=False)
        variants: list[Plan] = []
        for count in counts:
            some = list(passes)
            some[at] = passes[at].with_loops(count)
            variants.append(plans.of(model, some, None))
    except DepthpassError as error:
        raise InputError(f"loops={list(counts)}: {error}") from error
    programs = [p.program for p in variants]
    for program in programs:
        if bad := next((o.kind for o in program if o.kind in ("delay", "route", "noise", "pad", "select", "ffn")), None):
            raise _unfit(f"{bad} of {plans.current.passes[at].label}")
    return cut(programs, tuple(counts))


def _unfit(what: str) -> InputError:
    return InputError("loops: rows of one batch can have counts of their own where iterations hand on one stream and read their "
                      f"own keys (plain loops, ILR, per-iteration LoRA and timesteps), got {what}. Decode rows of equal counts "
                      "together, with dp.using.")


def cut(programs: Sequence[Program], counts: tuple[int, ...]) -> Ladder:
    """Cut programs of ascending counts into a ladder.

    Raises:
        InputError: they do not begin and end alike around one stream.
    """
    taken: set[str] = set()  # values of the present program that the ones before it have computed
    pieces: list[Program] = []
    entry = programs[0].entry
    ending: list[Op] | None = None
    for program, after in zip(programs, (*programs[1:], None)):
        body = [o for o in program if o.kind not in _ASIDE and o.name not in taken]
        if after is not None:
            twins, _, _ = common(after, program)
            inside = [o for o in body if o.name in twins]
        elif ending is None:  # one count for all rows: cut behind the last visit
            twins, inside = {}, body[: max(i for i, o in enumerate(body) if o.kind == "block") + 1]
        else:
            twins, inside = {}, body[: len(body) - len(ending)]
        rest = body[len(inside) :]
        names = {o.name for o in rest}
        exits = dict.fromkeys(a for o in rest for a in o.args if a not in names)
        if len(exits) != 1 or [o for o in body if o in inside] != inside or (ending is not None and not _alike(ending, rest)):
            raise _unfit("iterations that read more than the one before, or an end that depends on their number")
        (left,) = exits
        if ending is None:
            ending, last = rest, _piece(program, left, rest)
        pieces.append(_piece(program, entry, [*inside, op("output", left)]))
        if after is not None:
            taken = {twins[o.name] for o in program if o.name in twins}
            entry = twins[left]
    first, *steps = [Part.of(p) for p in pieces]
    return Ladder(first, tuple(steps), Part.of(last), counts[1:])


def _piece(program: Program, entry: str, ops: list[Op]) -> Program:
    """Ops on the stream ``entry``, which takes the place of the embedding.

    Raises:
        InputError: they read more.
    """
    piece = replace(program, ops=(op("embed", name=entry), *ops))
    if any(a not in piece.defs for o in ops for a in o.args):
        raise _unfit("iterations that read more than one stream")
    try:
        if infer(piece)[piece.output] != Type(program.width):
            raise _unfit("a stream that not every token has")
        return verify(piece)
    except DepthpassError as error:
        if isinstance(error, InputError):
            raise
        raise _unfit(f"iterations that read more than one stream ({error})") from error


def _alike(one: Sequence[Op], other: Sequence[Op]) -> bool:
    """Whether ops compute the same on what enters them; slots may have other numbers."""
    if len(one) != len(other):
        return False
    names: dict[str, str] = {}
    for a, b in zip(one, other):
        attrs = [tuple((k, v) for k, v in o.attrs if k != "slot") for o in (a, b)]
        if a.kind != b.kind or attrs[0] != attrs[1] or len(a.args) != len(b.args):
            return False
        if any(names.setdefault(x, y) != y for x, y in zip(a.args, b.args)):
            return False
        if a.name:
            names[a.name] = b.name
    return True


def rows_generate(model: Any, generate: Any, args: tuple, kwargs: dict[str, Any], cache: Any, loops: Any) -> Any:
    """``generate`` with a loop count for every row.

    Raises:
        InputError: before anything runs.
    """
    kwargs = named(generate, args, kwargs)
    check_combined(model, kwargs, cache, "auto", "loops")
    kwargs = with_stop_strings(model, kwargs)
    if isinstance(loops, Tensor):
        loops = loops.tolist()
    if not isinstance(loops, Sequence) or isinstance(loops, str) or any(type(n) is not int or n < 1 for n in loops):
        raise InputError(f"loops: expected one number of at least 1 for every row, got {loops!r}.")
    ladder, streamer = ladder_of(model, sorted(set(loops))), kwargs.get("streamer")

    def decode(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
        if len(loops) != len(input_ids):
            raise InputError(f"loops: expected a number for each of {len(input_ids)} rows, got {len(loops)}.")
        mask = real_tokens(model_kwargs, "loops")
        run = _Rows(model, ladder, loops, logits_processor, stopping_criteria, generation_config, streamer)
        return run.decode(input_ids, mask)

    return generate(model, custom_generate=decode, **kwargs)


class _Rows(Tokens):
    """One call: a state for each piece of a ladder."""

    def __init__(self, model, ladder: Ladder, loops: Sequence[int], processors, criteria, config, streamer):
        super().__init__(processors, criteria, config, streamer)
        from depthpass_lowering.state import State

        self.model, self.ladder = model, ladder
        self.decoder = model.get_submodule(model._depth.decoder)
        self.names = call_names(type(self.decoder)._stock_class)
        counts = torch.tensor(loops)
        self.order = torch.argsort(counts, descending=True, stable=True)
        self.back = torch.argsort(self.order)
        self.takes = [int((counts >= c).sum()) for c in ladder.counts]
        self.states: list[State] = [State() for _ in range(len(ladder.steps) + 2)]
        warn_frozen(model)
        gather_new(depth_module(model))

    def decode(self, ids: Tensor, mask: Tensor | None) -> Any:
        """What ``generate`` returns for ``[batch, prompt]``; no cache, for the rows have several."""
        self.start(ids)
        self.order, self.back = self.order.to(ids.device), self.back.to(ids.device)
        mask = None if mask is None else mask[self.order]
        fresh = ids
        while bool(self.running.any()):
            logits = self._advance(fresh[self.order], mask)[self.back]
            self.next(logits)
            fresh = self.ids[:, -1:]
            mask = mask if mask is None else torch.cat((mask, mask.new_ones(len(mask), 1)), 1)
        return self.outcome(None)

    def _advance(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Logits of the last token of every row, in the order of the counts."""
        from depthpass_lowering.executors.eager import run

        model, ladder, past = self.model, self.ladder, self.states[0].length
        cache = DepthCache(model)
        cache.state = self.states[0]
        given: dict[str, Any] = {"input_ids": ids, "use_cache": True, NAMES[0]: cache}
        if mask is not None:
            given["attention_mask"] = mask
            if "position_ids" in self.names:
                given["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, past:]
        call = normalise(model, self.decoder, self.names, given, None)
        captured = model._captured(call, self.names)
        call_host = StockHost(model, captured, ())
        x, side_inputs = embedded(model, call_host, call)
        rung = model._depth.lowering
        rung = "auto" if rung in ("inductor", "cudagraph") else rung
        parts = (ladder.first, *ladder.steps, ladder.last)
        for place, (part, count) in enumerate(zip(parts, (len(ids), *self.takes, len(ids)))):
            host, mine, valid = call_host, side_inputs, call.valid
            if count < len(ids):
                rows = torch.arange(count, device=ids.device)
                host = StockHost(model, captured, ())
                host.live, host.counts = call_host.live and call_host.live.of_rows(rows), call_host.counts
                mine = [s[:count] if axis and s.shape[0] == len(ids) else s for s, axis in zip(side_inputs, captured.side_axes)]
                host.extras = mine
                valid = None if valid is None else valid[:count]
            ran = run(part.schedule, host, x[:count], mine, captured.side_axes, self.states[place], valid, True, part.types, rung)
            self.states[place] = ran.state
            y = ran.streams["output"]
            x = y if count == len(ids) else torch.cat((y, x[count:]))
        return logits_of(apply_head(model, captured, x[:, -1:]), "loops", "dp.using")[:, -1].to(torch.float32)
