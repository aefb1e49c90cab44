"""Right numbers for the gates: the stock model's own blocks wired by hand, token by token, from the tests' oracles.

They share no code with depthpass. They are slow, so they answer for a few rows of a few tokens.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
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

    def __init__(self, stock: nn.Module, made: nn.Module, want: Want):
        self.stock, self.made, self.want = stock, made, want

    def _logits(self, model: nn.Module, ids: Tensor, values: dict[str, Tensor], last: bool) -> Tensor:
        found = []
        with by_hand.oracle_attention(model):
            for row in ids:
                row = by_hand.Row(model, row, torch.arange(len(row)))
                logits = row.logits(self.want(row, values))
                found.append(logits[-1:] if last else logits)
        return torch.stack(found)

    def _copy(self) -> tuple[nn.Module, dict[str, Tensor]]:
        model = copy.deepcopy(self.stock).to(_precise(self.stock.dtype)).eval()
        values = {n: p.detach().to(model.dtype, copy=True).requires_grad_() for n, p in self.made.depth.named_parameters()}
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

    def greedy(self, prompt: Tensor, steps: int) -> Callable[[], Answer]:
        """Tokens taken one by one, every one from a whole row."""
        @torch.no_grad()
        def answer() -> Answer:
            (model, values), ids = self._copy(), prompt
            for _ in range(steps):
                ids = torch.cat((ids, self._logits(model, ids, values, True).argmax(-1)), 1)
            return {"tokens": ids}

        return answer


def _precise(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.itemsize < 4 else dtype


def loop(start: int, end: int, times: int) -> Want:
    """A loop over blocks [start, end) with keys of its own for every visit."""
    return lambda row, p: by_hand.loop(row, start, end, times)[-1]
