"""The oracle: what a program's *text* means, on a stock model's own blocks, one token of one row at a time.

Values are computed on demand and remembered. There are no chunks, no caches, no schedules and no masks: attention is a
softmax over a Python list of keys. Of depthpass only the text's parser is used.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from fractions import Fraction
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from depthpass.fuzz.models import norm_of
from depthpass.fuzz.operands import beside, operands, silent
from depthpass.fuzz.stock_rows import Key, Row, read
from depthpass.ir import Op, parse_program

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid, "silu": F.silu, "tanh": torch.tanh, "gelu": F.gelu, "relu": torch.relu,
    "softmax": lambda x: torch.softmax(x, -1), "sqrt": torch.sqrt, "exp": torch.exp, "softplus": lambda x: x.exp().log1p(),
    "reciprocal": lambda x: 1 / x, "centre": lambda x: x - x.sum() / len(x),
}


class _Enough(Exception):
    """A visit's keys are known; the rest of the block need not run."""


class Meaning:
    """Values of a program on one row.

    Args:
        text: of the program.
        row: the row, workspace pads included.
        p: new parameters by name, without ``depth.``.
        prompt: real tokens in front of the pads.
        noise: ``(number, columns, width) -> [columns, width]``, standard normal.
        calls: sizes of the calls that the tokens come in; none = one.
        bits: keys and values of earlier calls in the slots of later visits of a block are kept in so many bits per number,
            as what they differ by from those of its first visit; None = as they are.
    """

    def __init__(
        self, text: str, row: Row, p: Mapping[str, Tensor], prompt: int, noise: Callable[..., Tensor],
        calls: Sequence[int] = (), bits: int | None = None,
    ) -> None:
        self.program, self.row, self.p, self.bits = parse_program(text), row, p, bits
        self.prompt, self.noise, self.ends = prompt, noise, list(accumulate(calls))
        self.pads = next((o["tokens"] for o in self.program if o.kind == "pad"), 0)
        self.writers = {o["slot"]: o for o in self.program.visits
                        if o["keys"] is None or o["gate"] is not None or o["update"]}
        self.columns = len(row.ids)
        self.ahead = next((o["tokens"] for o in self.program if o.kind == "ahead"), None)
        last = self.program.defs[self.program.output]
        self.last = last.args[0] if last.kind == "trim" else last.name
        self.seen: dict[tuple[str, int], Any] = {}
        self.stored: dict[tuple[int, int], Key] = {}
        self.best: dict[str, set[int]] = {}

    def handed_out(self) -> dict[str, Tensor]:
        """The stream before the head as ``output``, and every tap, for the real tokens."""
        outputs = {}
        for o in self.program:
            if o.kind in ("output", "tap"):
                name = o["name"] if o.kind == "tap" else "output"
                values = [self.value(o.args[0], i) for i in range(self.columns)]
                kept = values if self.trimmed(o.args[0]) else [
                    v for i, v in enumerate(values) if not self.prompt - 1 <= i < self.prompt + self.pads - 1
                ]
                kept = kept[: self.columns - self.pads]
                if isinstance(values[0], bool):
                    outputs[name] = torch.tensor(kept)
                elif o.kind == "tap" and o["head"]:
                    outputs[name] = self.row.head(torch.stack(kept))
                else:
                    outputs[name] = torch.stack(kept)
        return outputs

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
                if o["feed"] and self.prompt <= i < self.prompt + self.pads:
                    return self.row.fed(self.value(self.last, i - 1), i)
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
            case "point":
                return self.value(o.args[0 if beside(self.row.model) else 1], i)
            case "ffn":
                stream, read = (self.value(a, i) for a in o.args)
                return None if stream is None or read is None else stream + self.network(o, read, i)
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
            case "rescale":
                rms = math.sqrt(x.detach().square().mean().item() + o["eps"])
                return x * min(max(1 / rms, 1 / o["limit"]), o["limit"])
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
        if len(o.args) == 2 and not o["memory"] and not self.value(o.args[1], i):
            return None
        x = self.value(o.args[0], i)
        if x is None:
            return None
        shared = self.keys(o["keys"], 0, self.horizon(i)) if o["keys"] is not None else None
        if shared is not None and self.bits is not None:
            shared = [self.kept(self.writers[o["keys"]], key) if key[2] < self.begin(i) else key for key in shared]
        own = self.own(o, i) if o["slot"] in self.writers and self.writers[o["slot"]] is o else []
        end = self.horizon(i)

        def attend(q: Tensor, k: Tensor, v: Tensor, limits: dict[str, Any]) -> Tensor:
            mine = own if o["memory"] or end > i + 1 else [*own, self.stored.setdefault((o["slot"], i), (k, v, i))]
            if shared is None:
                return read(q, mine, i, limits, end)
            if o["update"]:
                return read(q, list({key[2]: key for key in (*shared, *mine)}.values()), i, limits, end)
            far = read(q, shared, i, limits, end)
            if o["gate"] is None:
                return far
            g = torch.sigmoid(self.gate(o, q, x))[:, None]
            return g * far + (1 - g) * read(q, mine[-o["window"] :], i, limits)

        return self.run(o, x, i, attend)

    def own(self, o: Op, i: int) -> list[Key]:
        """The keys in its own slot that a visit sees at column i; where it sees none later, its own one comes from the block."""
        if o["memory"]:
            return self.keys(o["slot"], 0, i + 1)
        end = self.horizon(i)
        if end > i + 1:
            return self.keys(o["slot"], 0, end)
        begin = self.begin(i)
        if o["past"] is not None:
            return self.keys(o["past"], 0, begin) + self.keys(o["slot"], begin, i)
        keys = self.keys(o["slot"], 0, i)
        return keys if self.bits is None else [self.kept(o, key) if key[2] < begin else key for key in keys]

    def begin(self, i: int) -> int:
        """The column at which the call with column i begins."""
        return max((e for e in self.ends if e <= i), default=0)

    def horizon(self, i: int) -> int:
        """One past the last column that a token sees."""
        if self.ahead is None:
            return i + 1
        return min(self.columns, (i // self.ahead + 1) * self.ahead) if self.ahead else self.columns

    def kept(self, o: Op, key: Key) -> Key:
        """What a cache of few bits makes of a key."""
        first = next(v for v in self.program.visits if v["index"] == o["index"] and v["slot"] in self.writers)
        if first is o or o["gate"] is not None:  # windows beside a gate are kept whole
            return key
        k, v, j = key
        (base_k, base_v, _), = self.keys(first["slot"], j, j + 1)
        return rounded(k, base_k, cast(int, self.bits)), rounded(v, base_v, cast(int, self.bits)), j

    def run(self, o: Op, x: Tensor, i: int, attend: Callable[..., Tensor]) -> Tensor:
        config: Any = self.row.model.config
        block = self.row.blocks[o["index"]]
        with operands(o, block, self.p, config.model_type), silent(block, config.model_type, o["part"] == "attention" or None):
            return self.row.block(o["index"], x, i, attend)

    def network(self, o: Op, read: Tensor, i: int) -> Tensor:
        """What the network of a block adds to a stream, of what it reads: the block on that, without its attention."""
        config: Any = self.row.model.config

        def nothing(q: Tensor, k: Tensor, v: Tensor, limits: Any) -> Tensor:
            return q.new_zeros(q.shape[0], v.shape[-1])

        with silent(self.row.blocks[o["index"]], config.model_type, network=False):
            return self.row.block(o["index"], read, i, nothing) - read

    def keys(self, slot: int, begin: int, end: int) -> list[Key]:
        """Keys in a slot of the columns ``begin .. end - 1`` whose tokens its visit ran for."""
        o, keys = self.writers[slot], []
        for j in range(begin, end):
            x = self.value(o.args[1] if o["memory"] else o.args[0], j)
            if x is None:
                continue
            if (slot, j) not in self.stored:
                def take(q: Tensor, k: Tensor, v: Tensor, limits: Any, j: int = j) -> Tensor:
                    self.stored[slot, j] = k, v, j
                    raise _Enough

                with suppress(_Enough):
                    self.run(o, x, j, take)
            keys.append(self.stored[slot, j])
        return keys

    def gate(self, o: Op, q: Tensor, x: Tensor) -> Tensor:
        name = o["gate"]
        weight, bias = self.p[f"{name}.weight"], self.p[f"{name}.bias"]
        if o["gate_input"] == "query":
            return (q * weight).sum(-1) + bias
        return weight @ (x / (x.square().mean() + 1e-6).sqrt() * self.p[f"{name}.norm.weight"]) + bias


def _distance(rule: str, now: Tensor, before: Tensor) -> Tensor:
    if rule == "state":
        return ((now - before).norm() / now.norm())[None]
    if rule == "cosine":
        # A loop may start from zeros, which point nowhere.
        return (1 - now @ before / (now.norm() * before.norm()).clamp_min(1e-16))[None]
    if rule == "argmax":
        return (now.argmax() != before.argmax()).double()[None]
    p, q = torch.softmax(now, 0), torch.softmax(before, 0)
    if rule == "kl":
        return (q * (q / p).log()).sum()[None]
    return ((p * p.log()).sum() - (q * q.log()).sum()).abs()[None]


def rounded(x: Tensor, base: Tensor, bits: int) -> Tensor:
    """``[heads, dim]`` as a base plus a difference in steps between each head's least and greatest one."""
    change = x - base
    least, most = change.amin(-1, keepdim=True), change.amax(-1, keepdim=True)
    step = (most - least) / (2**bits - 1)
    return base + least + step * ((change - least) / step.where(step != 0, 1.0)).round()
