"""Run a capture the plain way: every block once, in order, over all tokens, with dense attention written out here."""

from __future__ import annotations

import functools

import torch
import zoo
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from depthpass.capture import Capture, capture
from depthpass.capture.attention import signature_names
from depthpass.capture.captured import Block, Part, Site

LAYERS = {"smollm3": 4, "cohere2": 4, "olmo3": 4, "exaone4": 4, "llama4_text": 4}
"""Blocks of a test model, where two do not show every kind of block the architecture has."""


@functools.cache
def model(name: str) -> nn.Module:
    """A small random stock model with random norms and biases (the stock initialisation hides swapped ones)."""
    built = zoo.model(name, LAYERS.get(name, 2))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in built.parameters():
            if p.dim() == 1:
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return built


@functools.cache
def captured(name: str) -> Capture:
    """One capture per architecture for the whole session, with labels and positions."""
    return capture(model(name), inputs(name, [7, 4]), {})


def inputs(name: str, lengths: list[int], side: str = "left", seed: int = 0) -> dict[str, Tensor]:
    """A padded batch with labels, and with positions where the forward takes them.

    The first real token has no label: left of it is a pad, whose logits mean nothing.
    """
    batch = zoo.batch(lengths, side, seed)
    counted = batch["attention_mask"].cumsum(-1) - 1
    batch["labels"] = batch["input_ids"].masked_fill((batch["attention_mask"] == 0) | (counted == 0), -100)
    if "position_ids" in signature_names(type(model(name)).forward):
        batch["position_ids"] = counted.clamp_min(0)
    return batch


class DenseVisit:
    """Answers a block's calls for a whole row at once (see :class:`depthpass.capture.calls.Visit`)."""

    def __init__(self, layer: nn.Module | None, sites: tuple[Site, ...], valid: Tensor):
        self.layer, self.sites, self.valid = layer, sites, valid.bool()

    def attend(self, number: int, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
        site = self.sites[number]
        assert (q.shape[1], k.shape[1], k.shape[3], v.shape[3]) == (
            site.heads, site.kv_heads, site.key_dim, site.value_dim
        )
        groups = q.shape[1] // k.shape[1]
        scores = q @ k.repeat_interleave(groups, 1).transpose(2, 3) * site.scale
        if site.softcap is not None:
            scores = torch.tanh(scores / site.softcap) * site.softcap
        scores = scores.masked_fill(~self.mask(site)[:, None], torch.finfo(scores.dtype).min)
        if sinks is not None:
            scores = torch.cat((scores, sinks.reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)), -1)
        weights = scores.softmax(-1)[..., : k.shape[2]]
        return (weights @ v.repeat_interleave(groups, 1)).transpose(1, 2)

    def mask(self, site: Site) -> Tensor:
        """Which keys each query sees, from the definition of causal, window and chunk: ``[batch, queries, keys]``."""
        batch, tokens = self.valid.shape
        seen = torch.zeros(batch, tokens, tokens, dtype=torch.bool)
        for b in range(batch):
            first = int(self.valid[b].int().argmax())
            for i in range(tokens):
                for j in range(i + 1):
                    near = site.window is None or i - j < site.window
                    same = site.chunk is None or (i - first) // site.chunk == (j - first) // site.chunk
                    seen[b, i, j] = self.valid[b, j] and near and same
        return seen

    def submodule(self, path: str, *args: Tensor) -> Tensor:
        return self.layer.get_submodule(path)(*args)

    def columns(self, device: torch.device) -> Tensor:
        return torch.arange(self.valid.shape[1], device=device)


def run(built: nn.Module, captured: Capture, batch: dict[str, Tensor]):
    """The outputs of a captured model, in the stock output class."""
    valid = batch["attention_mask"]
    outside = DenseVisit(None, (), valid)
    hidden, *side_inputs = run_part(built, captured.prologue, batch, (), outside)
    for layer, block in zip(built.get_submodule(captured.layers), captured.blocks):
        hidden = run_block(built, layer, block, hidden, side_inputs, valid)
    hidden = run_part(built, captured.norm, batch, side_inputs, outside, hidden)
    flat = run_part(built, captured.head, batch, side_inputs, outside, hidden)
    return pytree.tree_unflatten(list(flat), captured.out_spec)


def run_part(built: nn.Module, part: Part, batch: dict[str, Tensor], side_inputs, visit: DenseVisit, *streams: Tensor):
    extras = [side_inputs[i] for i in part.extras]
    params = [part.constants[p] if p in part.constants else attribute(built, p) for p in part.params]
    return part.graph(visit, *streams, *extras, *(batch[i] for i in part.inputs), *params)


def run_block(built: nn.Module, layer: nn.Module, block: Block, hidden: Tensor, side_inputs, valid: Tensor) -> Tensor:
    visit = DenseVisit(layer, block.template.sites, valid)
    return block.template.graph(visit, hidden, *(side_inputs[s] for s in block.side_inputs), *params_of(built, layer, block))


def params_of(built: nn.Module, layer: nn.Module, block: Block) -> list[Tensor]:
    return [
        attribute(built, p[1:]) if p.startswith("/") else block.constants[p] if p in block.constants else attribute(layer, p)
        for p in block.template.params
    ]


def attribute(module: nn.Module, path: str) -> Tensor:
    return functools.reduce(getattr, path.split("."), module)
