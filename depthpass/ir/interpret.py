"""What a program means: a reference interpreter, token by token on demand, for one row without padding.

It has no schedule, no chunks and no caches: the value of an op at a token is computed when something asks for it and
remembered. Slow and short on purpose; lowerings are tested against it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor

from depthpass.errors import LoweringError
from depthpass.ir.ops import OPS
from depthpass.ir.program import Op, Program, writes_slot
from depthpass.ir.shares import tokens_of
from depthpass.ir.structural_ops import asks, keys_from
from depthpass.ir.verify import infer


class Block(Protocol):
    """A block seen from one token."""

    def keys(self, x: Tensor, position: int) -> Any:
        """What later tokens attend to: computed from the block's input at this position."""
        ...

    def __call__(
        self, x: Tensor, position: int, keys: Sequence[Any], own: Sequence[Any] = (), gate: str = ""
    ) -> Tensor:
        """The block's output.

        Args:
            x: its input, ``[width]``.
            position: of the token in the row.
            keys: keys of the slot the visit reads, in order, this token's included.
            own: for a gated visit the last ``window`` of its own keys, to be mixed in with ``gate``.
            gate: name of the gate's parameters; empty for a visit without one.
        """
        ...

    def attention(self, x: Tensor, position: int, keys: Sequence[Any]) -> Tensor:
        """The block's input plus what its attention adds; only programs with parts of blocks need it."""
        ...

    def point(self, x: Tensor, a: Tensor) -> Tensor:
        """What the feed-forward branch reads: ``a``, or the block's input ``x``; likewise."""
        ...

    def ffn(self, a: Tensor, read: Tensor) -> Tensor:
        """``a`` plus what the feed-forward branch makes of ``read``; likewise."""
        ...


class Interpretation:
    """Values of a program on one row.

    Args:
        program: a verified program without LoRA and modulation, which depend on the model.
        embed: ``[tokens, width]``.
        blocks: one per physical block.
        norm: the stock final norm, for one token.
        parameters: the program's new parameters by name (see :func:`depthpass.ir.parameters`).
        noise: ``[tokens, width]`` of standard deviation 1, read by every ``noise``.
        calls: sizes of the calls that the tokens came in; None = all in one.
        head: the stock head, for one normed token; only ``logits`` needs it.
        pad: embedding of a pad token ``[width]``; only ``pad`` needs it.
        prompt: tokens before the pads; None = all.
    """

    def __init__(
        self, program: Program, embed: Tensor, blocks: Sequence[Block], norm: Callable[[Tensor], Tensor],
        parameters: Mapping[str, Tensor] | None = None, noise: Tensor | None = None,
        calls: Sequence[int] | None = None, head: Callable[[Tensor], Tensor] | None = None,
        pad: Tensor | None = None, prompt: int | None = None,
    ) -> None:
        self.program, self.embed, self.blocks, self.norm = program, embed, blocks, norm
        self.parameters, self.noise = parameters or {}, noise
        self.tokens, self.head = len(embed), head
        self.pad, self.prompt = pad, len(embed) if prompt is None else prompt
        self.types = infer(program)
        if calls and any(t.pads for t in self.types.values()):
            raise LoweringError("the interpreter runs a program with pads in one call; leave calls out.")
        self._call_ends = tuple(accumulate(calls or ()))
        self._writers = {writes_slot(v): v for v in program.visits}
        self._memo: dict[tuple[str, int], Any] = {}
        self._stored: dict[tuple[int, int], Any] = {}
        self._best: dict[str, frozenset[int]] = {}

    def output(self) -> Tensor:
        """The stream that goes to the head, ``[tokens, width]``."""
        return self.stream(self.program.output)

    def stream(self, name: str) -> Tensor:
        """A value that every token has, ``[tokens, width]``, pads included."""
        return torch.stack([self.value(name, i) for i in range(self.tokens + self.types[name].pads)])

    def value(self, name: str, i: int) -> Any:
        """A value at one token; None where it is absent or not routed."""
        if (name, i) not in self._memo:
            o = self.program.defs[name]
            self._memo[name, i] = self._routed(o, i) if o.kind == "route" else self._compute(o, i)
        return self._memo[name, i]

    def _compute(self, o: Op, i: int) -> Tensor | None:
        if o.kind == "delay" and o["group"] is not None:
            last = i // o["group"] * o["group"] - 1
            return self.value(o.args[0], last) if last >= 0 else None
        if o.kind == "delay":
            return self.value(o.args[0], i - o["tokens"]) if i >= o["tokens"] else None
        if asks(o) and not self.value(o.args[1], i):
            return None
        if o.kind == "gather":
            return self.value(o.args[0], i) if self.value(o.args[1], i) else None
        if o.kind == "scatter":
            base, routed = self.value(o.args[0], i), self.value(o.args[2], i)
            update = self.value(o.args[1], i) if routed else None
            return base if update is None else update if o["mode"] == "replace" else base + update
        if o.kind in ("pad", "trim"):
            return self._padded(o, i)
        args = [self.value(a, i) for a in o.args]
        if o.kind == "add":
            there = [a for a in args if a is not None]
            return reduce(torch.add, there) if there else None
        if any(a is None for a in args):
            return None
        if o.kind == "ffn":
            return self.blocks[o["index"]].ffn(*args)
        if o.kind == "point":
            return self.blocks[o["index"]].point(*args)
        return self._visit(o, args[0], i) if o.kind == "block" else self._local(o, args, i)

    def _padded(self, o: Op, i: int) -> Tensor | None:
        """Pads stand after the prompt; trimmed, the prompt's last token has what the last pad has."""
        m, end = o["tokens"], self.prompt
        if o.kind == "trim":
            return self.value(o.args[0], i if i < end - 1 else i + m)
        if not end <= i < end + m:
            return self.value(o.args[0], i if i < end else i - m)
        if o["feed"]:
            return self.value(self.program.fed, i - 1)
        if self.pad is None:
            raise LoweringError(f"the interpreter cannot run %{o.name} = pad without the embedding of a pad.")
        return self.pad

    def _local(self, o: Op, args: list[Tensor], i: int) -> Tensor:
        """Ops that work on each token alone."""
        definition = OPS[o.kind]
        if definition.meaning is not None and (weights := self._weights(o)) is not None:
            return definition.meaning(*args, **definition.given(o), **weights)
        match o.kind:
            case "embed":
                return self.embed[i]
            case "zeros":
                return self.embed.new_zeros(o["width"] or self.program.width)
            case "noise" if self.noise is not None:
                return o["std"] * _cut(self.noise[i, : o["width"] or self.program.width], o["cut"])
            case "norm":
                return self.norm(args[0])
            case "logits" if self.head is not None:
                return self.head(args[0])
        raise LoweringError(f"the interpreter cannot run %{o.name} = {o.kind}: it lacks parameters, noise or a head, or pads.")

    def _weights(self, o: Op) -> dict[str, Tensor] | None:
        """The parameters of a token-local op by their names inside its module; None where some are missing."""
        widths = [self.types[a].width for a in o.args]
        declared = OPS[o.kind].parameters(o, widths, self.program.width)
        if any(p.name not in self.parameters for p in declared):
            return None
        return {p.leaf: self.parameters[p.name] for p in declared}

    def _visit(self, o: Op, x: Tensor, i: int) -> Tensor:
        if o["lora"] or o["modulate"]:
            raise LoweringError(f"the interpreter cannot run %{o.name}: LoRA and modulation depend on the model.")
        block = self.blocks[o["index"]]
        if o["gate"] is None:
            keys = self._updated(o, i) if o["update"] else self._keys(o["slot"] if o["keys"] is None else o["keys"], i)
            if o["past"] is not None:
                start = max((e for e in self._call_ends if e <= i), default=0)
                keys = self._keys(o["past"], start - 1) + self._keys(o["slot"], i, start)
            return block(x, i, keys) if o["part"] == "whole" else block.attention(x, i, keys)
        return block(x, i, self._keys(o["keys"], i), self._keys(o["slot"], i)[-o["window"] :], o["gate"])

    def _keys(self, slot: int, i: int, first: int = 0) -> list[Any]:
        """Keys in a slot from token ``first`` to token i: those of the tokens that its visit ran for."""
        return [key for j in range(first, self._end(slot, i)) if (key := self._key(slot, j)) is not None]

    def _updated(self, o: Op, i: int) -> list[Any]:
        """Keys of the slot that a visit shares up to token i, a token's own ones in their place where it has some."""
        pairs = [(self._key(o["slot"], j), self._key(o["keys"], j)) for j in range(self._end(o["keys"], i))]
        return [theirs if own is None else own for own, theirs in pairs if own is not None or theirs is not None]

    def _key(self, slot: int, j: int) -> Any:
        """What token j has in a slot; None = its visit did not run for the token."""
        writer = self._writers[slot]
        if (slot, j) not in self._stored and (x := self.value(keys_from(writer), j)) is not None:
            self._stored[slot, j] = self.blocks[writer["index"]].keys(x, j)
        return self._stored.get((slot, j))

    def _end(self, slot: int, i: int) -> int:
        """One past the last token that token i sees."""
        ahead, total = self.program.ahead, self.tokens + self.types[self._writers[slot].name].pads
        return i + 1 if ahead is None else min(total, (i // ahead + 1) * ahead) if ahead else total

    def _routed(self, o: Op, i: int) -> bool:
        """Whether a route takes token i; only ``topk`` looks at other tokens."""
        if len(o.args) == 2 and not self.value(o.args[1], i):
            return False
        if o["rule"] == "threshold":
            return self.value(o.args[0], i).item() >= o["threshold"]
        if o["rule"] == "above":
            return self.value(o.args[0], i).item() > o["threshold"]
        if o["rule"] == "choice":
            score = self.value(o.args[0], i)
            return int((score + self.parameters[f"{o['bias']}.bias"] if o["bias"] else score).argmax()) + 1 >= o["depth"]
        if o.name not in self._best:
            total = self.tokens + self.types[o.name].pads
            inside = [j for j in range(total) if len(o.args) == 1 or self.value(o.args[1], j)]
            k = tokens_of(o["capacity"], o["rounding"], total)
            # Ties go to the lowest index: sorting is stable.
            self._best[o.name] = frozenset(sorted(inside, key=lambda j: -self.value(o.args[0], j).item())[:k])
        return i in self._best[o.name]

    def losses(self) -> dict[str, Tensor]:
        """Training losses by name, before their coefficients."""
        sums: dict[str, Tensor] = {}
        for o in self.program.losses:
            sums[o["name"]] = sums.get(o["name"], self.embed.new_zeros(())) + self._loss(o)
        return sums

    def _loss(self, o: Op) -> Tensor:
        score = {i: self.value(o.args[0], i) for i in range(self.tokens)}
        route = self.program.defs[o.args[1]] if len(o.args) == 2 else None
        inside = [i for i in score if route is None or len(route.args) == 1 or self.value(route.args[1], i)]
        if o["rule"] == "z":
            terms = [score[i].logsumexp(-1).square() for i in inside]
            return torch.stack(terms).mean() if terms else self.embed.new_zeros(())
        if o["rule"] == "balance":
            p = torch.stack(list(score.values()))
            share = torch.bincount(p.argmax(-1), minlength=p.shape[1]) / len(p)
            return p.shape[1] * (share * p.mean(0)).sum()
        signs = [1.0 if route is None or self.value(route.name, i) else -1.0 for i in inside]
        terms = [-torch.nn.functional.logsigmoid(sign * score[i]) for i, sign in zip(inside, signs, strict=True)]
        return torch.stack(terms).mean() if terms else self.embed.new_zeros(())


def _cut(x: Tensor, cut: float | None) -> Tensor:
    """Draws cut off at ``cut``: each goes where the cut distribution has as much below it."""
    if cut is None:
        return x
    below, outside = torch.special.ndtr(x), (1 - math.erf(cut / math.sqrt(2))) / 2
    return torch.special.ndtri(outside + (1 - 2 * outside) * below).clamp(-cut, cut)
