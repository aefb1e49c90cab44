"""The depth table of the published systems: closed forms of programs written as text, and their brute force."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from fractions import Fraction

import pytest
import sympy

from depthpass.analysis.bruteforce import brute_depth
from depthpass.analysis.closed_form import n
from depthpass.analysis.depth import depth
from depthpass.ir import Program, parse_program, plain, verify

Bridge = tuple[int, int, int]
"""(source, destination, delay): from the output of block ``source`` to that of block ``destination``."""


class Text:
    """Writes program text line by line."""

    def __init__(self, blocks: int) -> None:
        self.blocks, self.slots, self.lines, self.count = blocks, 0, [], 0
        self.embed = self.emit("embed")

    def emit(self, line: str) -> str:
        self.count += 1
        self.lines.append(f"  %{self.count} = {line}")
        return f"%{self.count}"

    def visit(self, block: int, x: str, attrs: str = "") -> str:
        self.slots += 1
        return self.emit(f"block {block} ({x}) slot {self.slots - 1} {attrs}")

    def run(self, blocks: Sequence[int], x: str) -> str:
        for block in blocks:
            x = self.visit(block, x)
        return x

    def line(self, text: str) -> None:
        self.lines.append(f"  {text}")

    def end(self, x: str) -> Program:
        self.line(f"output {self.emit(f'norm ({x})')}")
        return verify(parse_program("\n".join([f"program M blocks={self.blocks} width=8", *self.lines])))


def bridged(blocks: int, bridges: Sequence[Bridge], *, on_input: bool = False, pads: int = 0) -> Program:
    """TurboConn: bridges added on the output of the destination block, or on its input."""
    t = Text(blocks)
    x = t.embed if not pads else t.emit(f"pad {pads} (%1)")
    captured: dict[Bridge, str] = {b: f"%c{i}" for i, b in enumerate(bridges)}

    def add(x: str, landing: list[Bridge]) -> str:
        ups = [t.emit(f"linear u{captured[b][1:]} ({t.emit(f'delay {b[2]} ({captured[b]})')}) out 8") for b in landing]
        return t.emit(f"add ({', '.join([x, *ups])})") if ups else x

    for block in range(blocks):
        here = [b for b in bridges if b[1] == block]
        x = t.visit(block, add(x, here)) if on_input else add(t.visit(block, x), here)
        for b in bridges:
            if b[0] == block:
                t.line(f"{captured[b]} = linear d{captured[b][1:]} ({x}) out 2")
    return t.end(x)


def parallel_loops(blocks: int, loops: int, *, shift: bool = True, window: int | None = 2) -> Program:
    t = Text(blocks)
    x, last, first = t.embed, "", 0
    for r in range(loops):
        if r:
            carried = t.emit(f"delay 1 ({last})") if shift else last
            x = t.emit(f"add ({t.embed}, {carried})") if shift else carried
        for block in range(blocks):
            gated = f"keys {block} gate g{block} window {window}" if r and window else ""
            x = t.visit(block, x, gated if r else "")
        last = x
        t.line(f"tap loop{first + r} ({x})")
    return t.end(x)


def jacobi(blocks: int, sweeps: int, s: int, d: int, g: int) -> Program:
    t = Text(blocks)
    base = t.run(range(d + 1), t.embed)
    top = t.run(range(d + 1, s + 1), base)
    for _ in range(sweeps - 1):
        x = t.emit(f"add ({base}, {t.emit(f'delay {g} ({top})')})")
        top = t.run(range(d + 1, s + 1), x)
    return t.end(t.run(range(s + 1, blocks), top))


def recursions(middle: int, count: int, rule: str) -> Program:
    """MoR, Middle-Cycle, nested routes."""
    t = Text(middle + 2)
    x, route = t.visit(0, t.embed), ""
    for r in range(count):
        seen = t.emit(f"gather ({x}, {route})") if route else x
        score = t.emit(f"linear score{r} ({seen}) out 1 bias false")
        capacity = f"capacity {(count - r) / count}" if rule == "topk" else ""
        route = t.emit(f"route {rule} ({', '.join(filter(None, [score, route]))}) {capacity}")
        weight = t.emit(f"act sigmoid ({score})") if not r else ""
        sub = t.run(range(1, middle + 1), t.emit(f"gather ({x}, {route})"))
        if weight:
            sub = t.emit(f"mul ({sub}, {t.emit(f'gather ({weight}, {route})')})")
        x = t.emit(f"scatter ({x}, {sub}, {route})")
    return t.end(t.visit(middle + 1, x))


def thinking(blocks: int, deep: Sequence[int], steps: int) -> Program:
    """ITT: extra thinking steps at some layers."""
    t = Text(blocks)
    x = t.embed
    for block in range(blocks):
        y = t.visit(block, x)
        acc = t.emit(f"weigh phi{block}.0 ({y})") if block in deep else y
        for k in range(1, steps if block in deep else 1):
            route = t.emit(f"route topk ({t.emit(f'linear r{block}.{k} ({acc}) out 1')}) capacity 0.5 rounding ceil")
            z = t.visit(block, t.emit(f"gather ({acc}, {route})"))
            acc = t.emit(f"scatter ({acc}, {t.emit(f'scale 0.5 ({z})')}, {route})")
        x = acc
    return t.end(x)


def looped(prelude: int, core: int, coda: int, loops: int, *, shared_keys: bool = False) -> Program:
    t = Text(prelude + core + coda)
    x = t.run(range(prelude), t.embed)
    for loop in range(loops):
        for block in range(prelude, prelude + core):
            x = t.visit(block, x, f"keys {block}" if loop and shared_keys else "")
    return t.end(t.run(range(prelude + core, prelude + core + coda), x))


def listed(blocks: int, visits: Sequence[int]) -> Program:
    t = Text(blocks)
    return t.end(t.run(visits, t.embed))


def encoder_decoder_feedback(encoder: int, decoder: int) -> Program:
    """RLT, interval 1: u = enc(x) + W s[t-1], s = dec(u)."""
    t = Text(encoder + decoder)
    x = t.run(range(encoder), t.embed)
    u = t.emit(f"add ({x}, {t.emit('delay 1 (%state)')})")
    s = t.run(range(encoder, encoder + decoder), u)
    t.line(f"%state = linear w ({s}) out 8")
    return t.end(s)


def floors(tokens: sympy.Expr, g: int) -> sympy.Expr:
    return sympy.floor(tokens / sympy.Integer(g))


SYSTEMS: dict[str, tuple[Callable[[], Program], sympy.Expr | int]] = {
    "stock": (lambda: plain("M", 6, 8), 6),
    "layer program": (lambda: listed(4, [0, 2, 1, 1, 3, 0]), 6),
    "intra-layer recurrence": (lambda: listed(4, [0, 0, 0, 0, 1, 1, 2, 3]), 8),
    "loops": (lambda: looped(1, 2, 1, 5), 1 + 5 * 2 + 1),
    "loops, first keys": (lambda: looped(1, 2, 1, 5, shared_keys=True), 1 + 5 * 2 + 1),
    "turboconn on input": (lambda: bridged(6, [(4, 1, 3)], on_input=True), 6 + 4 * floors(n - 1, 3)),
    "turboconn, 3 pads": (lambda: bridged(6, [(4, 1, 4)], pads=3), 6 + 3 * floors(n + 2, 4)),
    # 6 + 3*floor((n + 4 - 1)/4), which sympy does not recognise as the same.
    "turboconn, 4 pads": (lambda: bridged(6, [(4, 1, 4)], pads=4), 9 + 3 * floors(n - 1, 4)),
    "sparse control": (lambda: bridged(16, [(15, 0, 4)]), 16 + 15 * floors(n - 1, 4)),
    "all tokens recurrent": (lambda: bridged(6, [(4, 2, 1)], on_input=True), 6 + (n - 1) * 3),
    "encoder, recurrent decoder": (lambda: encoder_decoder_feedback(2, 3), 2 + 3 * n),
    "feedback to the embedding": (lambda: bridged(5, [(4, 0, 1)], on_input=True), 5 * n),
    "jacobi, 4 sweeps": (lambda: jacobi(6, 4, 4, 1, 2), 6 + 3 * sympy.Min(3, floors(n - 1, 2))),
    "parallel loops": (lambda: parallel_loops(4, 3), 4 * sympy.Min(3, n)),
    "parallel loops, own keys": (lambda: parallel_loops(4, 3, window=None), 4 * sympy.Min(3, n)),
    "loops with gated keys, no shift": (lambda: parallel_loops(4, 3, shift=False), 12),
    "mixture of recursions": (lambda: recursions(2, 3, "topk"), 2 + 2 * 3),
    "mixture of recursions, threshold": (lambda: recursions(2, 3, "threshold"), 2 + 2 * 3),
    "inner thinking": (lambda: thinking(6, (1, 3, 5), 3), 6 + 3 * 2),
}


@pytest.mark.parametrize("name", SYSTEMS)
def test_closed_form_of_system(name: str) -> None:
    build, expected = SYSTEMS[name]
    program = build()
    found = depth(program)
    assert sympy.simplify(found.formula - expected) == 0
    for tokens in (1, 2, 4, 7):
        assert brute_depth(program, tokens) == found.at(tokens) == sympy.sympify(expected).subs(n, tokens)


@pytest.mark.parametrize("g", [1, 2, 3, 5])
def test_one_bridge(g: int) -> None:
    for blocks in range(2, 6):
        for s, d in itertools.combinations(range(blocks), 2):
            found = depth(bridged(blocks, [(d, s, g)]))
            assert found.formula == blocks + floors(n - 1, g) * (d - s)
            assert found.rate == Fraction(d - s, g)
            assert found.certificate.cycle_ratio == found.rate


@pytest.mark.parametrize("g", [1, 4, 6, 16, 64])
@pytest.mark.parametrize(
    ("blocks", "sources", "destinations", "span", "count", "longest"),
    [(16, range(0, 16, 2), range(0, 16, 2), 5, 15, 14), (32, range(6, 31, 2), range(7, 26, 2), 6, 45, 23)],
)
def test_published_bands(
    blocks: int, sources: range, destinations: range, span: int, count: int, longest: int, g: int
) -> None:
    bridges = [(s, d, g) for s in sources for d in destinations if s - d > span]
    assert len(bridges) == count
    found = depth(bridged(blocks, bridges))
    assert found.formula == blocks + longest * floors(n - 1, g)
    assert found.at(155) == blocks + longest * (154 // g)
    path = found.critical_path(155)
    assert len(path) == found.at(155)
    assert [step.token for step in path] == sorted(step.token for step in path)
    assert path[-1].block == blocks - 1 and path[-1].token == 154


def test_published_band_by_brute_force() -> None:
    bridges = [(s, d, 2) for s in range(0, 16, 2) for d in range(0, 16, 2) if s - d > 5]
    program = bridged(16, bridges)
    assert [brute_depth(program, k) for k in (1, 2, 3, 6)] == [16, 16, 30, 44]


@pytest.mark.parametrize("seed", range(40))
def test_mixed_delays_are_an_unbounded_knapsack(seed: int) -> None:
    """depth = L + max sum k_e (s_e - d_e) over multisets of bridges with sum k_e delay_e <= n - 1."""
    rng = random.Random(seed)
    blocks = rng.randint(3, 8)
    pairs = rng.sample(list(itertools.combinations(range(blocks), 2)), k=rng.randint(1, 3))
    bridges = [(s, d, rng.randint(1, 7)) for d, s in pairs]
    found = depth(bridged(blocks, bridges))
    gain = [0]
    for budget in range(1, 90):
        gain.append(max([gain[-1], *(gain[budget - g] + s - d for s, d, g in bridges if g <= budget)]))
    assert [found.at(k + 1) for k in range(90)] == [blocks + v for v in gain]
    assert [found.formula.subs(n, k + 1) for k in range(30)] == [blocks + v for v in gain[:30]]
    assert found.rate == max(Fraction(s - d, g) for s, d, g in bridges)


def test_near_ties_have_a_long_start_and_stay_exact() -> None:
    """Two bridges of nearly equal gain per token: the slower one fills remainders for hundreds of tokens."""
    found = depth(bridged(32, [(31, 0, 64), (30, 1, 59)]))
    gain = [0]
    for budget in range(1, 3000):
        gain.append(max([gain[-1], *(gain[budget - g] + s for s, g in ((31, 64), (29, 59)) if g <= budget)]))
    assert found.growth.start > 500
    assert all(found.at(k + 1) == 32 + gain[k] for k in range(3000))


def test_cycles_of_different_rates_in_series() -> None:
    """The faster upper cycle wins in the long run, although its periods share no factor with the lower one's."""
    found = depth(bridged(32, [(8, 0, 63), (18, 9, 64), (30, 19, 61)]))
    assert found.formula == 32 + 11 * floors(n - 1, 61)
    assert {r.cycle_ratio for r in found.certificate.recurrences} == {
        Fraction(8, 63), Fraction(9, 64), Fraction(11, 61)
    }


def test_a_top_k_route_between_two_cycles_adds_their_rates() -> None:
    t = Text(4)
    x = t.visit(0, t.emit(f"add (%1, {t.emit('delay 2 (%low)')})"))
    t.line(f"%low = linear a ({x}) out 8")
    route = t.emit(f"route topk ({t.emit('linear r (%low) out 1')}) capacity 0.5")
    sub = t.visit(1, t.emit(f"gather ({x}, {route})"))
    x = t.emit(f"scatter ({x}, {sub}, {route})")
    y = t.run([2, 3], t.emit(f"add ({x}, {t.emit('delay 3 (%high)')})"))
    t.line(f"%high = linear b ({y}) out 8")
    program = t.end(y)
    found = depth(program)
    assert found.rate == Fraction(1, 2) + Fraction(2, 3)
    assert found.certificate.cycle_ratio == Fraction(2, 3)
    assert [found.at(k) for k in range(1, 10)] == [brute_depth(program, k) for k in range(1, 10)]
    assert found.notes
    assert [len(found.critical_path(k)) for k in range(1, 10)] == [found.at(k) for k in range(1, 10)]
