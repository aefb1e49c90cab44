"""Running layer programs over samples: logits of the answers, and greedy generation, with shared prefixes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from depthpass.search.damped import Damped, spec_of
from depthpass.search.samples import Sample
from depthpass.search.space import Layers


class Forward:
    """A transformed model and samples: switched live from program to program.

    Args:
        model: in evaluation mode.
        samples: all samples; calls name them by place.
        memo: bytes that prefixes may hold; 0 = every program runs all its visits.
        batch: most rows of a call.
    """

    def __init__(self, model: Any, samples: Sequence[Sample], memo: int, batch: int):
        from depthpass.capture.attention import signature_names
        from depthpass.hf.calls.prefixes import PrefixMemo

        inner = model.get_base_model() if callable(getattr(model, "get_base_model", None)) else model
        self.keeps = "logits_to_keep" in signature_names(inner.forward)
        self.model, self.samples, self.batch = model, samples, batch
        self.memo = PrefixMemo(memo)

    def using(self, layers: Layers):
        """A block in which the model runs a program."""
        from depthpass.hf.switching.switch import using

        return using(self.model, spec_of(layers))

    @torch.no_grad()
    def answer_logits(self, layers: Layers, rows: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """Per sample its place and the logits that predict its answer when the answer so far is given, ``[answer, vocab]``.

        Rows are padded at their end, which no real token sees.
        """
        for part in self._parts(rows, lambda s: len(s.prompt) + len(s.answer)):
            texts = [self.samples[r].prompt + self.samples[r].answer[:-1] for r in part]
            width = max(map(len, texts))
            ids = torch.tensor([t + t[-1:] * (width - len(t)) for t in texts], device=self.model.device)
            # Logits are wide: none before the first answer where the model can leave them out.
            kept = max(width - len(self.samples[r].prompt) + 1 for r in part)
            some = {"logits_to_keep": kept} if self.keeps else {}
            with self.using(layers), self.memo.running(self.model, ("answers", part), layers, False, _shared(layers)):
                logits = self.model(input_ids=ids, use_cache=False, **some).logits
            first = width - logits.shape[1]
            for row, t, own in zip(part, texts, logits):
                yield row, own[len(t) - len(self.samples[row].answer) - first : len(t) - first]

    @torch.no_grad()
    def generated(self, layers: Layers, rows: Sequence[int]) -> Iterator[tuple[int, tuple[int, ...]]]:
        """Per sample its place and what ``generate`` says greedily after its prompt, as many tokens as the answer has.

        Programs share the prompt's keys and values; every program decodes its own tokens. Rows of a call have equal prompts'
        lengths, so that nothing is padded.
        """
        from depthpass.hf.caches.cache import DepthCache

        lengths: dict[int, list[int]] = {}
        for r in rows:
            lengths.setdefault(len(self.samples[r].prompt), []).append(r)
        for part in (p for same in lengths.values() for p in self._parts(same, lambda s: len(s.answer))):
            ids = torch.tensor([self.samples[r].prompt for r in part], device=self.model.device)
            with self.using(layers):
                cache = DepthCache(self.model)
                if ids.shape[1] > 1:
                    with self.memo.running(self.model, ("prompts", part), layers, True, _shared(layers)):
                        self.model(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True)
                out = self.model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, do_sample=False, num_beams=1,
                    num_return_sequences=1, max_new_tokens=max(len(self.samples[r].answer) for r in part),
                    return_dict_in_generate=False,
                )
            for row, new in zip(part, out[:, ids.shape[1] :].tolist()):
                yield row, tuple(new[: len(self.samples[row].answer)])

    def _parts(self, rows: Sequence[int], length) -> Iterator[tuple[int, ...]]:
        """Rows of about equal length together."""
        order = sorted(rows, key=lambda r: (length(self.samples[r]), r))
        for i in range(0, len(order), self.batch):
            yield tuple(order[i : i + self.batch])


def _shared(layers: Layers) -> int:
    """Visits that a program shares with others that begin with the same blocks: a damped loop those before its range."""
    return layers.start if isinstance(layers, Damped) else len(layers)
