"""The oracle: what a program's *text* means, on a stock model's own blocks, one token of one row at a time.

Values are computed on demand and remembered. There are no chunks, no caches, no schedules and no masks: attention is a
softmax over a Python list of keys. Of depthpass only the text's parser is used.
"""

from __future__ import annotations

import copy
import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from fractions import Fraction
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from depthpass.fuzz.models import blocks_of, norm_of
from depthpass.ir import Op, Program, parse_program

NAME = "depthpass_fuzz"
Key = tuple[Tensor, Tensor, int]
"""``(k [kv_heads, dim], v [kv_heads, dim], column)``"""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid, "silu": F.silu, "tanh": torch.tanh, "gelu": F.gelu, "relu": torch.relu,
    "softmax": lambda x: torch.softmax(x, -1),
}
PLAIN = ("self_attn", "mlp", "self_attn", "mlp")
_SANDWICH = ("self_attn", "mlp", "post_attention_layernorm", "post_feedforward_layernorm")
PLACES = {
    "gpt2": ("attn", "mlp", "attn", "mlp"), "gpt_neox": ("attention", "mlp", "attention", "mlp"),
    "glm4": ("self_attn", "mlp", "post_self_attn_layernorm", "post_mlp_layernorm"),
    "llama4_text": ("self_attn", "feed_forward", "self_attn", "feed_forward"),
    **dict.fromkeys(("gemma2", "gemma3_text", "olmo2", "olmo3", "exaone4"), _SANDWICH),
}
"""Attention, MLP, and the modules whose results the residual stream takes, where they are not those of Llama."""


class _Enough(Exception):
    """A visit's keys are known; the rest of the block need not run."""


_running: list[Callable[..., Tensor]] = []


def _attend(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **more):
    if not _running:  # whole rows run to record calls and to apply the head; what the blocks give is not used
        return torch.zeros_like(query[..., : value.shape[-1]]).transpose(1, 2), None
    limits = {"window": more.get("sliding_window"), "chunk": _chunk(module), "softcap": more.get("softcap"),
              "sinks": more.get("s_aux"), "scale": query.shape[-1] ** -0.5 if scaling is None else scaling}
    return _running[-1](query[0, :, 0], key[0, :, 0], value[0, :, 0], limits)[None, None], None


def _chunk(module: Any) -> int | None:
    kinds = getattr(module.config, "layer_types", None)
    chunked = kinds is not None and kinds[module.layer_idx] == "chunked_attention"
    return module.config.attention_chunk_size if chunked else None


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)


@contextmanager
def list_attention(model: Any):
    """The stock model with attention over lists for the time of a ``with``."""
    found = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(found)


def read(q: Tensor, keys: Sequence[Key], column: int, limits: dict[str, Any]) -> Tensor:
    """Softmax attention of one query ``[heads, dim]`` over a list of keys."""
    window, chunk = limits["window"], limits["chunk"]
    seen = [
        (k, v) for k, v, c in keys
        if c <= column and (window is None or c > column - window) and (chunk is None or c // chunk == column // chunk)
    ]
    if not seen:
        return q.new_zeros(q.shape)
    share = q.shape[0] // seen[0][0].shape[0]
    k, v = (torch.stack(t, 1).repeat_interleave(share, 0) for t in zip(*seen, strict=True))
    scores = torch.einsum("hd,hnd->hn", q, k) * limits["scale"]
    if limits["softcap"] is not None:
        scores = torch.tanh(scores / limits["softcap"]) * limits["softcap"]
    if limits["sinks"] is not None:
        scores = torch.cat((scores, limits["sinks"][:, None]), 1)
    return torch.softmax(scores, -1)[:, None, : len(seen)].matmul(v)[:, 0]


def averaged(model: nn.Module, program: Program) -> nn.Module:
    """The stock model, or a copy with the means that a program starts from."""
    if all(o.kind != "average" for o in program):
        return model
    made = copy.deepcopy(model)
    with torch.no_grad():
        for o in program:
            if o.kind == "average":
                of = [dict(blocks_of(model)[b].named_parameters()) for b in o["blocks"]]
                for name, p in blocks_of(made)[o["index"]].named_parameters():
                    p.copy_(torch.stack([block[name] for block in of]).mean(0))
    return made


class Row:
    """One row without padding on a stock model whose attention is :func:`list_attention`.

    Args:
        ids: the tokens, workspace pads included, ``[columns]``.
        start: position of the first one.
    """

    def __init__(self, model: nn.Module, ids: Tensor, start: int) -> None:
        self.model, self.ids, self.blocks = model, ids, blocks_of(model)
        self.positions = torch.arange(start, start + len(ids))
        self.calls: list[tuple[tuple, dict]] = []
        handles = [
            b.register_forward_pre_hook(lambda m, a, k: self.calls.append((a, k)), with_kwargs=True) for b in self.blocks
        ]
        try:
            self._forward()
        finally:
            for h in handles:
                h.remove()
        args, kwargs = self.calls[0]
        self.embed = (args[0] if args else kwargs["hidden_states"])[0]

    def _forward(self) -> Any:
        return self.model(input_ids=self.ids[None], position_ids=self.positions[None], use_cache=False)

    def block(self, index: int, x: Tensor, i: int, attend: Callable[..., Tensor]) -> Tensor:
        """Stock block ``index`` on the token of column i, ``[width]``."""
        args, kwargs = self.calls[index]

        def at(value: Any) -> Any:
            if isinstance(value, tuple | list):
                return type(value)(at(v) for v in value)
            if isinstance(value, Tensor):
                axis = next((d for d in range(1, value.dim()) if value.shape[d] == len(self.ids)), None)
                return value if axis is None else value.narrow(axis, i, 1)
            return value

        kwargs = {k: at(v) for k, v in kwargs.items() if k not in ("hidden_states", "past_key_values", "cache")}
        _running.append(attend)
        try:
            out = self.blocks[index](x[None, None], *(at(a) for a in args[1:]), **kwargs)
        finally:
            _running.pop()
        return (out[0] if isinstance(out, tuple) else out)[0, 0]

    def head(self, normed: Tensor) -> Tensor:
        """What the stock model makes of normed streams ``[n, width]``, n up to the row's length."""
        count = len(normed)
        padded = torch.cat((normed, normed.new_zeros(len(self.ids) - count, normed.shape[1])))[None]
        handle = norm_of(self.model).register_forward_hook(lambda m, a, out: padded)
        try:
            return self._forward().logits[0, :count]
        finally:
            handle.remove()


class Meaning:
    """Values of a program on one row.

    Args:
        text: of the program.
        row: the row, workspace pads included.
        p: new parameters by name, without ``depth.``.
        prompt: real tokens in front of the pads.
        noise: ``(number, columns, width) -> [columns, width]``, standard normal.
        calls: sizes of the calls that the tokens come in; none = one.
    """

    def __init__(
        self, text: str, row: Row, p: Mapping[str, Tensor], prompt: int, noise: Callable[..., Tensor],
        calls: Sequence[int] = (),
    ) -> None:
        self.program, self.row, self.p = parse_program(text), row, p
        self.prompt, self.noise, self.ends = prompt, noise, list(accumulate(calls))
        self.pads = next((o["tokens"] for o in self.program if o.kind == "pad"), 0)
        self.writers = {o["slot"]: o for o in self.program.visits if o["keys"] is None or o["gate"] is not None}
        self.columns = len(row.ids)
        self.seen: dict[tuple[str, int], Any] = {}
        self.stored: dict[tuple[int, int], Key] = {}
        self.best: dict[str, set[int]] = {}

    def handed_out(self) -> dict[str, Tensor]:
        """The stream before the head as ``output``, and every tap, for the real tokens."""
        found = {}
        for o in self.program:
            if o.kind in ("output", "tap"):
                name = o["name"] if o.kind == "tap" else "output"
                values = [self.value(o.args[0], i) for i in range(self.columns)]
                kept = values if self.trimmed(o.args[0]) else [
                    v for i, v in enumerate(values) if not self.prompt - 1 <= i < self.prompt + self.pads - 1
                ]
                kept = kept[: self.columns - self.pads]
                if isinstance(values[0], bool):
                    found[name] = torch.tensor(kept)
                elif o.kind == "tap" and o["head"]:
                    found[name] = self.row.head(torch.stack(kept))
                else:
                    found[name] = torch.stack(kept)
        return found

    def trimmed(self, name: str) -> bool:
        """Whether a value is counted by real tokens; what is handed out is, be it trimmed by an op or at the end."""
        o = self.program.defs[name]
        return o.kind == "trim" or (o.kind != "pad" and any(self.trimmed(a) for a in o.args if o.kind in ("norm", "logits")))

    def value(self, name: str, i: int) -> Any:
        """A value at one column; None where it is absent or not routed. Trimmed ones are counted by real tokens."""
        if (name, i) not in self.seen:
            o = self.program.defs[name]
            self.seen[name, i] = self.route(o, i) if o.kind == "route" else self.compute(o, i)
        return self.seen[name, i]

    def compute(self, o: Op, i: int) -> Tensor | None:
        match o.kind:
            case "embed":
                return self.row.embed[i]
            case "pad":
                return self.value(o.args[0], i)  # the row has the pads' embedding in it
            case "trim":
                j = i if i < self.prompt - 1 else i + self.pads
                return self.value(o.args[0], j) if j < self.columns else None
            case "delay" if o["group"]:
                last = i - i % o["group"] - 1
                return self.value(o.args[0], last) if last >= 0 else None
            case "delay":
                return self.value(o.args[0], i - o["tokens"]) if i >= o["tokens"] else None
            case "gather":
                return self.value(o.args[0], i) if self.value(o.args[1], i) else None
            case "scatter":
                base, taken = self.value(o.args[0], i), self.value(o.args[2], i)
                new = self.value(o.args[1], i) if taken else None
                return base if new is None else new if o["mode"] == "replace" else base + new
            case "block":
                return self.visit(o, i)
            case "zeros":
                return self.row.embed.new_zeros(o["width"] or self.program.width)
            case "noise":
                return o["std"] * self.drawn(o, i)
        args = [self.value(a, i) for a in o.args]
        if o.kind == "add":
            there = [a for a in args if a is not None]
            return functools.reduce(operator.add, there) if there else None
        return None if any(a is None for a in args) else self.local(o, args)

    def local(self, o: Op, args: list[Tensor]) -> Tensor:
        """Ops on one token alone."""
        x = args[0]
        match o.kind:
            case "linear":
                y = self.p[f"{o['name']}.weight"] @ torch.cat(args)
                return y + self.p[f"{o['name']}.bias"] if o["bias"] else y
            case "weigh":
                return x * self.p[f"{o['name']}.weight"]
            case "scale":
                return x * o["by"]
            case "mul":
                return x * args[1]
            case "act":
                return ACTIVATIONS[o["fn"]](x)
            case "pick":
                return x[o["index"]][None]
            case "rms":
                y = x / (x.square().mean() + o["eps"]).sqrt()
                return y * self.p[f"{o['name']}.weight"] if o["name"] else y
            case "norm":
                return norm_of(self.row.model)(x[None, None])[0, 0]
            case "logits":
                return self.row.head(x[None])[0]
            case "detach":
                return x.detach()
            case "distance":
                return _distance(o["rule"], x, args[1])
            case "select":
                half, left, reached = len(args) // 2, 1.0, 0.0
                for state, gate in zip(args[: half - 1], args[half:], strict=False):
                    reached, left = reached + left * gate.item(), left * (1 - gate.item())
                    if reached >= o["cdf"]:
                        return state
                return args[half - 1]
        raise NotImplementedError(f"the oracle does not know the op {o.kind!r}")

    def drawn(self, o: Op, i: int) -> Tensor:
        number = [p.name for p in self.program if p.kind == "noise"].index(o.name)
        x = self.noise(number, self.columns, o["width"] or self.program.width)[i].double()
        if o["cut"] is None:
            return x
        outside = (1 - math.erf(o["cut"] / math.sqrt(2))) / 2
        return torch.special.ndtri(outside + (1 - 2 * outside) * torch.special.ndtr(x)).clamp(-o["cut"], o["cut"])

    # Routes -------------------------------------------------------------------------------------------------

    def route(self, o: Op, i: int) -> bool:
        if len(o.args) == 2 and not self.value(o.args[1], i):
            return False
        if o["rule"] == "topk":
            return i in self.taken(o)
        score = self.value(o.args[0], i)
        if o["rule"] == "choice":
            return int((score + self.p[f"{o['bias']}.bias"] if o["bias"] else score).argmax()) + 1 >= o["depth"]
        return score.item() >= o["threshold"] if o["rule"] == "threshold" else score.item() > o["threshold"]

    def taken(self, o: Op) -> set[int]:
        if o.name not in self.best:
            inside = [j for j in range(self.columns) if len(o.args) == 1 or self.value(o.args[1], j)]
            share = Fraction(o["capacity"]).limit_denominator(1000) * self.columns
            count = max(1, math.ceil(share) if o["rounding"] == "ceil" else math.floor(share))
            ranked = sorted(inside, key=lambda j: (-self.value(o.args[0], j).item(), j))
            self.best[o.name] = set(ranked[:count])
        return self.best[o.name]

    # Visits -------------------------------------------------------------------------------------------------

    def visit(self, o: Op, i: int) -> Tensor | None:
        if len(o.args) == 2 and not self.value(o.args[1], i):
            return None
        x = self.value(o.args[0], i)
        if x is None:
            return None
        shared = self.keys(o["keys"], 0, i + 1) if o["keys"] is not None else None
        own: list[Key] = []
        if o["slot"] in self.writers and self.writers[o["slot"]] is o:
            begin = max((e for e in self.ends if e <= i), default=0) if o["past"] is not None else 0
            old = self.keys(o["past"], 0, begin) if o["past"] is not None else []
            own = old + self.keys(o["slot"], begin, i)

        def attend(q: Tensor, k: Tensor, v: Tensor, limits: dict[str, Any]) -> Tensor:
            mine = [*own, self.stored.setdefault((o["slot"], i), (k, v, i))]
            if shared is None:
                return read(q, mine, i, limits)
            far = read(q, shared, i, limits)
            if o["gate"] is None:
                return far
            g = torch.sigmoid(self.gate(o, q, x))[:, None]
            return g * far + (1 - g) * read(q, mine[-o["window"] :], i, limits)

        return self.run(o, x, i, attend)

    def run(self, o: Op, x: Tensor, i: int, attend: Callable[..., Tensor]) -> Tensor:
        with self.operands(o):
            return self.row.block(o["index"], x, i, attend)

    def keys(self, slot: int, begin: int, end: int) -> list[Key]:
        """Keys in a slot of the columns ``begin .. end - 1`` whose tokens its visit ran for."""
        o, found = self.writers[slot], []
        for j in range(begin, end):
            x = self.value(o.args[0], j)
            if x is None:
                continue
            if (slot, j) not in self.stored:
                def take(q: Tensor, k: Tensor, v: Tensor, limits: Any, j: int = j) -> Tensor:
                    self.stored[slot, j] = k, v, j
                    raise _Enough

                with suppress(_Enough):
                    self.run(o, x, j, take)
            found.append(self.stored[slot, j])
        return found

    def gate(self, o: Op, q: Tensor, x: Tensor) -> Tensor:
        name = o["gate"]
        weight, bias = self.p[f"{name}.weight"], self.p[f"{name}.bias"]
        if o["gate_input"] == "query":
            return (q * weight).sum(-1) + bias
        return weight @ (x / (x.square().mean() + 1e-6).sqrt() * self.p[f"{name}.norm.weight"]) + bias

    @contextmanager
    def operands(self, o: Op):
        """A visit's LoRA and factors on the stock modules."""
        with ExitStack() as stack:
            block = self.row.blocks[o["index"]]
            if o["lora"]:
                self._low_rank(o, block, stack)
            if o["modulate"]:
                self._factors(o, block, stack)
            yield

    def _low_rank(self, o: Op, block: nn.Module, stack: ExitStack) -> None:
        for path, module in block.named_modules():
            name = f"{o['lora']}.{path}"
            if f"{name}.a" in self.p:
                table: dict[str, Any] = module._parameters
                weight = table["weight"]
                stack.callback(table.__setitem__, "weight", weight)
                table["weight"] = weight + self.p[f"{name}.b"] @ self.p[f"{name}.a"]

    def _factors(self, o: Op, block: nn.Module, stack: ExitStack) -> None:
        if o["clock"]:
            t = F.silu(self._time(o["clock"], o["step"]))
            factors = (self.p[f"{o['modulate']}.weight"] @ t + self.p[f"{o['modulate']}.bias"]).view(4, -1)
        else:
            factors = self.p[f"{o['modulate']}.weight"]
        gate_a, gate_m, read_a, read_m = factors
        config: Any = self.row.model.config
        places = PLACES.get(config.model_type, PLAIN)
        attention, mlp, end_a, end_m = (block.get_submodule(n) for n in places)

        def reads(scale: Tensor) -> Callable[..., Any]:
            def hook(module, args, kwargs):
                if args:
                    return (args[0] * (1 + scale), *args[1:]), kwargs
                return args, {**kwargs, "hidden_states": kwargs["hidden_states"] * (1 + scale)}

            return hook

        def adds(gate: Tensor) -> Callable[..., Any]:
            def hook(module, args, out):
                return (out[0] * (o["base"] + gate), *out[1:]) if isinstance(out, tuple) else out * (o["base"] + gate)

            return hook

        for module, scale in ((attention, read_a), (mlp, read_m)):
            stack.callback(module.register_forward_pre_hook(reads(scale), with_kwargs=True).remove)
        for module, gate in ((end_a, gate_a), (end_m, gate_m)):
            stack.callback(module.register_forward_hook(adds(gate)).remove)

    def _time(self, name: str, step: int) -> Tensor:
        width = self.p[f"{name}.rise.weight"].shape[1] // 2
        phase = torch.tensor([step / 10000 ** (i / width) for i in range(width)], dtype=torch.float64)
        inner = self.p[f"{name}.rise.weight"] @ torch.cat((phase.cos(), phase.sin())) + self.p[f"{name}.rise.bias"]
        return self.p[f"{name}.mix.weight"] @ F.silu(inner) + self.p[f"{name}.mix.bias"]


def _distance(rule: str, now: Tensor, before: Tensor) -> Tensor:
    if rule == "state":
        return ((now - before).norm() / now.norm())[None]
    p, q = torch.softmax(now, 0), torch.softmax(before, 0)
    if rule == "kl":
        return (q * (q / p).log()).sum()[None]
    return ((p * p.log()).sum() - (q * q.log()).sum()).abs()[None]
