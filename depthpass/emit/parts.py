"""What emitted files are made of besides stock code: each of these is copied into a file that needs it, as it stands.

They use torch and transformers only, and the name ``CACHE`` of nothing: whoever reads an emitted file reads them there.
"""

from __future__ import annotations

import math
import sys
from types import ModuleType
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer, StaticLayer


def attach(root: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module at a dotted name, below plain modules."""
    *parents, leaf = name.split(".")
    for part in parents:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = getattr(root, part)
    root.add_module(leaf, module)


class Weigh(nn.Module):
    """Times a learned vector ``[width]``."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class QueryGate(nn.Module):
    """A score per token and head from the rotated query, ``[batch, heads, tokens, dim]`` -> ``[batch, tokens, heads]``."""

    def __init__(self, heads: int, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(heads, dim))
        self.bias = nn.Parameter(torch.zeros(heads))

    def forward(self, query: Tensor, hidden: Tensor) -> Tensor:
        return (query.transpose(1, 2) * self.weight).sum(-1) + self.bias


class HiddenGate(nn.Module):
    """A score per token and head from the block's input, ``[batch, tokens, width]`` -> ``[batch, tokens, heads]``."""

    def __init__(self, heads: int, width: int):
        super().__init__()
        self.norm = Weigh(width)
        self.weight = nn.Parameter(torch.zeros(heads, width))
        self.bias = nn.Parameter(torch.zeros(heads))

    def forward(self, query: Tensor, hidden: Tensor) -> Tensor:
        return nn.functional.linear(self.norm(rms(hidden, 1e-6)), self.weight, self.bias)


class TimeEncoder(nn.Module):
    """An iteration number as a vector ``[width]``: W silu(V [cos, sin](t) + b) + c."""

    def __init__(self, width: int, waves: int):
        super().__init__()
        self.rise = nn.Linear(waves, width)
        self.mix = nn.Linear(width, width)

    def forward(self, step: int) -> Tensor:
        half = self.rise.in_features // 2
        phase = [step * math.exp(-i * math.log(10000.0) / half) for i in range(half)]
        wave = self.rise.weight.new_tensor([math.cos(p) for p in phase] + [math.sin(p) for p in phase])
        return self.mix(nn.functional.silu(self.rise(wave)))


class TimeFactors(nn.Module):
    """Four factors of a visit, ``[4, width]``, from an encoded iteration number."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4 * width, width))
        self.bias = nn.Parameter(torch.zeros(4 * width))

    def forward(self, time: Tensor) -> Tensor:
        return nn.functional.linear(nn.functional.silu(time), self.weight, self.bias).view(4, -1)


class Factors(nn.Module):
    """Four factors of a visit, ``[4, width]``, of its own."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, width))

    def forward(self) -> Tensor:
        return self.weight


class Balance(nn.Module):
    """What a router adds to its scores ``[width]``; no gradient trains it."""

    def __init__(self, width: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(width), requires_grad=False)


def scaled(factors: Tensor, base: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a visit multiplies with: what its attention reads, what that adds, what its MLP reads, what that adds."""
    add_attention, add_mlp, read_attention, read_mlp = factors.unbind(0)
    return 1 + read_attention, base + add_attention, 1 + read_mlp, base + add_mlp


def rescaled(x: Tensor, eps: float, limit: float) -> Tensor:
    """``x`` over its root mean square, by at most ``limit`` up or down; no gradient flows through the factor."""
    factor = (x.detach().square().mean(-1, keepdim=True) + eps).rsqrt()
    return x * factor.clamp(1 / limit, limit)


def centred(x: Tensor) -> Tensor:
    """``x`` less its mean."""
    return x - x.mean(-1, keepdim=True)


def rms(x: Tensor, eps: float) -> Tensor:
    """``x`` over its root mean square."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def seen_before(cache: Any) -> Any:
    """Columns that earlier calls have put in a cache: a number, or of a static cache a tensor."""
    count = 0 if cache is None else cache.get_seq_length()
    # A static cache counts in place.
    return count.clone() if isinstance(count, Tensor) else count


def check_rooms(cache: Any) -> None:
    """Refuse static caches of sliding windows: their columns move, and a gate's window and a route's tokens are columns."""
    if cache is not None and any(layer.is_sliding and layer.is_compileable for layer in cache.layers):
        raise NotImplementedError("gated and routed visits of layers with sliding windows need a dynamic cache.")


def check_backend(config: Any, kwargs: dict[str, Any]) -> None:
    """Refuse engines that keep keys and values by themselves: they keep nothing else between tokens."""
    # Some hand their layers to the forward, others hang them on its modules; those only name themselves in the config.
    engine = str(config._attn_implementation).startswith(("vllm", "sglang", "paged"))
    if engine or kwargs.get("attention_instances") is not None:
        raise NotImplementedError("this model reads streams or keys of other layers, which stand in transformers' caches; an "
                                  "engine with attention of its own (vLLM) cannot run it.")


def check_head(predict: Any) -> Any:
    """Refuse to run without the head: tokens leave by what it makes of unfinished states."""
    if predict is None:
        raise ValueError("this decoder lets tokens leave by their logits, which the head of the whole model makes: load it with "
                         "AutoModelForCausalLM.")
    return predict


def check_recomputed(layers: nn.ModuleList) -> None:
    """Refuse activation checkpoints in training: a layer that runs again puts its keys into the cache of the chunks again."""
    if torch.is_grad_enabled() and any("_checkpoint_wrapped_module" in layer._modules for layer in layers):
        raise NotImplementedError("checkpoint_wrapper: this model runs chunks of tokens behind the keys of those before, which a "
                                  "layer that is computed again would keep twice. Train it without activation checkpoints.")


def check_units(layers: nn.ModuleList) -> None:
    """Refuse FSDP2 units in training where a layer runs for its keys alone: units gather weights for gradients of results."""
    if torch.is_grad_enabled() and any(hasattr(type(m), "_get_fsdp_state") for m in layers.modules()):
        raise NotImplementedError("fully_shard: layers of this model also run for their keys alone, whose gradients come when a "
                                  "unit has given its weights back. Call fully_shard on the whole model only.")


def ages(attention_mask: Tensor | None, past: Any, count: int, device: torch.device) -> Tensor:
    """How many real tokens of its row stand before each new token, ``[batch or 1, count]``."""
    if attention_mask is None:
        return (torch.arange(count, device=device) + past)[None]
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        raise ValueError("attention_mask: expected a mask of real tokens [batch, tokens], which says where a row begins.")
    return (attention_mask.to(device).long().cumsum(-1) - 1)[:, -count:]


def since(age: Tensor, first: int, x: Tensor) -> Tensor:
    """A stream that does not exist before token ``first`` of a row: nothing there."""
    return x.masked_fill((age < first)[..., None], 0)


def line_layer(cache: Any, number: int) -> Any:
    """The layer of a cache that keeps a delayed stream; such layers stand after those of the visits."""
    while len(cache.layers) <= number:
        # Windows of a static cache have no room for a whole row.
        rooms = [layer.max_cache_len for layer in cache.layers if layer.is_compileable and not layer.is_sliding]
        cache.layers.append(StaticLayer(max(rooms)) if rooms else DynamicLayer())
    return cache.layers[number]


def keep(cache: Any, number: int, x: Tensor) -> Tensor:
    """Append a stream to what earlier calls saw of it; returns all of it, ``[batch, columns, width]``."""
    if cache is None:
        return x
    return line_layer(cache, number).update(x[:, None], x[:, None, :, :0])[0][:, 0]


def kept(cache: Any, number: int, like: Tensor, width: int) -> Tensor:
    """What earlier calls saw of a stream, ``[batch, columns, width]``."""
    layer = line_layer(cache, number)
    return layer.keys[:, 0] if layer.is_initialized else like.new_zeros(len(like), 1, width)


def earlier(line: Tensor, tokens: int, past: Any, count: int) -> Tensor:
    """A stream so many tokens before each of the new ones; anything where there is none (see ``since``)."""
    columns = torch.arange(count, device=line.device) + past - tokens
    return line.index_select(1, columns.clamp(min=0))


def group_before(line: Tensor, age: Tensor, group: int, past: Any, count: int) -> Tensor:
    """A stream at the last token of the group before each new token's; groups are counted from a row's first real token."""
    columns = torch.arange(count, device=line.device) + past - age % group - 1
    at = columns.clamp(min=0).expand(len(line), -1)
    return line.gather(1, at[..., None].expand(-1, -1, line.shape[2]))


def kept_tokens(x: Tensor, keep: Any) -> Tensor:
    """The tokens of a stream that ``logits_to_keep`` asks for."""
    return x[:, -keep:] if isinstance(keep, int) else x[:, keep]


def leave(states: list[Tensor], gates: list[Tensor], limit: float) -> Tensor:
    """Of several states of a token the first whose cumulative exit probability reaches ``limit``, else the last."""
    done, chosen = torch.zeros_like(gates[0], dtype=torch.bool), states[-1]
    left, reached = torch.ones_like(gates[0]), torch.zeros_like(gates[0])
    for state, gate in zip(states[:-1], gates, strict=False):
        reached, left = reached + left * gate, left * (1 - gate)
        now = (reached >= limit) & ~done
        chosen, done = torch.where(now, state, chosen), done | now
    return chosen


def moved(now: Tensor, before: Tensor, rule: str) -> Tensor:
    """How far a stream or a prediction has moved, ``[..., 1]``."""
    if rule == "cosine":
        return 1 - nn.functional.cosine_similarity(now, before, dim=-1)[..., None]
    if rule == "state":
        return (now - before).norm(dim=-1, keepdim=True) / now.norm(dim=-1, keepdim=True)
    if rule == "argmax":
        return (now.argmax(-1, keepdim=True) != before.argmax(-1, keepdim=True)).to(now)
    now, before = now.log_softmax(-1), before.log_softmax(-1)
    if rule == "kl":
        return (before.exp() * (before - now)).sum(-1, keepdim=True)
    return ((now.exp() * now).sum(-1, keepdim=True) - (before.exp() * before).sum(-1, keepdim=True)).abs()


@torch.compiler.disable()
def drawn(number: int, age: Tensor, width: int) -> Tensor:
    """Normal numbers that a token of a row keeps, whatever call it comes in: ``[*age.shape, width]``, 16 tokens to a seed."""
    places = age.clamp(min=0).cpu()
    first, last = (int(p) // 16 for p in places.aminmax())
    seeds = (torch.Generator().manual_seed((number << 32) + block) for block in range(first, last + 1))
    return torch.cat([torch.randn(16, width, generator=seed) for seed in seeds])[places - first * 16]


def noise(age: Tensor, number: int, like: Tensor, width: int, std: float, cut: Any, training: bool) -> Tensor:
    """Random states of a program's noise ``number``: new ones in training, those of a token's place in its row otherwise.

    Args:
        cut: where the distribution is cut off on both sides; None = nowhere.
    """
    shape = (*like.shape[:-1], width)
    if training:
        x = torch.randn(shape, dtype=like.dtype, device=like.device)
    else:
        x = drawn(number, age, width).double().expand(shape)
    if cut is not None:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        x = (torch.erfinv(torch.erf(wide / 2**0.5) * math.erf(cut / 2**0.5)) * 2**0.5).clamp(-cut, cut)
    return std * x.to(like)


def attend(attention, module, query, key, value, mask, *, slots=None, reads=None, gate=None, window=None, hidden=None,
           past=0, taken_by=None, update=False, **kwargs):
    """Attention of a visit whose keys others read, that reads another visit's, or that sees the keys of some tokens only.

    Args:
        slots: keys and values of this call's visits, by ``layer_idx``.
        reads: the visit whose keys it reads; None = its own.
        gate: mixes them with its own last ``window`` keys: g Attn(other's) + (1 - g) Attn(own last).
        hidden: the block's input, for the gate.
        past: columns before this call.
        taken_by: which tokens have keys here, ``[batch, columns, 1]``; None = all.
        update: those of them that have keys of their own take the place of the other visit's.
    """
    if slots is None:
        raise RuntimeError(f"layer {module.layer_idx} was called by itself: what it reads is another layer's.")
    if reads is None or gate is not None or update:
        slots[module.layer_idx] = key, value
    if update and taken_by is not None:
        own = taken(taken_by, key)[:, None, :, None]
        key, value = (torch.where(own, x, other) for x, other in zip((key, value), slots[reads], strict=True))
    elif reads is not None and gate is None:
        key, value = slots[reads]
    if gate is None:
        if taken_by is not None and not update:
            mask = some_keys(mask, query, key, taken_by, past)
        return attention(module, query, key, value, mask, **kwargs)
    far = attention(module, query, *slots[reads], mask, **kwargs)
    near, _ = attention(module, query, key, value, near_mask(mask, query, key, window, past), **kwargs)
    g = torch.sigmoid(gate(query, hidden))[..., None]
    return g * far[0] + (1 - g) * near, None


class Slots:
    """Keys and values of one call's visits, by ``layer_idx``: no dict, which what shards layers would copy on its way to them."""

    def __init__(self) -> None:
        self.held: dict[int, tuple[Tensor, Tensor]] = {}
        self.graded = torch.is_grad_enabled()

    def __getitem__(self, place: int) -> tuple[Tensor, Tensor]:
        if self.graded and not torch.is_grad_enabled():
            raise NotImplementedError("use_reentrant=True: layers of this model read other layers' keys, and a reentrant "
                                      "checkpoint loses their gradients. Checkpoint with use_reentrant=False.")
        return self.held[place]

    def __setitem__(self, place: int, pair: tuple[Tensor, Tensor]) -> None:
        self.held[place] = pair


def places(query: Tensor, key: Tensor, past: Any) -> tuple[Tensor, Tensor]:
    """Columns of the keys ``[columns]`` and of the queries ``[tokens, 1]``, counted from the first key that is there."""
    count, columns = query.shape[2], torch.arange(key.shape[2], device=key.device)
    # A static cache has room behind the last key; any other ends with it, and may have dropped the first ones.
    first = past if isinstance(past, Tensor) or key.shape[2] > past + count else key.shape[2] - count
    return columns, (torch.arange(count, device=key.device) + first)[:, None]


def narrowed(mask: Tensor | None, seen: Tensor) -> Tensor:
    """A causal mask (None = all earlier keys) without the keys that are not ``seen``, ``[batch or 1, 1, tokens, columns]``."""
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 4):
        raise NotImplementedError("gated and routed visits need attn_implementation='sdpa' or 'eager'.")
    if mask is None:
        return seen
    return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, torch.finfo(mask.dtype).min)


def near_mask(mask: Tensor | None, query: Tensor, key: Tensor, window: Any, past: Any) -> Tensor:
    """A causal mask, cut down to each query's last ``window`` keys."""
    columns, rows = places(query, key, past)
    return narrowed(mask, ((columns <= rows) & (columns > rows - window))[None, None])


def taken(taken_by: Tensor, key: Tensor) -> Tensor:
    """Which of the keys' tokens were chosen, ``[batch, columns]``; a cache of a window has dropped the first keys."""
    return taken_by[:, -key.shape[2] :, 0] != 0


def some_keys(mask: Tensor | None, query: Tensor, key: Tensor, taken_by: Tensor, past: Any) -> Tensor:
    """A causal mask with the chosen tokens' keys alone. What is not chosen, and dropped later, sees itself: not nothing."""
    columns, rows = places(query, key, past)
    chosen = taken(taken_by, key)[:, None, None]
    return narrowed(mask, (columns <= rows) & (chosen | (columns == rows)))


def known_to_tools(cls: type) -> None:
    """Put a class where tools look the architecture of a config up: `transformers serve` asks the module that it has imported.

    There may be two of that name: transformers reads itself a second time for its processors.
    """
    held = (vars(m).get("transformers") for m in list(sys.modules.values()) if isinstance(m, ModuleType))
    for module in (transformers, *held):
        if isinstance(module, ModuleType) and module.__name__ == "transformers":
            setattr(module, cls.__name__, cls)
