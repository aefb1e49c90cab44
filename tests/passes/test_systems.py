"""Every pass against the equations of its paper, token by token on toy blocks in float64.

The oracles are written from the papers' pseudo-code; the programs are run by the reference interpreter.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from depthpass.ir import Program, parse_program, plain
from depthpass.passes import Context, Pass, apply_spec
from depthpass.passes.inner_thinking import InnerThinking
from depthpass.passes.layer_program import LayerProgram, Skip
from depthpass.passes.loop import Loop
from depthpass.passes.mixture_of_recursions import MixtureOfRecursions
from depthpass.passes.parallel_loop import ParallelLoop
from depthpass.passes.recurrence import IntraLayerRecurrence, Repeat
from depthpass.passes.turboconn import TurboConn
from tests.passes.toy import WIDTH, Keys, Toy


def rewritten(toy: Toy, *passes: Pass) -> Program:
    stock = plain("Toy", toy.blocks, WIDTH)
    # The text is what a reader trusts, so it is the text that runs.
    return parse_program(str(apply_spec(stock, passes, Context.of(stock))))


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def visits_in_order(toy: Toy, order: list[int]) -> Tensor:
    keys = [Keys(toy.stack[b]) for b in order]
    out = []
    for i, x in enumerate(toy.embed):
        for k in keys:
            x = k(x, i)
        out.append(toy.norm(x))
    return torch.stack(out)


@pytest.mark.parametrize(
    ("spec", "order"),
    [
        (LayerProgram([0, 1, 2, 1, 2, 3]), [0, 1, 2, 1, 2, 3]),
        (LayerProgram([3, 1, 0, 0]), [3, 1, 0, 0]),
        (Skip(0), [1, 2, 3]),
        (Skip(1, 3), [0, 3]),
        (Repeat(1, 3, 3), [0, 1, 2, 1, 2, 1, 2, 3]),
        (IntraLayerRecurrence([3, 1, 2, 1]), [0, 0, 0, 1, 2, 2, 3]),
        (Loop(1, 3, times=2), [0, 1, 2, 1, 2, 3]),
        (Loop(times=2), [0, 1, 2, 3, 0, 1, 2, 3]),
    ],
    ids=lambda v: v.label if isinstance(v, Pass) else "",
)
def test_visit_lists(spec: Pass, order: list[int]) -> None:
    toy = Toy(4, 5)
    same(toy.run(rewritten(toy, spec)).output(), visits_in_order(toy, order))


@pytest.mark.parametrize("bridges", [[(2, 0)], [(3, 1), (2, 1), (3, 0), (1, 0)]])
@pytest.mark.parametrize("options", [{"rank": 3}, {"rank": None}, {"rank": 2, "gain": 0.25}, {"write": "input"}])
@pytest.mark.parametrize("group", [1, 2, 4])
def test_turboconn(bridges: list[tuple[int, int]], options: dict, group: int) -> None:
    toy = Toy(4, 9, seed=1)
    spec = TurboConn(bridges=bridges, group=group, **options)
    program = rewritten(toy, spec)
    p = toy.random_parameters(program)
    m = spec.multiplier

    def linear(name: str, x: Tensor) -> Tensor:
        return p[f"{name}.weight"] @ x + p[f"{name}.bias"]

    def arriving(d: int, i: int) -> Tensor | float:
        total: Tensor | float = 0.0
        for s, to in bridges:
            if to == d and i - group >= 0:
                name, c = f"turboconn.s{s}_d{d}", captured[s][i - group]
                if spec.rank is None:
                    total = total + linear(f"{name}.full", m * c)
                else:
                    total = total + linear(f"{name}.up", m * linear(f"{name}.down", c))
        return total

    keys, captured = [Keys(b) for b in toy.stack], [[] for _ in toy.stack]
    out = []
    for i, x in enumerate(toy.embed):
        for b in range(toy.blocks):
            x = keys[b](x + arriving(b, i), i) if spec.write == "input" else keys[b](x, i) + arriving(b, i)
            captured[b].append(x)
        out.append(toy.norm(x))
    same(toy.run(program, p).output(), torch.stack(out))


PLT = {
    "paper": ParallelLoop(window=3),
    "three loops": ParallelLoop(loops=3, window=2),
    "loopcoder": ParallelLoop.loopcoder_v2(window=3),
    "iquest": ParallelLoop.iquest(window=2),
    "first": ParallelLoop(kv="first"),
    "own": ParallelLoop(kv="own", shift=2),
    "no feedback": ParallelLoop(mix=(1.0, 0.0), window=1),
}


@pytest.mark.parametrize("name", PLT)
def test_parallel_loop(name: str) -> None:
    spec, toy = PLT[name], Toy(3, 7, seed=2)
    a, b = spec.mix
    first = [[] for _ in toy.stack]
    own = [[[] for _ in toy.stack] for _ in range(spec.loops)]
    ends: list[list[Tensor]] = [[] for _ in range(spec.loops)]
    for i, e in enumerate(toy.embed):
        for r in range(spec.loops):
            x = e
            if r:
                x = a * e
                if i - spec.shift >= 0:
                    x = x + b * ends[r - 1][i - spec.shift]
            for j, block in enumerate(toy.stack):
                if r == 0:
                    first[j].append(block.keys(x, i))
                    x = block(x, i, first[j])
                    continue
                own[r][j].append(block.keys(x, i))
                window = own[r][j][-spec.window :]
                q = block._rotate(block.q @ x, i)
                g = block.gate(q, f"parallel_loop.v{j}.gate")
                y = {
                    "gated": lambda: g * block.attend(q, first[j]) + (1 - g) * block.attend(q, window),  # noqa: B023
                    "first": lambda: block.attend(q, first[j]),  # noqa: B023
                    "own": lambda: block.attend(q, own[r][j]),  # noqa: B023
                }[spec.kv]()
                x = x + block.o @ y
                x = x + torch.tanh(block.mlp @ x)
            last = r == spec.loops - 1
            ends[r].append(toy.norm(x) if last or spec.normalize == "loop" else x)
    same(toy.run(rewritten(toy, spec)).output(), torch.stack(ends[-1]))


MOR = {
    "topk": MixtureOfRecursions(start=1),
    "topk, given shares": MixtureOfRecursions(start=1, recursions=2, capacity=(0.7, 0.3)),
    "topk, shared keys": MixtureOfRecursions(start=1, kv="shared"),
    "threshold": MixtureOfRecursions(start=1, mode="threshold"),
    "threshold, shared keys": MixtureOfRecursions(start=1, mode="threshold", kv="shared"),
    "cycle": MixtureOfRecursions(start=0, end=4, recursions=2, alpha=0.5),
    "delta": MixtureOfRecursions(start=1, combine="delta"),
    "delta, threshold": MixtureOfRecursions(start=1, combine="delta", mode="threshold", kv="shared"),
}


@pytest.mark.parametrize("name", MOR)
def test_mixture_of_recursions(name: str) -> None:
    spec, toy = MOR[name], Toy(4, 12, seed=9)
    program = rewritten(toy, spec)
    p = toy.random_parameters(program)
    end = 3 if spec.end is None else spec.end
    rows = list(toy.embed)

    def run(blocks: range, rows: list[Tensor], active: list[int], stored: dict[int, list]) -> dict[int, Tensor]:
        """Run blocks on the active tokens; ``stored`` holds keys to read instead of their own, per block."""
        here = {i: rows[i] for i in active}
        for b in blocks:
            block = toy.stack[b]
            own = [(i, block.keys(here[i], i)) for i in active]
            keys = stored.setdefault(b, own) if spec.kv == "shared" else own
            here = {i: block(here[i], i, [k for j, k in keys if j <= i]) for i in active}
        return here

    everyone = list(range(toy.tokens))
    rows = list(run(range(spec.start), rows, everyone, {}).values()) if spec.start else rows
    active, stored, counts = everyone, {}, []
    for r in range(1, spec.recursions + 1):
        if spec.combine == "delta" and r == 1:
            rows = list(run(range(spec.start, end), rows, everyone, stored).values())
            continue
        chance = {i: torch.sigmoid(p[f"mor.r{r}.router.weight"] @ rows[i]).item() for i in active}
        if spec.mode == "topk":
            share = spec.capacity[r - 1] if spec.capacity else (spec.recursions - r + 1) / spec.recursions
            k = max(1, int(share * toy.tokens))
            active = sorted(sorted(active, key=lambda i: -chance[i])[:k])
        elif not (r == 1 and spec.kv == "shared"):
            active = [i for i in active if chance[i] >= 0.5]
        counts.append(len(active))
        done = run(range(spec.start, end), rows, active, stored)
        for i in active:
            if spec.combine == "delta":
                rows[i] = rows[i] + p[f"mor.r{r}.strength.weight"] * chance[i] * (done[i] - rows[i])
            else:
                rows[i] = rows[i] + spec.alpha * chance[i] * done[i]
    assert 0 < counts[-1] < toy.tokens, "the routes of this seed should split the tokens"
    rows = list(run(range(end, toy.blocks), rows, everyone, {}).values()) if end < toy.blocks else rows
    same(toy.run(program, p).output(), torch.stack([toy.norm(x) for x in rows]))


ITT = {
    "topk": InnerThinking(blocks=(1,), steps=3),
    "every other": InnerThinking(steps=2, ratios=(0.3,), alpha=0.5),
    "threshold": InnerThinking(blocks=(0, 2), steps=3, mode="threshold"),
    "literal": InnerThinking(blocks=(1,), steps=3, bypass="literal", ratios=(0.5, 0.2)),
    "one step": InnerThinking(blocks=(1,), steps=1),
}


@pytest.mark.parametrize("name", ITT)
def test_inner_thinking(name: str) -> None:
    spec, toy = ITT[name], Toy(3, 7, seed=4)
    program = rewritten(toy, spec)
    p = toy.random_parameters(program)

    def block(b: int, rows: list[Tensor]) -> list[Tensor]:
        f = toy.stack[b]
        keys = [f.keys(x, i) for i, x in enumerate(rows)]
        return [f(x, i, keys[: i + 1]) for i, x in enumerate(rows)]

    rows = list(toy.embed)
    for b in range(toy.blocks):
        rows = block(b, rows)
        if b not in ((1,) if spec.blocks == "every_other" else spec.blocks):
            continue
        phi = [p[f"itt.v{b}.phi{t}.weight"] for t in range(spec.steps)]
        acc, cur = [phi[0] * y for y in rows], rows
        for t in range(1, spec.steps):
            w = [torch.sigmoid(p[f"itt.v{b}.router{t}.weight"] @ x) for x in cur]
            k = math.ceil((spec.ratios[t - 1] if spec.ratios else 0.7) * toy.tokens)
            chosen = sorted(range(toy.tokens), key=lambda i: -w[i].item())[:k]
            if spec.mode == "threshold":
                chosen = [i for i in range(toy.tokens) if w[i].item() >= 0.5]
            z = block(b, cur)
            for i in range(toy.tokens):
                if i in chosen:
                    acc[i] = acc[i] + phi[t] * spec.alpha * w[i] * z[i]
                elif spec.bypass == "literal":
                    acc[i] = acc[i] + phi[t] * cur[i]
            cur = list(acc)
        rows = acc
    same(toy.run(program, p).output(), torch.stack([toy.norm(x) for x in rows]))


LOOPS = {
    "damped": Loop(1, 3, times=3, damped=True),
    "damped once": Loop(1, 3, times=1, damped=True),
    "huginn": Loop(1, 3, times=3, inject="concat", state="noise", noise_std=0.5, out_norm=True),
    "concat": Loop(1, 3, times=2, inject="concat"),
    "add": Loop(1, 3, times=3, inject="add"),
    "add to zeros": Loop(1, 4, times=2, inject="add", state="zeros"),
    "keys of the first": Loop(0, 4, times=3, kv="first"),
    "exit": Loop(1, 3, times=3, exit=0.6, skip=False),
    "exit that skips": Loop(1, 3, times=3, exit=0.6),
    "exit that skips, keys of the first": Loop(1, 3, times=3, exit=0.6, kv="first", damped=True),
    "ouro": Loop(times=3, normalize="loop", exit=0.75, skip=False),
    "ouro that skips": Loop(times=3, normalize="loop", exit=0.75),
    "taps": Loop(1, 3, times=3, taps=True),
}


@pytest.mark.parametrize("name", LOOPS)
def test_loop(name: str) -> None:
    spec, toy = LOOPS[name], Toy(4, 6, seed=5)
    program = rewritten(toy, spec)
    p = toy.random_parameters(program)
    end = toy.blocks if spec.end is None else spec.end
    core = toy.stack[spec.start : end]
    prelude, coda = [Keys(b) for b in toy.stack[: spec.start]], [Keys(b) for b in toy.stack[end:]]
    keys: list[list[list]] = [[[] for _ in core] for _ in range(spec.times)]
    out, states, exits = [], [], set()
    for i, x in enumerate(toy.embed):
        for k in prelude:
            x = k(x, i)
        e = x
        s = {"input": e, "zeros": 0 * e, "noise": spec.noise_std * toy.noise[i]}[spec.state]
        states.append([])
        survival = 1.0
        for t in range(spec.times):
            s = toy.norm(s) if t and spec.normalize == "loop" else s
            x = s
            if spec.inject == "concat":
                x = p["loop.inject.weight"] @ torch.cat((s, e)) + p["loop.inject.bias"]
            elif spec.inject == "add" and not (t == 0 and spec.state == "input"):
                x = s + e
            for j, block in enumerate(core):
                keys[t][j].append(block.keys(x, i))
                x = block(x, i, keys[0 if spec.kv == "first" else t][j])
            s = s + (x - s) / spec.times if spec.damped else x
            states[-1].append(s)
            if spec.exit is not None and spec.skip:
                gate = torch.sigmoid(p["loop.exit.weight"] @ toy.norm(s) + p["loop.exit.bias"]).item()
                survival *= 1 - gate
                if 1 - survival >= spec.exit:
                    break
        if spec.exit is not None:
            reached, left = 0.0, 1.0
            for state in states[-1]:
                gate = torch.sigmoid(p["loop.exit.weight"] @ toy.norm(state) + p["loop.exit.bias"]).item()
                reached, left = reached + left * gate, left * (1 - gate)
                s = state
                if reached >= spec.exit:
                    break
            exits.add([state is s for state in states[-1]].index(True))
        x = toy.norm(s) if spec.out_norm else s
        for k in coda:
            x = k(x, i)
        out.append(toy.norm(x))
    run = toy.run(program, p)
    same(run.output(), torch.stack(out))
    assert len(exits) != 1, "the exits of this seed should differ"
    for t, tap in enumerate(program.taps):
        same(run.stream(tap.args[0]), toy.run(rewritten(toy, Loop(1, 3, times=t + 1))).output())
    assert len(program.taps) == (3 if spec.taps else 0)


@pytest.mark.parametrize(
    "spec",
    [
        TurboConn(bridges=[(3, 0), (2, 1)], group=2, rank=3),
        TurboConn(bridges=[(3, 0)], rank=None, write="input"),
        LayerProgram(range(4)),
        IntraLayerRecurrence([1, 1, 1, 1]),
        Repeat(1, 3, 1),
        Loop(1, 3, times=1, damped=True, inject="add"),
        Loop(1, 3, times=4, inject="concat"),
        Loop(1, 3, times=1, inject="concat", state="noise"),
        Loop(1, 3, times=1, inject="add", state="zeros"),
        ParallelLoop(loops=1),
        MixtureOfRecursions(start=1, combine="delta"),
        MixtureOfRecursions(start=1, combine="delta", mode="threshold", kv="shared"),
        InnerThinking(),
        InnerThinking(mode="threshold", bypass="literal"),
    ],
    ids=lambda p: p.label,
)
def test_identity_settings_start_as_the_stock_model_bit_for_bit(spec: Pass) -> None:
    toy = Toy(4, 6, seed=6)
    program = rewritten(toy, spec)
    stock = toy.run(plain("Toy", 4, WIDTH)).output()
    assert torch.equal(toy.run(program, toy.initial_parameters(program)).output(), stock)


def test_parallel_loops_without_feedback_on_shared_keys_repeat_the_first() -> None:
    """The exact identity of the paper's form: a = 1, b = 0 and only the keys of loop 1."""
    toy = Toy(3, 6, seed=7)
    program = rewritten(toy, ParallelLoop(loops=3, mix=(1.0, 0.0), kv="first"))
    same(toy.run(program).output(), toy.run(plain("Toy", 3, WIDTH)).output())
