"""The ops that look at one token only: everything about each of them in one place.

Torch is imported where something is computed: programs are read, checked and rewritten without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING

from depthpass.errors import VerifyError
from depthpass.ir.definitions import STEP, AttrDef, OpDef, Param, Type, Work, expect, where

if TYPE_CHECKING:
    from torch import Tensor, nn

    from depthpass.ir.program import Op, Program

DISTANCES = ("state", "cosine", "kl", "entropy", "argmax")

ACTIVATIONS = ("sigmoid", "silu", "tanh", "gelu", "relu", "softplus", "softmax", "centre", "exp", "sqrt", "reciprocal")
"""Functions of one stream; ``centre`` takes the mean over its channels away."""


# What they compute.


def linear(*xs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A learned affine map of its arguments side by side."""
    import torch

    return torch.nn.functional.linear(xs[0] if len(xs) == 1 else torch.cat(xs, -1), weight, bias)


def weigh(x: Tensor, weight: Tensor) -> Tensor:
    return x * weight


def scale(x: Tensor, by: float) -> Tensor:
    return x * by


def mul(x: Tensor, y: Tensor) -> Tensor:
    return x * y


def act(x: Tensor, fn: str) -> Tensor:
    return _functions()[fn](x)


@cache
def _functions() -> Mapping[str, Callable[[Tensor], Tensor]]:
    import torch
    import torch.nn.functional as F

    return {
        "sigmoid": torch.sigmoid, "silu": F.silu, "tanh": torch.tanh, "gelu": F.gelu, "relu": F.relu,
        "softplus": F.softplus, "softmax": lambda x: torch.softmax(x, -1), "centre": lambda x: x - x.mean(-1, keepdim=True),
        "exp": torch.exp, "sqrt": torch.sqrt, "reciprocal": torch.reciprocal,
    }


def rms(x: Tensor, eps: float, weight: Tensor | None = None) -> Tensor:
    """``x / rms(x)`` over the last dimension."""
    import torch

    y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return y if weight is None else y * weight


def rescale(x: Tensor, eps: float, limit: float) -> Tensor:
    """``x / rms(x)``, by at most ``limit`` up or down; no gradient flows through the factor."""
    factor = (x.detach().square().mean(-1, keepdim=True) + eps).rsqrt()
    return x * factor.clamp(1 / limit, limit)


def pick(x: Tensor, index: int) -> Tensor:
    return x[..., index, None]


def distance(now: Tensor, before: Tensor, rule: str) -> Tensor:
    """How far a stream has moved, ``[..., 1]``."""
    import torch

    if rule == "state":
        return (now - before).norm(dim=-1, keepdim=True) / now.norm(dim=-1, keepdim=True)
    if rule == "cosine":
        return 1 - torch.nn.functional.cosine_similarity(now, before, dim=-1)[..., None]
    if rule == "argmax":
        return (now.argmax(-1, keepdim=True) != before.argmax(-1, keepdim=True)).to(now)
    now, before = torch.log_softmax(now, -1), torch.log_softmax(before, -1)
    if rule == "kl":
        return (before.exp() * (before - now)).sum(-1, keepdim=True)
    return ((now.exp() * now).sum(-1, keepdim=True) - (before.exp() * before).sum(-1, keepdim=True)).abs()


def select(*args: Tensor, cdf: float) -> Tensor:
    """Of T states and T exit gates, per token the first state whose cumulative exit probability reaches ``cdf``."""
    import torch

    half = len(args) // 2
    states, gates = args[:half], args[half:]
    out, left, reached = states[-1], torch.ones_like(gates[0]), torch.zeros_like(gates[0])
    open_ = torch.ones_like(gates[0], dtype=torch.bool)
    for state, gate in zip(states[:-1], gates):
        reached, left = reached + left * gate, left * (1 - gate)
        exits = open_ & (reached >= cdf)
        out, open_ = torch.where(exits, state, out), open_ & ~exits
    return out


def detach(x: Tensor) -> Tensor:
    return x.detach()


# What they take.


def _same_width(program: Program, o: Op, args: Sequence[Type]) -> None:
    expect(len({a.width for a in args}) == 1, o, "equal widths", f"{[a.width for a in args]}")


def broadcast(want: str) -> Callable[[Program, Op, Sequence[Type]], None]:
    """Equal widths, or streams of width 1 beside them."""
    def accepts(program: Program, o: Op, args: Sequence[Type]) -> None:
        widths = {a.width for a in args} - {1}
        expect(len(widths) <= 1, o, want, f"{sorted(widths)}")

    return accepts


def hidden_width(program: Program, o: Op, args: Sequence[Type]) -> None:
    """A stream of the model's own width."""
    expect(args[0].width == program.width, o, f"width {program.width}", f"width {args[0].width}")


def everywhere(o: Op, stream: Type) -> None:
    """A stream that every token has."""
    expect(stream.absent == 0, o, "a stream that every token has",
           f"one that is absent at the first {stream.absent} tokens; add it to another stream first")


def _norm_accepts(program: Program, o: Op, args: Sequence[Type]) -> None:
    hidden_width(program, o, args)
    everywhere(o, args[0])


def _select_accepts(program: Program, o: Op, args: Sequence[Type]) -> None:
    half = len(args) // 2
    expect(len(args) % 2 == 0 and all(a.width == program.width for a in args[:half])
           and all(a.width == 1 for a in args[half:]), o,
           "T streams followed by T gates of width 1", f"widths {[a.width for a in args]}")


def _select_check(program: Program, o: Op) -> None:
    if not 0 < o["cdf"] <= 1:
        raise VerifyError(f"{where(o)}: expected a cdf in (0, 1], got {o['cdf']}.")


def _pick_accepts(program: Program, o: Op, args: Sequence[Type]) -> None:
    expect(o["index"] < args[0].width, o, f"a column in 0..{args[0].width - 1}", str(o["index"]))


# The parameters of a linear map, and the module that holds them.


def _linear_parameters(o: Op, widths: Sequence[int], hidden: int) -> list[Param]:
    if o["identity"] and widths[-1] != o["out"]:
        raise VerifyError(f"{where(o)}: identity needs a last argument of width {o['out']}, got {widths[-1]}.")
    weight = Param(f"{o['name']}.weight", (o["out"], sum(widths)), o["init"], identity=bool(o["identity"]))
    return [weight, Param(f"{o['name']}.bias", (o["out"],))] if o["bias"] else [weight]


def _linear_module(declared: Mapping[str, Param], like: Tensor) -> nn.Module:
    """A plain ``nn.Linear``: what tools such as PEFT know how to treat."""
    import torch

    weight = declared["weight"]
    out, into = weight.shape
    module = torch.nn.Linear(into, out, bias="bias" in declared, device=like.device)
    initialise_linear(module, weight.init, weight.identity)
    return module.to(dtype=like.dtype)


def initialise_linear(module: nn.Linear, std: float, identity: bool = False) -> None:
    """Start a linear map at random, at zero (``std`` 0) or as the identity of its last columns."""
    import torch

    if module.weight.is_meta:
        return
    with torch.no_grad():
        if std:
            module.weight.normal_(0.0, std)
        else:
            module.weight.zero_()
        if identity:
            # The trailing square block is the identity: of concatenated inputs, the last one passes through.
            module.weight.zero_()
            module.weight[:, -module.out_features :].fill_diagonal_(1.0)
        if module.bias is not None:
            module.bias.zero_()


def _apply_linear(module: nn.Module, o: Op, streams: Sequence[Tensor]) -> Tensor:
    import torch

    return module(streams[0] if len(streams) == 1 else torch.cat(tuple(streams), -1))


def _gain(fill: str | None) -> Callable[[Op, Sequence[int], int], list[Param]]:
    """A vector of the stream's width that starts at an attribute, or at one; only where the op has a name."""
    def parameters(o: Op, widths: Sequence[int], hidden: int) -> list[Param]:
        start = 1.0 if fill is None else o[fill]
        return [Param(f"{o['name']}.weight", (widths[0],), fill=start)] if o["name"] else []

    return parameters


# What they cost.


def _linear_work(o: Op, widths: Sequence[int], out: int, hidden: int) -> Work:
    return Work(flops=2 * sum(widths) * out, saved=sum(widths))


def _logits_work(o: Op, widths: Sequence[int], out: int, hidden: int) -> Work:
    return Work(flops=2 * hidden * out, note="not counted: weights that a head reads again for exit criteria")


def _elementwise(each: int, saved: bool) -> Callable[[Op, Sequence[int], int, int], Work]:
    """So many operations per element of the result, which is kept for the backward pass or not."""
    return lambda o, widths, out, hidden: Work(elementwise=each * out, saved=out if saved else 0)


NAME = AttrDef(str, required=True)
SCOPE = AttrDef(str, required=True, scope=True)

LOCAL_OPS = (
    OpDef(
        "linear", "name", (1, None),
        dict(name=SCOPE, out=AttrDef(int, required=True, low=1, bounded=True), bias=AttrDef(bool, True),
             init=AttrDef(float, 0.02, low=0.0), identity=AttrDef(bool, False)),
        width=lambda o, widths, hidden: o["out"], parameters=_linear_parameters, holder=_linear_module, meaning=linear,
        applied=_apply_linear, work=_linear_work,
    ),
    OpDef(
        "weigh", "name", attrs=dict(name=SCOPE, init=AttrDef(float, 1.0)), parameters=_gain("init"), meaning=weigh,
        work=_elementwise(1, True),
    ),
    OpDef(
        "scale", "by", attrs=dict(by=AttrDef(float, required=True)), meaning=scale, constants=("by",),
        work=_elementwise(1, False),
    ),
    OpDef("mul", None, (2, 2), accepts=broadcast("equal widths, or one of 1"), meaning=mul, work=_elementwise(1, True)),
    OpDef(
        "act", "fn", attrs=dict(fn=AttrDef(str, required=True, choices=ACTIVATIONS)), meaning=act, constants=("fn",),
        work=_elementwise(1, True),
    ),
    OpDef(
        "rms", attrs=dict(name=AttrDef(str, scope=True), eps=AttrDef(float, 1e-6, low=0.0)), parameters=_gain(None),
        meaning=rms, constants=("eps",), work=_elementwise(5, True),
    ),
    OpDef(
        "rescale", attrs=dict(eps=AttrDef(float, 1e-6, low=0.0), limit=AttrDef(float, 5.0, low=1.0)), meaning=rescale,
        constants=("eps", "limit"), work=_elementwise(5, True),
    ),
    OpDef("norm", accepts=_norm_accepts, work=None, runs=frozenset({STEP})),
    OpDef(
        "logits", "width", attrs=dict(width=AttrDef(int, required=True, low=1)), accepts=hidden_width,
        width=lambda o, widths, hidden: o["width"], work=_logits_work,
    ),
    OpDef(
        "distance", "rule", (2, 2), dict(rule=AttrDef(str, required=True, choices=DISTANCES)), accepts=_same_width,
        width=lambda o, widths, hidden: 1, meaning=distance, constants=("rule",),
        work=lambda o, widths, out, hidden: Work(elementwise=6 * widths[0]),
    ),
    OpDef(
        "pick", "index", attrs=dict(index=AttrDef(int, required=True, low=0)), accepts=_pick_accepts,
        width=lambda o, widths, hidden: 1, meaning=pick, constants=("index",), work=None,
    ),
    OpDef(
        "select", "rule", (2, None),
        dict(rule=AttrDef(str, required=True, choices=("cdf",)), cdf=AttrDef(float, required=True)), check=_select_check,
        accepts=_select_accepts, width=lambda o, widths, hidden: hidden, meaning=select, constants=("cdf",),
        work=_elementwise(2, False),
    ),
    OpDef("detach", meaning=detach, work=None),
)
