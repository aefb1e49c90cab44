"""Models and calls that benchmarks time, each with the numbers by which it is checked."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from declare import Answer
from gate import GRADIENT
from naive import NaiveGroups
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

import depthpass as dp
from depthpass.hf.caches.cache import STOCK_NAME

TOKENS = 16
VOCABULARY = 1024


def build(
    width: int, blocks: int, vocabulary: int = VOCABULARY, positions: int = 4096, inner: int | None = None
) -> LlamaForCausalLM:
    """A random Llama: head size 64, two query heads per key head."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary, hidden_size=width, intermediate_size=inner or width * 8 // 3, num_hidden_layers=blocks,
            num_attention_heads=width // 64, num_key_value_heads=max(1, width // 128), max_position_embeddings=positions,
        )
    )


def tokens(rows: int, length: int, device: str = "cpu", seed: int = 0) -> Tensor:
    """Random ids ``[rows, length]``."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed)).to(device)


def enliven(model, gain: float = 0.3):
    """The model with random non-zero new parameters: those of a fresh transform compute nothing, and would be checked for it."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.depth.parameters():
            scale = p.shape[-1] ** -0.5 if p.dim() > 1 else 0.1
            p.copy_(torch.randn(p.shape, generator=generator) * scale * gain)
    return model


def language_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean cross-entropy of the next token."""
    return cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def gradients(model: nn.Module) -> Answer:
    """Copies of all gradients, by the names of the model that torch.compile may have wrapped."""
    return {
        GRADIENT + n.removeprefix("_orig_mod."): p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


class TrainingStep:
    """Zero gradients, forward with loss, backward: what every optimizer step pays.

    Args:
        checked: ids of the call that is checked; the timed ones without.
        language: whether gradients of the language loss alone are checked, where a program has losses of its own.
    """

    def __init__(self, model: nn.Module, ids: Tensor, checked: Tensor | None = None, language: bool = False):
        self.model, self.ids, self.checked, self.language = model, ids, ids if checked is None else checked, language

    def __call__(self) -> None:
        self._forward(self.ids).loss.backward()

    def _forward(self, ids: Tensor):
        self.model.zero_grad(set_to_none=True)
        return self.model(input_ids=ids, labels=ids.clone(), use_cache=False)

    def answer(self) -> Answer:
        out = self._forward(self.checked)
        (language_loss(out.logits, self.checked) if self.language else out.loss).backward()
        answer = {"logits": out.logits.detach(), **gradients(self.model)}
        self.model.zero_grad(set_to_none=True)
        return answer


class NaiveStep:
    """The same of the naive grouped loop.

    Args:
        model: the transformed model whose bridges it uses; its gradients have that model's names.
    """

    def __init__(self, naive: NaiveGroups, ids: Tensor, model: nn.Module | None = None):
        self.naive, self.ids, self.model = naive, ids, model

    def __call__(self) -> Tensor:
        self.naive.model.zero_grad(set_to_none=True)
        logits = self.naive.logits(self.ids)
        language_loss(logits, self.ids).backward()
        return logits.detach()

    def answer(self) -> Answer:
        self.model.zero_grad(set_to_none=True)
        answer = {"logits": self(), **gradients(self.model)}
        self.model.zero_grad(set_to_none=True)
        return answer


class Forward:
    """A forward pass without gradients.

    Args:
        keep: whether a cache is made and the head applied to the last token alone, as in prefill.
        checked: ids of the call that is checked; the timed ones without.
    """

    def __init__(self, model: nn.Module, ids: Tensor, keep: bool = False, checked: Tensor | None = None):
        self.model, self.ids, self.checked = model, ids, ids if checked is None else checked
        self.options = {"use_cache": True, "logits_to_keep": 1} if keep else {"use_cache": False}

    @torch.no_grad()
    def __call__(self):
        return self.model(input_ids=self.ids, **self.options)

    @torch.no_grad()
    def answer(self) -> Answer:
        return {"logits": self.model(input_ids=self.checked, **self.options).logits}

    def note(self) -> str:
        """Sweeps of a fixed-point schedule."""
        return "; ".join(map(str, getattr(self(), "sweeps", None) or ()))


class StockTokens:
    """Decode tokens behind a prompt that is cached already, with a stock model; every call starts behind the prompt again.

    Args:
        compiled: False, True, or a mode of ``torch.compile``; a compiled model has transformers' static cache.
    """

    def __init__(self, model: nn.Module, ids: Tensor, compiled: bool | str = False, steps: int = TOKENS):
        self.ids, self.steps, self.compiled = ids, steps, compiled
        mode = compiled if isinstance(compiled, str) else None
        self.forward = torch.compile(model.forward, dynamic=False, mode=mode) if compiled else model.forward
        config, room = model.config, 1 << (ids.shape[1] + steps).bit_length()
        self.cache = StaticCache(config=config, max_cache_len=room) if compiled else DynamicCache(config=config)
        with torch.no_grad():
            model(input_ids=ids, **{STOCK_NAME: self.cache}, use_cache=True)
        self.token = ids[:, -1:].clone()

    @torch.no_grad()
    def __call__(self) -> None:
        for step in range(self.steps):
            self._step(step)
        self._reset(self.steps)

    def _step(self, step: int):
        at = torch.tensor([[self.ids.shape[1] + step]], device=self.ids.device)
        return self.forward(input_ids=self.token, position_ids=at, **{STOCK_NAME: self.cache}, use_cache=True)

    def _reset(self, steps: int) -> None:
        if not self.compiled:
            self.cache.crop(-steps)
            return
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.ids.shape[1])

    @torch.no_grad()
    def answer(self) -> Answer:
        answer = {"logits": self._step(0).logits.clone()}
        self._reset(1)
        return answer


class OurTokens:
    """The same with a transformed model and its cache.

    Args:
        rows: those whose numbers are checked; all without.
    """

    def __init__(self, model: nn.Module, ids: Tensor, steps: int = TOKENS, rows: Sequence[int] | None = None):
        self.model, self.steps, self.rows = model, steps, slice(None) if rows is None else list(rows)
        self.cache = dp.DepthCache(model)
        with torch.no_grad():
            model(input_ids=ids, past_key_values=self.cache, use_cache=True)
        self.token, self.start = ids[:, -1:].clone(), self.cache.state

    @torch.no_grad()
    def __call__(self) -> None:
        for _ in range(self.steps):
            self._step()
        self.cache.state = self.start

    def _step(self):
        return self.model(input_ids=self.token, past_key_values=self.cache, use_cache=True)

    @torch.no_grad()
    def answer(self) -> Answer:
        answer = {"logits": self._step().logits[self.rows].clone()}
        self.cache.state = self.start
        return answer
