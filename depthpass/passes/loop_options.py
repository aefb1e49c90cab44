"""What the options of a loop have to fulfil together."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from depthpass.passes.base import require
from depthpass.passes.draws import draw
from depthpass.passes.times import SHOWN, count_at

if TYPE_CHECKING:
    from depthpass.passes.loop import Loop


def check_loop(loop: Loop) -> None:
    """Check the options of a loop against each other.

    Raises:
        SpecError: naming the field.
    """
    require(loop.start >= 0, "loop.start", "a position of at least 0", loop.start)
    require(loop.end is None or loop.end > loop.start, "loop.end", f"a position above start={loop.start}", loop.end,
            "Ranges are half-open.")
    _check_times(loop)
    known = isinstance(loop.damped, bool) or 0 < loop.damped <= 2
    require(known, "loop.damped", "True, False or a part in (0, 2]", loop.damped)
    require(loop.state == "input" or loop.inject is not None, "loop.inject", f"'add', 'concat' or 'bounded' with state="
            f"{loop.state!r}", loop.inject, "Without it the loop would not see its input at all.")
    _check_attention(loop)
    require(loop.noise_std > 0, "loop.noise_std", "a positive number", loop.noise_std)
    cut = loop.noise_cut
    require(cut is None or 0 < cut < math.inf, "loop.noise_cut", "a positive number", cut)
    for name, default in (("noise_std", 1.0), ("noise_cut", None)):
        require(getattr(loop, name) == default or loop.state == "noise", f"loop.{name}", "state='noise' beside it",
                loop.state)
    kind, _, count = loop.kv.partition(":")
    counted = count.isdigit() and int(count) > 0
    known = counted if kind == "mod" else kind in ("own", "first", "last", "latest", "anchor") and not count
    require(known or (kind == "anchor" and counted), "loop.kv", "own, first, last, latest, mod:k, anchor or anchor:k", loop.kv,
            _of_huginn(loop.kv))
    require(kind != "latest" or (loop.exit is not None and loop.skip), "loop.kv", "another policy without an exit that "
            "skips visits", loop.kv, "Every token takes all iterations then: kv='own' is the same.")
    _check_exit(loop)
    require(loop.lora_rank is None or loop.lora_rank >= 1, "loop.lora_rank", "at least 1", loop.lora_rank)
    require(not (loop.timestep and loop.scales), "loop.scales", "False with a timestep", loop.scales,
            "A time encoding already gives every visit scales and gates.")
    require(loop.residual == "full" or not loop.timestep, "loop.residual", "'full' with a timestep", loop.residual,
            "A time encoding already gives every visit gates.")
    require(loop.scope.isidentifier(), "loop.scope", "a plain name of letters, digits and _", loop.scope)


def _check_attention(loop: Loop) -> None:
    """A visit whose queries come from another stream than its keys takes neither operands nor foreign keys nor routed tokens."""
    if loop.inject != "attention":
        return
    alone = {"state": "input", "kv": "own", "lora_rank": None, "timestep": False, "scales": False, "residual": "full"}
    for name, value in alone.items():
        require(getattr(loop, name) == value, f"loop.{name}", f"{value!r} with inject='attention'", getattr(loop, name))
    require(loop.exit is None or not loop.skip, "loop.skip", "False with inject='attention'", loop.skip,
            "Tokens that left would have no queries.")


def _check_times(loop: Loop) -> None:
    times = loop.times
    if isinstance(times, tuple):
        low, high = times
        require(1 <= low <= high, "loop.times", "a range [low, high] with 1 <= low <= high", list(times))
    elif isinstance(times, str):
        count_at(times, SHOWN)
        for name in ("taps", "exit", "lora_rank", "scales"):
            value = getattr(loop, name)
            require(not value, f"loop.{name}", f"nothing beside times={times!r}", value,
                    "Rows of one batch would have different ones. Use a number or a range.")
    else:
        require(times >= 1, "loop.times", "at least 1", times)
    for name in ("mean", "eval_times"):
        value = getattr(loop, name)
        require(value is None or isinstance(times, tuple), f"loop.{name}", "a range of times beside it", times)
    require(loop.sigma == 0.5 or isinstance(times, tuple), "loop.sigma", "a range of times beside it", times)
    require(loop.mean is None or loop.mean > 0, "loop.mean", "a positive number", loop.mean)
    require(loop.sigma >= 0, "loop.sigma", "at least 0", loop.sigma)
    require(loop.eval_times is None or loop.eval_times >= 1, "loop.eval_times", "at least 1", loop.eval_times)
    require(loop.bptt is None or loop.bptt >= 1, "loop.bptt", "at least 1 iteration", loop.bptt)


def _least(loop: Loop) -> int:
    """The smallest count that can occur."""
    return loop.times if isinstance(loop.times, int) else loop.times[0] if isinstance(loop.times, tuple) else 1


def _check_exit(loop: Loop) -> None:
    if loop.exit is None:
        require(loop.criterion == "cdf", "loop.exit", f"a value to leave at beside criterion={loop.criterion!r}", None)
        require(loop.skip, "loop.exit", "a value to leave at beside skip=False", None)
        return
    cdf = loop.criterion == "cdf"
    require(0 < loop.exit <= (1 if cdf else math.inf), "loop.exit", "a probability in (0, 1]" if cdf else
            "a positive distance", loop.exit)
    if loop.criterion == "argmax":
        require(loop.exit == int(loop.exit), "loop.exit", "a whole number of iterations with criterion='argmax'", loop.exit)
    least = {"entropy": 3, "argmax": int(loop.exit) + 2}.get(loop.criterion, 2)
    require(_least(loop) >= least, "loop.times", "at least 2 with an exit" if least == 2 else
            f"at least {least} with criterion={loop.criterion!r}", loop.times,
            "" if least == 2 else "It compares iterations, and there must be one left to skip.")
    require(cdf or loop.skip, "loop.skip", f"True with criterion={loop.criterion!r}", loop.skip)
    require(not loop.skip or loop.kv in ("own", "first", "latest"), "loop.kv", "'own', 'first' or 'latest' with an exit "
            "that skips visits",
            loop.kv, "The slot of a later iteration does not hold the tokens that left before it.")


def settled_times(loop: Loop, tokens: int | None, drawn: bool, most: bool) -> int:
    """The loop count of a range or an expression, as :meth:`depthpass.passes.base.Pass.settled` has it."""
    if isinstance(loop.times, str):
        return count_at(loop.times, SHOWN if tokens is None else tokens)
    assert isinstance(loop.times, tuple)
    low, high = loop.times
    # Poisson(0) + 1 = 1: a mean of next to nothing stands for ranges around 1.
    mean = max((low + high) / 2 - 1, 1e-6) if loop.mean is None else loop.mean
    fixed = loop.eval_times or min(max(round(mean) + 1, low), high)
    return max(high, fixed) if most else draw(mean, loop.sigma, low, high) if drawn else fixed


def _of_huginn(name: str) -> str:
    """What a policy of Huginn's public code is called here, or why it is not there; empty for other names."""
    if name.startswith("always-last"):
        return ("Huginn's always-last takes a token's last keys in iteration t only if some token of the row so far left before "
                "it, so what a token reads depends on the exits of all others. kv='latest' takes the last ones up to t.")
    known = {"full": "own", "skip": "own", "latest-m4": "latest", "available-m4": "latest", "compress-anchor": "anchor"}
    return f"Huginn's {name} is kv={known[name]!r} here." if name in known else ""
