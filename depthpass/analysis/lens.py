"""Logit lens per loop: what the model would say after every iteration, or after every visit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from depthpass.annotations import checked
from depthpass.errors import InputError
from depthpass.prompt import at_prompt

SCOPE = "lens"


@at_prompt
@dataclass(frozen=True)
class LogitLens:
    """What every iteration (or visit) would answer.

    Attributes:
        names: of the taps, in order; the last row of everything is the model's own output, ``output``.
        tokens: most likely ids, ``[taps + 1, rows, columns, top]``.
        probabilities: theirs.
        kl: KL(output || tap) in nats, ``[taps + 1, rows, columns]``.
        last: column of the last real token of each row.
        text: ids to text; None = ids are shown.
    """

    names: tuple[str, ...]
    tokens: Tensor
    probabilities: Tensor
    kl: Tensor
    last: tuple[int, ...]
    text: Any = None

    def settled_at(self, row: int = 0, column: int | None = None) -> str:
        """The first tap from which on the most likely token is the final one."""
        best = self.tokens[:, row, self._column(row, column), 0].tolist()
        first = len(best) - 1
        while first and best[first - 1] == best[-1]:
            first -= 1
        return self.names[first]

    def rows(self, row: int = 0, column: int | None = None) -> list[dict[str, object]]:
        """One mapping per tap for a token, by default the last real one of a row."""
        at = self._column(row, column)
        return [
            {"tap": name, "tokens": tuple(self._word(t) for t in self.tokens[i, row, at].tolist()),
             "probabilities": tuple(self.probabilities[i, row, at].tolist()), "KL": float(self.kl[i, row, at])}
            for i, name in enumerate(self.names)
        ]

    def __str__(self) -> str:
        rows = self.rows()
        width = max(len(n) for n in self.names)
        lines = [f"logit lens at token {self.last[0]} of row 0; KL(output || tap) in nats"]
        for r in rows:
            words = ", ".join(f"{w} {p:.3f}" for w, p in zip(r["tokens"], r["probabilities"]))  # type: ignore[call-overload]
            lines.append(f"{str(r['tap']).ljust(width)}  {r['KL']:9.4f}  {words}")
        return "\n".join(lines)

    def _column(self, row: int, column: int | None) -> int:
        if not 0 <= row < len(self.last):
            raise InputError(f"row: expected one of 0..{len(self.last) - 1}, got {row}.")
        return self.last[row] if column is None else column

    def _word(self, token: int) -> object:
        return token if self.text is None else repr(self.text(token))


@checked("logit_lens")
def logit_lens(
    model: nn.Module,
    batch: Mapping[str, Tensor] | Tensor,
    *,
    at: Literal["iterations", "visits"] = "iterations",
    top: int = 5,
    tokenizer: Any = None,
) -> LogitLens:
    """What a transformed model would say after every iteration of its loops, or after every visit.

    ``iterations`` runs the rest of the program (the coda) for each of them, as ``Loop(taps=True)`` does; ``visits`` applies
    the final norm and the head to every visit's stream. The model keeps its program and its mode.

    Args:
        model: a transformed model, inside a PEFT wrapper or not.
        batch: ``input_ids``, or a mapping with ``input_ids`` and ``attention_mask``.
        top: tokens per tap.
        tokenizer: turns ids into text in the report; None = ids.

    Raises:
        InputError: ``iterations`` of a program without a loop, or ``top`` below 1.
        SpecError: the model is not transformed.
    """
    from depthpass.hf.switching.switch import transformed, using
    from depthpass.passes.loop import Loop
    from depthpass.passes.taps import Taps

    inner = transformed(model, "logit_lens")
    passes = list(inner._depth.plans.current.passes)
    if at not in ("iterations", "visits") or top < 1:
        raise InputError(f"logit_lens: expected at='iterations' or 'visits' and top of at least 1, got {at!r} and {top!r}.")
    if at == "visits":
        spec: Sequence[Any] = [*passes, Taps(at=tuple(range(len(inner.depth_program.visits))), head=True, scope=SCOPE)]
    else:
        if not any(isinstance(p, Loop) for p in passes):
            raise InputError("logit_lens: expected a program with a loop, got one without. Pass at='visits'.")
        spec = [replace(p, taps=True) if isinstance(p, Loop) else p for p in passes]
    inputs = {"input_ids": batch} if isinstance(batch, Tensor) else {
        k: v for k, v in batch.items() if k in ("input_ids", "attention_mask", "inputs_embeds", "position_ids")
    }
    training = model.training
    model.eval()
    try:
        with using(model, spec), torch.no_grad():
            out = model(**inputs, use_cache=False)
    finally:
        model.train(training)
    heads = {o["name"] for o in inner.depth_program.taps} if at == "visits" else set()
    taps = {k: x for k, x in out.taps.items() if k not in heads and x.shape == out.logits.shape}
    logits = torch.stack([*taps.values(), out.logits]).float().log_softmax(-1)
    best = logits.topk(min(top, logits.shape[-1]), -1)
    final = logits[-1]
    mask = inputs.get("attention_mask")
    columns, count = logits.shape[2], logits.shape[1]
    last = [columns - 1] * count if mask is None else [int(m.nonzero().max()) for m in mask]
    return LogitLens(
        (*taps, "output"), best.indices, best.values.exp(), (final.exp() * (final - logits)).sum(-1), tuple(last),
        None if tokenizer is None else lambda t: tokenizer.decode([t]),
    )
