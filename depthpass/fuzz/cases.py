"""Random cases: plain data from a seed and a number, so that a case can be printed, stored and shrunk."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from depthpass.fuzz.models import ARCHITECTURES

Case = dict[str, Any]
MODULATED = tuple(a for a in ARCHITECTURES if a != "opt")  # OPT's MLP is no module
RECORDED = ("llama", "qwen2", "gpt2", "gpt_neox", "olmo", "stablelm", "qwen3", "granite")
"""Without windows and experts, which the derived depth bounds from above."""
LENGTHS = ("ceil(log2(n))", "ceil(n/3)", "floor(sqrt(n))+1")
LAYERS = 4
DOORS = ("decoder", "base_model", "wrapped", "embeds", "checkpointing", "hooked")


def make_case(seed: int, number: int, compiled: float = 0.004, models: Sequence[str] = ARCHITECTURES) -> Case:
    """Case ``number`` of a seed.

    Args:
        compiled: share of cases that compile with inductor, which takes most of a minute each.
        models: architectures to draw from.
    """
    rng = random.Random(f"depthpass {seed} {number}")
    case: Case = {"arch": rng.choice(models), "layers": LAYERS, "seed": rng.randrange(1000)}
    case["spec"] = specs(rng, case["arch"])
    case |= rows(rng)
    case |= levels(rng, compiled)
    case["checks"] = checks(rng, case)
    return case


def rows(rng: random.Random) -> Case:
    lengths = [rng.randint(2, 9) for _ in range(rng.choice((1, 1, 2, 3)))]
    padded = rng.random() < 0.7
    if not padded:
        lengths = lengths[:1] * len(lengths)
    return {
        "lengths": lengths, "side": rng.choice(("left", "left", "right")) if padded else "none",
        "positions": rng.random() < 0.5, "mask": padded or rng.random() < 0.3,
    }


def levels(rng: random.Random, compiled: float) -> Case:
    lowering = rng.choice(("eager", "auto", "auto", "scheduled"))
    if rng.random() < compiled:
        lowering = "inductor"
    return {
        "lowering": lowering, "chunk": rng.choice((None, None, 1, 2)), "stack": rng.random() < 0.8,
        "schedule": "fixed_point" if rng.random() < 0.08 else "sequential",
    }


def checks(rng: random.Random, case: Case) -> list[Case]:
    """What is done with the model, in this order."""
    made: list[Case] = [{"do": "forward", "loss": rng.random() < 0.4}]
    if rng.random() < 0.4:
        made.append({"do": "gradients"})
    if rng.random() < 0.5:
        made.append(calls(rng, case))
    if rng.random() < 0.3:
        made.append({"do": "generate", "new": rng.randint(2, 4), "beams": rng.choice((1, 1, 2, 3))})
    if rng.random() < 0.12:
        made.append({"do": "save", "auto": rng.random() < 0.5})
    if rng.random() < 0.3:
        made.append({"do": "door", "which": rng.choice(DOORS)})
    if rng.random() < 0.25 and case["arch"] in RECORDED:
        made.append({"do": "depth"})
    if rng.random() < 0.25:
        made.append(packed(rng))
    return made


def packed(rng: random.Random) -> Case:
    """Several sequences in a row, one after the other; rows are as wide as the widest."""
    rows = [[rng.randint(1, 6) for _ in range(rng.randint(1, 3))] for _ in range(rng.choice((1, 1, 2)))]
    for row in rows:
        row[-1] += max(map(sum, rows)) - sum(row)
    return {"do": "packed", "rows": rows, "lengths": rng.random() < 0.3, "loss": rng.random() < 0.3,
            "gradients": rng.random() < 0.4}


def calls(rng: random.Random, case: Case) -> Case:
    """A row in several calls on one cache, with what is done to the cache between them."""
    sizes, events = [], []
    for _ in range(rng.randint(1, 3)):
        sizes.append(rng.choice((1, 1, 2, 3)))
        events.append(rng.choice((None, None, "copy", "crop", "reorder", "select", "repeat")))
    return {"do": "calls", "sizes": sizes, "events": events, "lot": rng.randrange(1000)}


# Specs --------------------------------------------------------------------------------------------------------------


def specs(rng: random.Random, arch: str) -> list[Case]:
    """One or two passes, as a spec writes them."""
    first = rng.choice(FIRST)(rng, arch)
    if rng.random() < 0.5:
        return [first]
    # Most passes want a straight stack of visits, which these leave.
    straight = first["pass"] in STRAIGHT and rng.random() < 0.9
    second = rng.choice(FIRST if straight else (turboconn, turboconn, pad, taps))(rng, arch)
    if second["pass"] == first["pass"] and second["pass"] not in ("pad", "identity", "skip"):
        second["scope"] = "again"
    return [first, second]


STRAIGHT = ("layer_program", "repeat", "intra_layer_recurrence", "skip", "identity")


def span(rng: random.Random) -> tuple[int, int]:
    start = rng.randrange(LAYERS)
    return start, rng.randint(start + 1, LAYERS)


def some(rng: random.Random, chance: float = 0.3, **options: Any) -> Case:
    """A few of the options, each a list to choose from."""
    return {k: rng.choice(v) for k, v in options.items() if rng.random() < chance}


def turboconn(rng: random.Random, arch: str) -> Case:
    pairs = [[s, d] for s in range(LAYERS) for d in range(s)]
    made: Case = {
        "pass": "turboconn", "bridges": sorted(rng.sample(pairs, rng.randint(1, 3))), "group": rng.randint(1, 4),
        "rank": rng.choice((3, 3, None)), **some(rng, 0.25, write=["input"], alpha=[30.0]),
    }
    if made["rank"] and "write" not in made:
        made |= some(rng, 0.2, wiring=["code"])
    return made


def loop(rng: random.Random, arch: str) -> Case:
    start, end = span(rng)
    made: Case = {"pass": "loop", "start": start, "end": end, "times": rng.choice((1, 2, 2, 3, rng.choice(LENGTHS)))}
    made |= some(rng, 0.2, damped=[True], kv=["first", "last", "mod:2"], taps=[True], normalize=["loop"], out_norm=[True],
                 bptt=[1], inject=["add", "concat"])
    if rng.random() < 0.15:
        made |= {"inject": rng.choice(("add", "concat")), "state": rng.choice(("zeros", "noise"))}
        made |= some(rng, 0.4, noise_cut=[2.0]) if made["state"] == "noise" else {}
    if rng.random() < 0.2:
        made |= {"times": max(made["times"], 2) if isinstance(made["times"], int) else 3, "exit": rng.choice((0.3, 0.7)),
                 "criterion": rng.choice(("cdf", "state", "kl", "entropy"))}
        made |= some(rng, 0.3, skip=[False]) if made["criterion"] == "cdf" else {}
    if rng.random() < 0.15:
        made["lora_rank"] = 2
    if rng.random() < 0.2 and arch in MODULATED:
        made |= rng.choice(({"timestep": "identity"}, {"timestep": "zero"}, {"scales": True}))
    return made


def parallel_loop(rng: random.Random, arch: str) -> Case:
    made: Case = {"pass": "parallel_loop", "loops": rng.choice((2, 2, 3)), "kv": rng.choice(("gated", "gated", "first", "own"))}
    if made["kv"] == "gated":
        made |= {"window": rng.randint(1, 4)} | some(rng, 0.4, gate=["hidden"], gate_init=[1.0])
    return made | some(rng, 0.3, mix=[[0.7, 0.3], [1.0, 0.5]], normalize=["loop"], shift=[0, 2])


def layer_program(rng: random.Random, arch: str) -> Case:
    layers = [rng.randrange(LAYERS) for _ in range(rng.randint(1, 6))]
    return {"pass": "layer_program", "layers": layers} | (some(rng, 0.2, scales=[True]) if arch in MODULATED else {})


def repeat(rng: random.Random, arch: str) -> Case:
    start, end = span(rng)
    return {"pass": "repeat", "start": start, "end": end, "times": rng.choice((1, 2, 3))} | (
        some(rng, 0.2, scales=[True]) if arch in MODULATED else {})


def recurrence(rng: random.Random, arch: str) -> Case:
    return {"pass": "intra_layer_recurrence", "reuse": [rng.choice((1, 1, 2, 3)) for _ in range(LAYERS)]}


def skip(rng: random.Random, arch: str) -> Case:
    start = rng.randrange(LAYERS)
    return {"pass": "skip", "start": start, "end": rng.randint(start + 1, min(LAYERS, start + 2))}


def mixture_of_depths(rng: random.Random, arch: str) -> Case:
    made: Case = {"pass": "mixture_of_depths", "mode": rng.choice(("topk", "threshold", "threshold"))}
    if made["mode"] == "topk":
        made["capacity"] = rng.choice((0.25, 0.5, 0.7, 1.0))
    return made | some(rng, 0.3, blocks=[[1, 2], [0, 3], [0, 1, 2, 3]], combine=["delta"], weight=["sigmoid"], taps=[True])


def mixture_of_recursions(rng: random.Random, arch: str) -> Case:
    made: Case = {"pass": "mixture_of_recursions", "recursions": rng.choice((2, 2, 3))}
    if rng.random() < 0.6:
        made |= {"start": 1, "end": 3}
    else:
        made |= {"recursions": 2, "sharing": rng.choice(("middle_cycle", "cycle", "middle_sequence", "sequence")),
                 "init": rng.choice(("stepwise", "first", "last", "average"))}
    if rng.random() < 0.3:
        made |= {"router": "token"} | some(rng, 0.4, kv=["shared"], balancing=["loss_free"])
    else:
        made |= {"mode": rng.choice(("topk", "threshold", "threshold"))}
        made |= some(rng, 0.3, kv=["shared"], combine=["delta"])
    return made | some(rng, 0.3, taps=[True])


def inner_thinking(rng: random.Random, arch: str) -> Case:
    made: Case = {"pass": "inner_thinking", "steps": rng.choice((2, 3)), "mode": rng.choice(("topk", "threshold", "threshold"))}
    return made | some(rng, 0.3, blocks=[[1], [0, 3], [2, 3]], weight=["tanh", "symmetric"], bypass=["literal"],
                       keys=["routed"], taps=[True])


def pad(rng: random.Random, arch: str) -> Case:
    return {"pass": "pad", "tokens": rng.randint(1, 3), "token": 5}


def taps(rng: random.Random, arch: str) -> Case:
    return {"pass": "taps", "at": sorted(rng.sample(range(LAYERS), rng.randint(1, 2)))} | some(rng, 0.5, head=[True])


def identity(rng: random.Random, arch: str) -> Case:
    return {"pass": "identity"}


FIRST = (
    turboconn, turboconn, turboconn, loop, loop, loop, loop, parallel_loop, parallel_loop, layer_program, repeat, recurrence,
    skip, mixture_of_depths, mixture_of_depths, mixture_of_recursions, mixture_of_recursions, inner_thinking, inner_thinking,
    pad, taps, identity,
)
