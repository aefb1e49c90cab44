"""The tokens of one call of ``generate`` whose decoding is ours: picked as transformers picks them, appended one by one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Tokens:
    """Rows that grow.

    Attributes:
        ids: ``[batch, tokens]`` so far.
        running: which rows have not stopped, ``[batch]``.
    """

    ids: Tensor
    running: Tensor

    def __init__(self, processors: Any, criteria: Any, config: Any, streamer: Any):
        self.processors, self.criteria, self.streamer = processors, criteria, streamer
        self.sample, self.pad = bool(config.do_sample), config._pad_token_tensor

    def start(self, ids: Tensor) -> None:
        self.ids, self.running = ids, torch.ones(len(ids), dtype=torch.bool, device=ids.device)

    def pick(self, logits: Tensor, row: Tensor) -> tuple[Tensor, Tensor | None]:
        """A token of every row, and when sampling the probabilities that it was drawn with."""
        scores = self.processors(row, logits)
        if not self.sample:
            return scores.argmax(-1), None
        chance = torch.softmax(scores, -1)
        return torch.multinomial(chance, 1)[:, 0], chance

    def emit(self, tokens: Tensor) -> None:
        """Append tokens one by one, as plain decoding does, until every row has stopped."""
        for token in tokens.unbind(1):
            if self.pad is not None:
                token = torch.where(self.running, token, self.pad.to(token))
            self.ids = torch.cat((self.ids, token[:, None]), 1)
            if self.streamer is not None:
                self.streamer.put(token.cpu())
            self.running = self.running & ~self.criteria(self.ids, None)
            if not bool(self.running.any()):
                return
