"""Random cases: plain data from a seed and a number, so that a case can be printed, stored and shrunk."""

from __future__ import annotations

import random
from collections.abc import Sequence

from depthpass.fuzz.models import ARCHITECTURES
from depthpass.fuzz.specs import LAYERS, LOOPED, Case, specs

RECORDED = ("llama", "qwen2", "gpt2", "gpt_neox", "olmo", "stablelm", "qwen3", "granite")
"""Without windows and experts, which the derived depth bounds from above."""
DOORS = ("decoder", "base_model", "wrapped", "embeds", "checkpointing", "hooked", "using", "functional")


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
    # A cache of a block-causal program ends with a block in every row.
    if block := next((s["block"] for s in case["spec"] if "block" in s), None):
        case["lengths"] = [-(-n // block) * block for n in case["lengths"]]
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
    ahead = next((s for s in case["spec"] if s["pass"] in ("bidirectional", "masked_diffusion")), None)
    drawn: list[Case] = [{"do": "forward", "loss": rng.random() < 0.4 and ahead is None}]
    if rng.random() < 0.4:
        drawn.append({"do": "gradients"})
    if rng.random() < 0.5 and (ahead is None or "block" in ahead):
        drawn.append(calls(rng, case))
    if rng.random() < 0.4:
        drawn.extend(generation(rng, case, ahead))
    if rng.random() < 0.1:
        drawn.append({"do": "save", "auto": rng.random() < 0.5})
    if rng.random() < 0.02:
        drawn.append({"do": "emit"})
    if rng.random() < 0.3:
        drawn.append({"do": "door", "which": rng.choice(DOORS)})
    if rng.random() < 0.25 and case["arch"] in RECORDED:
        drawn.append({"do": "depth"})
    if rng.random() < 0.25:
        drawn.append(packed(rng, ahead))
    return drawn


def generation(rng: random.Random, case: Case, ahead: Case | None) -> list[Case]:
    """Whole calls of ``generate``, or of what stands in its place."""
    new = rng.randint(2, 4)
    if ahead is not None:
        return [{"do": "denoise", "new": new}] if ahead["pass"] == "masked_diffusion" else []
    looped = any(s["pass"] in LOOPED and not isinstance(s.get("times"), str) for s in case["spec"])
    check: Case = {"do": "generate", "new": new, "beams": rng.choice((1, 1, 2, 3))}
    chance = rng.random()
    if looped and chance < 0.2:
        return [{"do": "drafted", "new": new + 2, "tokens": rng.choice((1, 2, "auto"))}]
    if looped and chance < 0.4:
        return [{"do": "row_loops", "new": new, "counts": [rng.randint(1, 3) for _ in case["lengths"]]}]
    if chance > 0.9:
        return [{"do": "assisted", "new": new + 2}]
    if chance > 0.75:
        return [{"do": "residual", "sizes": [rng.randint(1, 3) for _ in range(2)], "bits": rng.choice((4, 2))}]
    return [check]


def packed(rng: random.Random, ahead: Case | None) -> Case:
    """Several sequences in a row, one after the other; rows are as wide as the widest."""
    rows = [[rng.randint(1, 6) for _ in range(rng.randint(1, 3))] for _ in range(rng.choice((1, 1, 2)))]
    for row in rows:
        row[-1] += max(map(sum, rows)) - sum(row)
    return {"do": "packed", "rows": rows, "lengths": rng.random() < 0.3,
            "loss": rng.random() < 0.3 and ahead is None,
            "gradients": rng.random() < 0.4}


def calls(rng: random.Random, case: Case) -> Case:
    """A row in several calls on one cache, with what is done to the cache between them."""
    block = next((s["block"] for s in case["spec"] if "block" in s), None)
    sizes, events = [], []
    for _ in range(rng.randint(1, 3)):
        sizes.append(rng.choice((1, 1, 2, 3)) if block is None else block)
        events.append(rng.choice((None, None, "copy", "crop", "reorder", "select", "repeat")))
    return {"do": "calls", "sizes": sizes, "events": events, "lot": rng.randrange(1000)}
