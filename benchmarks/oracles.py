"""Right numbers for the gates: the stock model's own blocks wired by hand, token by token, from the tests' oracles.

They share no code with depthpass. They are slow, so they answer for a few rows of a few tokens.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from declare import Answer
from gate import GRADIENT
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

import oracle_program as by_hand

Want = Callable[[by_hand.Row, dict[str, Tensor]], Tensor]
"""``(row, new parameters by name) -> stream`` after the last block."""


class Oracle:
    """A program on a copy of a stock model, in float32 at least.

    Args:
        made: the transformed model whose new parameters are used.
        want: the program.
    """

    def __init__(self, stock: nn.Module, transformed: nn.Module, want: Want):
        self.stock, self.transformed, self.want = stock, transformed, want

    def _logits(self, model: nn.Module, ids: Tensor, values: dict[str, Tensor], last: bool) -> Tensor:
        rows = []
        with by_hand.oracle_attention(model):
            for row in ids:
                row = by_hand.Row(model, row, torch.arange(len(row)))
                logits = row.logits(self.want(row, values))
                rows.append(logits[-1:] if last else logits)
        return torch.stack(rows)

    def _copy(self) -> tuple[nn.Module, dict[str, Tensor]]:
        model = copy.deepcopy(self.stock).to(_precise(self.stock.dtype)).eval()
        values = {n: p.detach().to(model.dtype, copy=True).requires_grad_() for n, p in self.transformed.depth.named_parameters()}
        return model, values

    def scores(self, ids: Tensor, last: bool = False) -> Callable[[], Answer]:
        """Logits of rows, or of their last tokens alone."""
        @torch.no_grad()
        def answer() -> Answer:
            model, values = self._copy()
            return {"logits": self._logits(model, ids, values, last)}

        return answer

    def training(self, ids: Tensor) -> Callable[[], Answer]:
        """Logits and every gradient of a training step."""
        def answer() -> Answer:
            model, values = self._copy()
            logits = self._logits(model, ids, values, False)
            cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
            grads = {n: p.grad for n, p in model.named_parameters()} | {f"depth.{n}": v.grad for n, v in values.items()}
            return {"logits": logits.detach(), **{GRADIENT + n: g for n, g in grads.items() if g is not None}}

        return answer


def _precise(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.itemsize < 4 else dtype


def loop(start: int, end: int, times: int) -> Want:
    """A loop over blocks [start, end) with keys of its own for every visit."""
    return lambda row, p: by_hand.loop(row, start, end, times)[-1]


class Greedy:
    """Greedy decoding by ``generate`` behind a prompt, which is part of every call.

    What is checked is how probable each token is over the likeliest one, by hand: 1, whatever the dtype makes of near ties.

    Args:
        steps: decoded tokens of a timed call.
        checked: decoded tokens of the call that is checked.
        right: the program of each of the first rows by hand; those rows are checked.
        options: further arguments of ``generate``.
    """

    def __init__(self, model: nn.Module, prompt: Tensor, steps: int, checked: int, right: Sequence[Oracle], **options):
        self.model, self.prompt, self.steps, self.checked, self.right = model, prompt, steps, checked, right
        self.options = options

    def __call__(self) -> Tensor:
        return self._decode(self.steps)

    def _decode(self, steps: int) -> Tensor:
        return self.model.generate(
            self.prompt, attention_mask=torch.ones_like(self.prompt), max_new_tokens=steps, min_new_tokens=steps, do_sample=False,
            eos_token_id=None, pad_token_id=0, **self.options,
        )

    def answer(self) -> Answer:
        tokens, start = self._decode(self.checked)[: len(self.right)], self.prompt.shape[1]
        logits = torch.cat([right.scores(row[None])()["logits"] for right, row in zip(self.right, tokens)])[:, start - 1 : -1]
        chosen = logits.gather(-1, tokens[:, start:, None])[..., 0]
        return {LIKELIEST: torch.exp(chosen - logits.amax(-1))}


LIKELIEST = "probability over the likeliest token's"


def likeliest(rows: int, checked: int) -> Callable[[], Answer]:
    """What greedy decoding answers: every token is the likeliest one."""
    return lambda: {LIKELIEST: torch.ones(rows, checked)}
