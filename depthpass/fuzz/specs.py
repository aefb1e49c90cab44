"""Random specs: one or two passes with random options, as a spec writes them."""

from __future__ import annotations

import random
from typing import Any

from depthpass.fuzz.models import ARCHITECTURES

Case = dict[str, Any]
LAYERS = 4
MODULATED = tuple(a for a in ARCHITECTURES if a != "opt")  # OPT's MLP is no module
LENGTHS = ("ceil(log2(n))", "ceil(n/3)", "floor(sqrt(n))+1")
MASK = 4
"""The token that a diffusion model fills in."""
LOOPED = ("loop", "repeat", "intra_layer_recurrence", "parallel_loop")
"""Passes whose count a row may choose, or a draft lower."""


def specs(rng: random.Random, arch: str) -> list[Case]:
    """One or two passes, as a spec writes them."""
    first = rng.choice(FIRST)(rng, arch)
    if rng.random() < 0.5:
        return [first]
    # Most passes want a straight stack of visits, which these leave.
    straight = rng.random() < (0.9 if first["pass"] in STRAIGHT else 0.2)
    second = rng.choice(FIRST if straight else BEHIND)(rng, arch)
    if second["pass"] == first["pass"] and second["pass"] in SCOPED:
        second["scope"] = "again"
    return [first, second]


SCOPED = (
    "turboconn", "loop", "parallel_loop", "layer_program", "repeat", "intra_layer_recurrence", "mixture_of_depths",
    "mixture_of_recursions", "inner_thinking", "taps", "feedback_transformer", "t2mlr", "recurrent_loop", "relaxed_recursion",
    "same_layer_state", "sum_norms",
)
"""Passes that have a scope, so that they can be applied twice."""
STRAIGHT = ("layer_program", "repeat", "intra_layer_recurrence", "skip", "identity")


def span(rng: random.Random) -> tuple[int, int]:
    start = rng.randrange(LAYERS)
    return start, rng.randint(start + 1, LAYERS)


def some(rng: random.Random, chance: float = 0.3, **options: Any) -> Case:
    """A few of the options, each a list to choose from."""
    return {k: rng.choice(v) for k, v in options.items() if rng.random() < chance}


def turboconn(rng: random.Random, arch: str) -> Case:
    pairs = [[s, d] for s in range(LAYERS) for d in range(s)]
    drawn: Case = {
        "pass": "turboconn", "bridges": sorted(rng.sample(pairs, rng.randint(1, 3))), "group": rng.randint(1, 4),
        "rank": rng.choice((3, 3, None)), **some(rng, 0.25, write=["input"], alpha=[30.0]),
    }
    if drawn["rank"] and "write" not in drawn:
        drawn |= some(rng, 0.2, wiring=["code"])
    return drawn


def loop(rng: random.Random, arch: str) -> Case:
    start, end = span(rng)
    drawn: Case = {"pass": "loop", "start": start, "end": end, "times": rng.choice((1, 2, 2, 3, rng.choice(LENGTHS)))}
    drawn |= some(rng, 0.2, damped=[True, 0.4], kv=["first", "last", "mod:2"], taps=[True], normalize=["loop"], out_norm=[True],
                  bptt=[1], inject=["add", "concat", "bounded"])
    if rng.random() < 0.15:
        drawn |= {"inject": rng.choice(("add", "concat", "bounded")), "state": rng.choice(("zeros", "noise"))}
        drawn |= some(rng, 0.4, noise_cut=[2.0]) if drawn["state"] == "noise" else {}
    if rng.random() < 0.2:
        drawn |= {"times": max(drawn["times"], 2) if isinstance(drawn["times"], int) else 3, "exit": rng.choice((0.3, 0.7)),
                  "criterion": rng.choice(("cdf", "state", "cosine", "kl", "entropy", "argmax"))}
        drawn |= {"exit": 1} if drawn["criterion"] == "argmax" else {}
        drawn |= some(rng, 0.3, skip=[False]) if drawn["criterion"] == "cdf" else {}
        drawn |= some(rng, 0.3, kv=["latest"]) if "skip" not in drawn else {}
    if rng.random() < 0.15:
        drawn["lora_rank"] = 2
    if rng.random() < 0.2 and arch in MODULATED:
        drawn |= rng.choice(({"timestep": "identity"}, {"timestep": "zero"}, {"scales": True}, {"residual": "1/n"},
                             {"residual": "1/n", "scales": True}))
    return drawn


def parallel_loop(rng: random.Random, arch: str) -> Case:
    drawn: Case = {"pass": "parallel_loop", "loops": rng.choice((2, 2, 3)), "kv": rng.choice(("gated", "gated", "first", "own"))}
    if drawn["kv"] == "gated":
        drawn |= {"window": rng.randint(1, 4)} | some(rng, 0.4, gate=["hidden"], gate_init=[1.0])
    return drawn | some(rng, 0.3, mix=[[0.7, 0.3], [1.0, 0.5]], normalize=["loop"], shift=[0, 2])


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
    drawn: Case = {"pass": "mixture_of_depths", "mode": rng.choice(("topk", "threshold", "threshold"))}
    if drawn["mode"] == "topk":
        drawn["capacity"] = rng.choice((0.25, 0.5, 0.7, 1.0))
    return drawn | some(rng, 0.3, blocks=[[1, 2], [0, 3], [0, 1, 2, 3]], combine=["delta"], weight=["sigmoid"], taps=[True])


def mixture_of_recursions(rng: random.Random, arch: str) -> Case:
    drawn: Case = {"pass": "mixture_of_recursions", "recursions": rng.choice((2, 2, 3))}
    if rng.random() < 0.6:
        drawn |= {"start": 1, "end": 3}
    else:
        drawn |= {"recursions": 2, "sharing": rng.choice(("middle_cycle", "cycle", "middle_sequence", "sequence")),
                  "init": rng.choice(("stepwise", "first", "last", "average"))}
    if rng.random() < 0.3:
        drawn |= {"router": "token"} | some(rng, 0.4, kv=["shared"], balancing=["loss_free"])
    else:
        drawn |= {"mode": rng.choice(("topk", "threshold", "threshold"))}
        drawn |= some(rng, 0.3, kv=["shared"], combine=["delta"])
    return drawn | some(rng, 0.3, taps=[True])


def inner_thinking(rng: random.Random, arch: str) -> Case:
    drawn: Case = {"pass": "inner_thinking", "steps": rng.choice((2, 3)), "mode": rng.choice(("topk", "threshold", "threshold"))}
    return drawn | some(rng, 0.3, blocks=[[1], [0, 3], [2, 3]], weight=["tanh", "symmetric"], bypass=["literal"],
                        keys=["routed"], taps=[True])


def pad(rng: random.Random, arch: str) -> Case:
    return {"pass": "pad", "tokens": rng.randint(1, 3), "token": 5} | some(rng, 0.2, after=[1, 2])


def taps(rng: random.Random, arch: str) -> Case:
    return {"pass": "taps", "at": sorted(rng.sample(range(LAYERS), rng.randint(1, 2)))} | some(rng, 0.5, head=[True])


def feedback(rng: random.Random, arch: str) -> Case:
    start, end = span(rng)
    return {"pass": "feedback_transformer"} | rng.choice(({}, {"start": start}, {"start": start, "end": end}))


def t2mlr(rng: random.Random, arch: str) -> Case:
    start, end = span(rng)
    gate = rng.choice(("learned", "rezero", "constant", "coupled", "variance", "concat", "weight", "exponential"))
    drawn: Case = {"pass": "t2mlr", "start": start, "end": end - 1, "gate": gate}
    drawn |= some(rng, 0.4, residual=[0.5], rescaled=[True], normed=["streams", "both"], project=[True, 3])
    if gate != "concat":
        drawn |= some(rng, 0.4, recurrent=[0.7])
    if gate in ("learned", "rezero", "constant", "exponential"):
        drawn |= some(rng, 0.4, input=[0.4])
    if gate not in ("constant", "weight", "concat"):
        drawn |= some(rng, 0.3, layers=[2], reads=["stream"])
    drawn |= some(rng, 0.3, normalized=[True]) if gate in ("learned", "rezero") else {}
    drawn |= some(rng, 0.5, added=[True]) if gate in ("coupled", "variance") else {}
    drawn |= some(rng, 0.5, per_channel=[True]) if gate == "rezero" else {}
    drawn |= some(rng, 0.3, norm=["layer"]) if "normed" in drawn else {}
    return drawn | (some(rng, 0.4, limit=[1.5]) if "rescaled" in drawn or drawn.get("normed") == "both" else {})


def recurrent_loop(rng: random.Random, arch: str) -> Case:
    drawn: Case = {"pass": "recurrent_loop", "encoder": rng.randrange(LAYERS), "interval": rng.choice((1, 1, 2, 3))}
    return drawn | some(rng, 0.4, gate=["token", "none"], normed=[False], alpha=[0.8])


def same_layer_state(rng: random.Random, arch: str) -> Case:
    start, end = span(rng)
    return {"pass": "same_layer_state", "start": start, "end": end} | some(
        rng, 0.4, blend=["constant"], share=[0.4], state=["ffn"], into=["stream"])


def sum_norms(rng: random.Random, arch: str) -> Case:
    return {"pass": "sum_norms"} | some(rng, 0.3, eps=[1e-2])


def relaxed_recursion(rng: random.Random, arch: str) -> Case:
    drawn: Case = {"pass": "relaxed_recursion", "rank": rng.choice((0, 2, 3))}
    drawn |= {"init": rng.choice(("average", "first", "stepwise"))}
    return drawn | rng.choice(({"times": 2}, {"times": 4}, {"times": 2, "start": 1, "end": 3}, {"times": 3, "start": 1}))


def coconut(rng: random.Random, arch: str) -> Case:
    return {"pass": "coconut", "latents": rng.randint(1, 3)} | some(rng, 0.3, after=[1, 2])


def bidirectional(rng: random.Random, arch: str) -> Case:
    return {"pass": "bidirectional"} | some(rng, 0.6, block=[1, 2, 3, 5])


def masked_diffusion(rng: random.Random, arch: str) -> Case:
    drawn: Case = {"pass": "masked_diffusion", "steps": rng.randint(1, 2), "mask_token": MASK,
                   "unmask": rng.choice(("confidence", "margin", "entropy", "left"))}
    return drawn | rng.choice(({}, {"shift": True}, {"block": 2}, {"block": 4}))


def identity(rng: random.Random, arch: str) -> Case:
    return {"pass": "identity"}


FIRST = (
    turboconn, turboconn, turboconn, loop, loop, loop, loop, parallel_loop, parallel_loop, layer_program, repeat, recurrence,
    skip, mixture_of_depths, mixture_of_depths, mixture_of_recursions, mixture_of_recursions, inner_thinking, inner_thinking,
    pad, taps, identity, feedback, feedback, t2mlr, t2mlr, recurrent_loop, recurrent_loop, relaxed_recursion, relaxed_recursion,
    coconut, coconut, bidirectional, masked_diffusion, masked_diffusion, same_layer_state, same_layer_state, sum_norms,
)
BEHIND = (turboconn, turboconn, turboconn, pad, coconut, taps, taps, bidirectional, same_layer_state, sum_norms)
"""What goes with passes that leave no straight stack."""
