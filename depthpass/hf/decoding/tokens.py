"""The tokens of one call of ``generate`` whose decoding is ours: picked as transformers picks them, appended one by one."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import LogitsProcessorList
from transformers.generation.utils import GenerateDecoderOnlyOutput

from depthpass.errors import InputError
from depthpass.hf.caches.cache import NAMES, STOCK_NAME
from depthpass.log import fallback

_OURS = (*NAMES, "attention_mask", "position_ids", "cache_position", "use_cache", "logits_to_keep", "return_dict")
"""Arguments of the model that :func:`real_tokens` has looked at, or that say nothing about the tokens."""


def real_tokens(arguments: Mapping[str, Any], who: str) -> Tensor | None:
    """The mask of real tokens among the model's arguments; None = all are real.

    Raises:
        InputError: there are arguments that this decoding would leave out.
    """
    for name, value in arguments.items():
        if value is not None and name not in _OURS:
            raise InputError(f"{who}: expected no {name} beside it, got a {type(value).__name__}. Leave one of them out.")
    mask, positions = arguments.get("attention_mask"), arguments.get("position_ids")
    if mask is not None and mask.dim() != 2:
        raise InputError(f"{who}: expected an attention_mask of real tokens, [batch, tokens], got {list(mask.shape)}.")
    mask = None if mask is None or bool(mask.all()) else mask
    if positions is not None:
        want = torch.arange(positions.shape[-1], device=positions.device) if mask is None else (mask.long().cumsum(-1) - 1)
        same = positions == want if mask is None else (positions == want[:, -positions.shape[-1] :]) | (
            mask[:, -positions.shape[-1] :] == 0)
        if not bool(same.all()):
            raise InputError(f"{who}: expected position_ids that count each row's own tokens from 0, got others. Leave them out.")
    return mask


class Tokens:
    """Rows that grow.

    Attributes:
        ids: ``[batch, tokens]`` so far.
        running: which rows have not stopped, ``[batch]``.
    """

    ids: Tensor
    running: Tensor

    def __init__(self, processors: Any, criteria: Any, config: Any, streamer: Any):
        self.processors, self.criteria, self.streamer, self.config = processors, criteria, streamer, config
        self.sample = bool(config.do_sample)
        # Rows that stop for another reason than an end token go on until all have stopped, as in transformers.
        ends = any(hasattr(c, "eos_token_id") for c in criteria)
        self.pad = config._pad_token_tensor if ends else None
        asked = config.return_dict_in_generate
        self.scores: tuple[Tensor, ...] | None = () if asked and config.output_scores else None
        self.raw: tuple[Tensor, ...] | None = () if asked and config.output_logits else None

    def start(self, ids: Tensor) -> None:
        self.ids, self.running = ids, torch.ones(len(ids), dtype=torch.bool, device=ids.device)

    @property
    def live(self) -> Tensor:
        """The rows whose next token is not a pad, ``[batch]``."""
        return torch.ones_like(self.running) if self.pad is None else self.running

    def padded(self, token: Tensor) -> Tensor:
        """Pads in place of tokens of rows that have stopped."""
        return token if self.pad is None else torch.where(self.running, token, self.pad.to(token))

    def pick(self, logits: Tensor, row: Tensor, processors: Any = None) -> tuple[Tensor, Tensor | None, Tensor]:
        """A token of every row; when sampling the probabilities that it was drawn with; and the processed scores."""
        scores = (processors or self.processors)(row, logits)
        if not self.sample:
            return scores.argmax(-1), None, scores
        chance = torch.softmax(scores, -1)
        return torch.multinomial(chance, 1)[:, 0], chance, scores

    def next(self, logits: Tensor) -> None:
        """Pick a token of every row from the model's own logits and append it."""
        logits = logits.clone()  # processors may write to what they get
        raw = logits.clone() if self.raw is not None else logits
        token, _, scores = self.pick(logits, self.ids)
        self.append(token, raw, scores)

    def append(self, token: Tensor, logits: Tensor, scores: Tensor) -> None:
        """Append a token of every row, hand it on, and see which rows stop."""
        token = self.padded(token)
        if self.scores is not None:
            self.scores += (scores,)
        if self.raw is not None:
            self.raw += (logits,)
        self.ids = torch.cat((self.ids, token[:, None]), 1)
        if self.streamer is not None:
            self.streamer.put(token.cpu())
        self.running = self.running & ~self.criteria(self.ids, self.scores)

    def drafting(self) -> Any:
        """Processors for tokens that may be dropped again: those that remember their calls are not to see them."""
        return LogitsProcessorList(c for p in self.processors if (c := _apart(p)) is not None)

    def outcome(self, cache: Any) -> Any:
        """What ``generate`` returns."""
        if self.streamer is not None:
            self.streamer.end()
        if not self.config.return_dict_in_generate:
            return self.ids
        return GenerateDecoderOnlyOutput(
            sequences=cast(Any, self.ids), scores=cast(Any, self.scores), logits=cast(Any, self.raw), **{STOCK_NAME: cache})


def _apart(processor: Any) -> Any:
    """A processor as it is now; None where it cannot be copied: a draft does without it."""
    if type(processor).__module__ == "transformers.generation.logits_process" and not hasattr(processor, "state"):
        return processor
    held = vars(processor).values() if hasattr(processor, "__dict__") else ()
    try:
        return copy.deepcopy(processor, {id(x): x for x in held if isinstance(x, nn.Module)})
    except Exception as error:
        fallback(f"drafts do without the logits processor {type(processor).__name__}, which cannot be copied "
                 f"({type(error).__name__}): what is generated is the same, fewer drafted tokens are kept", asked=False)
        return None
