"""The checks of decoding: several calls on one cache, and the ways of ``generate``."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import depthpass as dp
from depthpass.fuzz import models
from depthpass.fuzz.specs import LOOPED, MASK, Case
from depthpass.fuzz.subject import Mismatch, Subject


class Decoding(Subject):
    """What goes on from a cache."""

    def calls(self, check: Case) -> None:
        """The rows in several calls on one cache, and what generation does to a cache between them."""
        if self.case["side"] == "right":
            return
        lot = random.Random(check["lot"])
        state = _Calls(list(self.rows), [(len(r),) for r in self.rows], max(map(len, self.rows)))
        state.cache = dp.DepthCache(self.model, record="crop" in check["events"])
        out = self.call(self.batch(state.rows), past_key_values=state.cache, use_cache=True)
        self.last(out.logits, state)
        for size, event in zip(check["sizes"], check["events"], strict=True):
            if event is not None:
                getattr(state, event)(lot)
            new = torch.randint(models.FIRST_TOKEN, models.VOCABULARY, (len(state.rows), size),
                                generator=torch.Generator().manual_seed(lot.randrange(10**6)))
            state.rows = [torch.cat(pair) for pair in zip(state.rows, new, strict=True)]
            state.history, state.width = [(*h, size) for h in state.history], state.width + size
            batch = self.batch(state.rows, width=state.width)
            batch = {k: v if k == "attention_mask" else v[:, -size:] for k, v in batch.items()}
            out = self.call(batch, past_key_values=state.cache, use_cache=True)
            self.last(out.logits, state)

    def last(self, logits: Tensor, state: _Calls) -> None:
        """The logits of the newest call, right-aligned in every row."""
        for r, row in enumerate(state.rows):
            history = state.history[r]
            count = min(logits.shape[1], history[-1])
            sizes = history if self.model.depth_program.reads_calls else ()
            want = self.want(row, self.start(state.rows, r, state.width), history[0], sizes)["logits"]
            self.same(f"call {len(history)} of row {r}", logits[r, -count:], want[-count:])

    def generate(self, check: Case) -> None:
        if self.case["side"] == "right":
            return
        prompts, width = self._prompts()
        options = {"max_new_tokens": check["new"], "num_beams": check["beams"], "do_sample": False, "eos_token_id": None,
                   "return_dict_in_generate": True, "output_logits": True}
        out = self.model.generate(**prompts, **options)
        logits = torch.stack(out.logits, 1)
        calls = self.model.depth_program.reads_calls
        if check["beams"] == 1:
            for r, row in enumerate(self.rows):
                whole = torch.cat((row, out.sequences[r, width:]))
                history = (len(row), *[1] * (check["new"] - 1)) if calls else ()
                # generate numbers real tokens, and hands out float32.
                want = self.want(whole[:-1], 0, len(row), history)["logits"]
                self.same(f"generated logits of row {r}", logits[r], want[-check["new"] :])
        if not calls:
            again = self.model.generate(**prompts, **options, use_cache=False)
            if not torch.equal(out.sequences, again.sequences):
                raise Mismatch(f"generated {out.sequences.tolist()}, without a cache {again.sequences.tolist()}")
            self.same("logits without a cache", logits, torch.stack(again.logits, 1))

    def _prompts(self) -> tuple[dict[str, Any], int]:
        given: dict[str, Any] = {k: v for k, v in self.batch(self.rows, True).items() if k != "position_ids"}
        return given, given["input_ids"].shape[1]

    def drafted(self, check: Case) -> None:
        """A draft of fewer iterations gives the very tokens."""
        self._greedy(check["new"], draft="loop:1", draft_tokens=check["tokens"])

    def assisted(self, check: Case) -> None:
        """So does a model of its own."""
        self._greedy(check["new"], assistant_model=self.stock)

    def row_loops(self, check: Case) -> None:
        """Every row with a loop count of its own."""
        passes = list(self.model._depth.plan.passes)
        at = next(i for i, p in enumerate(passes) if p.name in LOOPED)
        texts = [self.written([*passes[:at], passes[at].with_loops(n), *passes[at + 1 :]]) for n in check["counts"]]
        self._greedy(check["new"], texts, loops=check["counts"])

    def _greedy(self, new: int, texts: Sequence[str | None] | None = None, **options: Any) -> None:
        """Every token that is decoded is one that the oracle finds likeliest."""
        if self.case["side"] == "right":
            return
        given, width = self._prompts()
        if "assistant_model" in options:  # takes one row
            given = {"input_ids": self.rows[0][None], "attention_mask": torch.ones(1, len(self.rows[0]), dtype=torch.long)}
            width = len(self.rows[0])
        ids = self.model.generate(**given, **options, max_new_tokens=new, do_sample=False, eos_token_id=None)
        for r, row in enumerate(ids):
            whole = torch.cat((self.rows[r], row[width:]))
            want = self.want(whole[:-1], 0, len(self.rows[r]), text=texts[r] if texts else None)["logits"][-new:]
            chosen = want.gather(1, row[width:, None])[:, 0]
            if bool((chosen < want.amax(1) - 1e-5 * want.abs().amax()).any()):
                raise Mismatch(f"row {r} goes on with {row[width:].tolist()}, the oracle with {want.argmax(1).tolist()}")

    def residual(self, check: Case) -> None:
        """A cache that keeps later visits' keys in few bits: exact within a call, rounded as said between calls."""
        rows = [row[: min(map(len, self.rows))] for row in self.rows]
        if self.case["side"] == "right" or self.model.depth_program.reads_calls:
            return
        cache = dp.DepthCache(self.model, residual_bits=check["bits"])
        generator = torch.Generator().manual_seed(self.case["seed"])
        history, prompt = [], len(rows[0])
        for size in (prompt, *check["sizes"]):
            if history:
                new = torch.randint(models.FIRST_TOKEN, models.VOCABULARY, (len(rows), size), generator=generator)
                rows = [torch.cat(pair) for pair in zip(rows, new, strict=True)]
            history.append(size)
            ids = torch.stack(rows)[:, -size:]
            out = self.call({"input_ids": ids}, past_key_values=cache, use_cache=True)
            for r, row in enumerate(rows):
                want = self.want(row, 0, prompt, history, bits=check["bits"])["logits"]
                # A difference halfway between two steps may fall the other way.
                self.same(f"call {len(history)} of row {r}", out.logits[r], want[-size:], 10 * self.limit)

    def denoise(self, check: Case) -> None:
        """Masks are filled in at the places and with the tokens that the oracle's whole rows say."""
        if self.case["side"] == "right":
            return
        given, width = self._prompts()
        spec = next(s for s in self.case["spec"] if s["pass"] == "masked_diffusion")
        filled = self.model.generate(**given, max_new_tokens=check["new"])
        for r, row in enumerate(self.rows):
            wanted = self._filled(row.tolist() + [MASK] * check["new"], len(row), spec)
            if filled[r].tolist()[width:] not in [w[len(row) :] for w in wanted]:
                raise Mismatch(f"row {r}: filled in {filled[r, width:].tolist()}, the oracle says {wanted}")

    def _filled(self, row: list[int], prompt: int, spec: Case) -> list[list[int]]:
        """The rows that may come of one with masks behind its prompt: several where places are equally sure."""
        rows, block = [row], spec.get("block")
        for start in [0] if block is None else range(prompt - prompt % block, len(row), block):
            end = len(row) if block is None else min(len(row), start + block)
            for left in range(min(spec["steps"], end - max(start, prompt)), 0, -1):
                rows = [n for r in rows for n in self._unmasked(r, end, left, prompt, spec)]
        return rows

    def _unmasked(self, row: list[int], end: int, left: int, prompt: int, spec: Case) -> list[list[int]]:
        """The rows that may come of one step, of which ``left`` are left up to column ``end``."""
        todo = [i for i in range(prompt, end) if row[i] == MASK]
        logits = self.want(torch.tensor(row[:end]), 0, prompt)["logits"]  # pads in front have no positions
        if spec.get("shift"):
            logits = torch.cat((logits[:1], logits[:-1]))
        logits = logits.index_fill(1, torch.tensor([MASK]), float("-inf"))
        scores = {i: _sure(spec["unmask"], torch.softmax(logits[i], 0), i) for i in todo}
        count = -(-len(todo) // left)
        last = sorted(scores.values(), reverse=True)[count - 1]
        sure = [i for i in todo if scores[i] > last + 1e-9]
        tied = [i for i in todo if abs(scores[i] - last) <= 1e-9]
        first = [{*sure, *more} for more in itertools.combinations(tied, count - len(sure))]
        return [[int(logits[i].argmax()) if i in places else token for i, token in enumerate(row)] for places in first]


def _sure(order: str, p: Tensor, place: int) -> float:
    best = p.sort(descending=True).values
    return float({"confidence": best[0], "margin": best[0] - best[1], "left": torch.tensor(-float(place)),
                  "entropy": torch.special.xlogy(p, p).sum()}[order])


class _Calls:
    """Rows in a cache, and beside it the tokens that they really have.

    Attributes:
        history: of each row the sizes of the calls that it came in.
        width: columns, the padding included.
    """

    def __init__(self, rows: list[Tensor], history: list[tuple[int, ...]], width: int) -> None:
        self.rows, self.history, self.width = rows, history, width
        self.cache: Any = None

    def copy(self, lot: random.Random) -> None:
        self.cache = copy.deepcopy(self.cache)

    def crop(self, lot: random.Random) -> None:
        """Take back a part of the newest call, never of the prompt."""
        count = lot.randint(1, 2)
        if len(self.history[0]) > 1 and self.history[0][-1] > count:
            self.cache.crop(-count)
            self.rows, self.width = [r[:-count] for r in self.rows], self.width - count
            self.history = [(*h[:-1], h[-1] - count) for h in self.history]

    def repeat(self, lot: random.Random) -> None:
        self.cache.batch_repeat_interleave(2)
        self._take([r for r in range(len(self.rows)) for _ in range(2)])

    def reorder(self, lot: random.Random) -> None:
        order = [lot.randrange(len(self.rows)) for _ in self.rows]
        self.cache.reorder_cache(torch.tensor(order))
        self._take(order)

    def select(self, lot: random.Random) -> None:
        order = sorted(lot.sample(range(len(self.rows)), lot.randint(1, len(self.rows))))
        self.cache.batch_select_indices(torch.tensor(order))
        self._take(order)

    def _take(self, order: list[int]) -> None:
        self.rows, self.history = [self.rows[i] for i in order], [self.history[i] for i in order]
