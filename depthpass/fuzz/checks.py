"""The checks of whole rows: outputs, losses, gradients, packed rows, depth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from depthpass.fuzz.decoding import Decoding
from depthpass.fuzz.doors import Doors
from depthpass.fuzz.specs import Case
from depthpass.fuzz.subject import Mismatch


class Checks(Decoding, Doors):
    """One method for every check that a case may name."""

    def forward(self, check: Case) -> None:
        batch, real = self.batch(self.rows), self.real(self.rows)
        labels = None
        if check.get("loss"):
            labels = batch["input_ids"].masked_fill(~real, -100)
            labels[torch.arange(len(real)), real.int().argmax(1)] = -100  # a pad would predict it
        # Where there are pads, what has no label is the prompt.
        prompt = None if labels is None else 1
        out = self.call(batch, **({} if labels is None else {"labels": labels}))
        self.compare(out, self.rows, real, prompt)
        if labels is not None:
            self.loss(out, [(row, self.start(self.rows, r)) for r, row in enumerate(self.rows)])

    def loss(self, out: Any, rows: Sequence[tuple[Tensor, int]]) -> None:
        """The mean over all tokens but the first of a row, against rows with the positions of their first tokens."""
        if self.model.depth_program.losses:
            return
        wants = [self.want(row, start, 1)["logits"] for row, start in rows]
        terms = [F.cross_entropy(w[:-1], row[1:], reduction="none") for w, (row, _) in zip(wants, rows, strict=True)]
        if sum(map(len, terms)):
            self.same("loss", out.loss, torch.cat(terms).mean())

    def gradients(self, check: Case) -> None:
        batch, real = self.batch(self.rows), self.real(self.rows)
        self.same_gradients(batch, [(row, self.start(self.rows, r), (r, real[r])) for r, row in enumerate(self.rows)])

    def packed(self, check: Case) -> None:
        """Sequences one after the other in a row, told apart by positions that restart, or by their lengths too."""
        generator = torch.Generator().manual_seed(self.case["seed"])
        cut = [[self.tokens(n, generator) for n in row] for row in check["rows"]]
        batch: dict[str, Any] = {"input_ids": torch.stack([torch.cat(row) for row in cut]),
                                 "position_ids": torch.stack([torch.cat([torch.arange(len(s)) for s in row]) for row in cut])}
        if check["lengths"] and len(cut) == 1:
            ends = torch.tensor([0, *(len(s) for s in cut[0])]).cumsum(0).to(torch.int32)
            longest = max(map(len, cut[0]))
            batch |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
        pieces = [(s, 0, (r, slice(sum(map(len, row[:i])), sum(map(len, row[: i + 1])))))
                  for r, row in enumerate(cut) for i, s in enumerate(row)]
        options = {}
        if check["loss"]:
            options["labels"] = batch["input_ids"].masked_fill(batch["position_ids"] == 0, -100)
        out = self.call(batch, use_cache=False, **options)
        for n, (piece, start, at) in enumerate(pieces):
            want = self.want(piece, start, 1 if options else None)
            self.same(f"logits of sequence {n}", out.logits[at], want["logits"])
            for name, tap in getattr(out, "taps", {}).items():
                self.same(f"tap {name} of sequence {n}", tap[at], want[name])
        if options:
            self.loss(out, [(piece, start) for piece, start, _ in pieces])
        if check["gradients"]:
            self.same_gradients(batch, pieces)

    def depth(self, check: Case) -> None:
        """The longest path of what was read while the model ran, against the derived depth."""
        program = self.model.depth_program
        # Several passes, of which one is recorded; pads inside a row, whose depth is derived for its end.
        if self.varies or any(o.kind == "denoise" or (o.kind == "pad" and o["at"]) for o in program):
            return
        from depthpass_lowering.executors.recording import record

        from depthpass.analysis.depth import depth

        recorded, tokens = record(self.model, self.rows[0][:5]), len(self.rows[0][:5])
        for name in (None, *(o["name"] for o in program.taps)):
            if name is not None and name not in recorded.outputs:
                continue
            got, want = recorded.depth(name), depth(program, name).at(tokens)
            # A gate that is shut is a path of the text, and none of the record.
            if got > want if any(s.get("interval", 1) > 1 for s in self.case["spec"]) else got != want:
                raise Mismatch(f"depth of {name or 'the output'} at {tokens} tokens: derived {want}, recorded {got}")
