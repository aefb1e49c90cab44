import itertools

import pytest
import sympy as sp
import torch
from depthpass_lowering.visits.routes import choose

import depthpass as dp
from depthpass.analysis.complexity import Growth, complexity, growth, precision_kind
from depthpass.analysis.depth import depth
from depthpass.errors import InputError
from depthpass.ir import op, plain
from depthpass.passes import Context, apply_spec
from depthpass.report import proven

n = sp.Symbol("n", integer=True, positive=True)
X = sp.log(n)
GROWTHS = [
    (1, Growth("constant", 0, True)),
    (sp.Integer(7), Growth("constant", 0, True)),
    (4 + 3 / n, Growth("constant", 0, True)),
    (sp.Min(n, 4) * 16, Growth("constant", 0, True)),  # cross-loop parallelism: min(R, n) * L
    (sp.ceiling(sp.log(n, 2)), Growth("polylog", 1, True)),
    (3 * sp.ceiling(2 * X) + 5, Growth("polylog", 1, True)),
    (X**2, Growth("polylog", 2, True)),
    (X**3 + X, Growth("polylog", 3, True)),
    (sp.Max(1, X), Growth("polylog", 1, True)),
    # Between two powers: no class of its own.
    (sp.ceiling(sp.log(n, 2) ** sp.Rational(3, 2)), Growth("polylog", 2)),
    (sp.log(X), Growth("polylog", 1)),
    (sp.sqrt(X), Growth("polylog", 1)),
    (X * sp.log(X), Growth("polylog", 2)),
    (X**2 * sp.log(X), Growth("polylog", 3)),
    (X / sp.log(X), Growth("polylog", 1)),
    (n, Growth("polynomial")),
    (12 * sp.ceiling(n / 4) + 4, Growth("polynomial")),
    (sp.sqrt(n), Growth("polynomial")),
    (n**2 * X, Growth("polynomial")),
    (2**n, Growth("beyond")),
]


@pytest.mark.parametrize(("expr", "want"), GROWTHS)
def test_growth(expr, want):
    assert growth(expr) == want


@pytest.mark.parametrize(("expr", "want"), [g for g in GROWTHS if g[1].kind == "polylog"])
def test_growth_against_numbers(expr, want):
    """Over log^d n the value stays below a constant, and above one exactly where the growth is Theta(log^d n)."""
    ratios = []
    for power in (2**6, 2**12, 2**24, 2**48):  # n = e^power
        value = sp.sympify(expr).replace(sp.ceiling, lambda a: a).replace(sp.floor, lambda a: a).replace(
            sp.Max, lambda *a: sp.Add(*(t for t in a if t.free_symbols)))
        ratios.append(float(sp.expand_log(value.subs(n, sp.exp(power)), force=True).evalf() / power**want.degree))
    assert max(ratios) < 10 and all(b <= 1.01 * a + 0.1 for a, b in itertools.pairwise(ratios))
    assert (ratios[-1] > 0.5 * ratios[-2]) == want.exact, ratios


def claims(statements, status):
    return [s.claim for s in statements if s.status == status]


def test_log_precision_loops_with_padding_are_exactly_tc():
    (exact, whole) = complexity(sp.ceiling(sp.log(n, 2) ** 2), n**2, "log")
    assert "exactly first-order-uniform TC^2" in exact.claim
    assert exact.status == "proven" and exact.citation == "2505.18948"
    assert any("O(log n) bits" in p for p in exact.premises) and any("padding of any polynomial" in p for p in exact.premises)
    assert "exactly NC" in whole.claim and any("padding of any polynomial" in p for p in whole.premises)


@pytest.mark.parametrize("precision", ["bf16", "fp32", "torch.float16", "fixed"])
def test_hardware_precision_is_reported_as_logspace_uniform_ac(precision):
    """2605.30523: families of constant precision are logspace-uniform AC^d; nothing first-order-uniform is claimed."""
    for loops, d in ((3, 0), (sp.log(n), 1)):
        actual = complexity(loops, n, precision)
        assert f"exactly L-uniform AC^{d}" in actual[0].claim and actual[0].citation == "2605.30523"
        assert any("L-uniform" in p for p in actual[0].premises) and any("width that grows" in p for p in actual[0].premises)
        assert not any("first-order" in str(s) for s in actual)
        assert not any("exactly" in s.claim and "TC^" in s.claim for s in actual)
    assert all("fixed number of bits" in p.premises[0] for p in actual if p.status == "proven")


@pytest.mark.parametrize("precision", ["log", "bf16"])
@pytest.mark.parametrize("loops", [g[0] for g in GROWTHS if g[1].kind == "polylog" and not g[1].exact])
def test_loop_counts_between_two_powers_get_an_upper_bound_only(precision, loops):
    """log n log log n loops are no TC^1 (a family may use them all) and not known to be TC^2."""
    actual = complexity(loops, n**3, precision)
    assert not any(s.status == "proven" and "decides exactly" in s.claim for s in actual)
    degree = growth(loops).degree
    assert f"nothing outside {'first-order-uniform TC' if precision == 'log' else 'L-uniform AC'}^{degree}:" in actual[0].claim
    assert any(f"between log^{degree - 1} n and log^{degree} n" in s.claim and s.status == "no statement" for s in actual)


def test_without_padding_only_the_upper_bound_is_proven():
    for precision, name in (("log", "first-order-uniform TC^0"), ("bf16", "L-uniform AC^0")):
        for padding in (0, 5, sp.log(n) ** 2):
            actual = complexity(1, padding, precision)
            assert f"nothing outside {name}:" in actual[0].claim
            assert actual[1].status == "no statement" and "Without polynomial padding" in actual[1].claim
            assert not any("decides exactly" in s.claim for s in actual)
    (only,) = complexity(1, 2**n, "log")
    assert only.status == "no statement"


def test_constant_loops_stay_in_the_class_of_the_stock_model():
    stock, looped = complexity(1, n, "log"), complexity(4, n, "log")
    assert [s.claim for s in stock] == [s.claim for s in looped]


def test_linear_loops_get_no_class():
    nothing, upper = complexity(n, n, "log")
    assert nothing.status == "no statement" and "do not cover" in nothing.claim
    assert upper.status == "proven" and upper.claim.startswith("At most P")
    (only,) = complexity(2**n, n, "log")
    assert only.status == "no statement"


@pytest.mark.parametrize("options", [
    {}, {"delay_edges": True}, {"token_routing": True}, {"token_routing": "topk"}, {"shifts": True},
])
def test_p_bounds_polynomially_many_visits_only(options):
    """A row of 2^n pads is no polynomial amount of work, whatever a block is."""
    for loops, padding in ((1, 2**n), (n, 2**n), (2**n, 0)):
        assert not any("At most P" in s.claim for s in complexity(loops, padding, "log", **options))
    assert any("At most P" in s.claim for s in complexity(n, n, "log", **options))


def test_delay_cycles_say_what_can_and_cannot_be_said():
    """TurboConn: depth grows with n, yet no theorem gives it a class."""
    actual = complexity(1, 0, "bf16", delay_edges=True)
    assert actual[0].status == "no statement" and "no class is proven" in actual[0].claim
    assert any("At most P" in c for c in claims(actual, "proven"))
    assert any("At least what the model without the edges" in c for c in claims(actual, "proven"))
    assert not any("AC^" in s.claim or "TC^" in s.claim for s in actual)


SPECS = {
    "stock": None, "loop": dp.Loop(1, 3, times=3), "bridges": dp.TurboConn(bridges=[(3, 0)], group=2, rank=2),
    "parallel loops": dp.ParallelLoop(loops=3, window=2), "parallel loops, bridges": [
        dp.ParallelLoop(loops=2, window=2), dp.TurboConn(bridges=[(5, 3)], group=1, rank=2)],
    "recursions": dp.MixtureOfRecursions(start=1, end=3, recursions=2),
    "recursions by threshold": dp.MixtureOfRecursions(start=1, end=3, recursions=2, mode="threshold"),
    "all pads": [dp.Loop(1, 3, times=2), dp.Pad(4, token=5)],
}


def said(spec, precision="bf16"):
    program = plain("LlamaForCausalLM", 4, 32)
    if spec is not None:
        program = apply_spec(program, spec, Context.of(program))
    return program, proven(program, precision)


@pytest.mark.parametrize("name", SPECS)
def test_depth_is_said_to_grow_along_the_tokens_where_it_does(name):
    """Counter-example: parallel loops have delays, and a depth of min(R, n) * L."""
    program, actual = said(SPECS[name])
    grows = any("depth grows along the tokens" in s.claim for s in actual)
    assert grows == (depth(program).rate > 0)
    if any(o.kind == "delay" for o in program) and not grows:
        assert any("never fed back" in s.claim and s.status == "proven" for s in actual)
        assert any("nothing outside L-uniform AC^0:" in s.claim and any("shifts" in p for p in s.premises) for s in actual)
        assert not any("exactly" in s.claim for s in actual)


def test_a_choice_by_rank_decides_majority():
    """Counter-example to any bound by AC^0: the last token that the runtime's own top-k takes has bit 1."""
    route = op("route", "s", name="r", rule="topk", capacity=0.5)
    for length in range(2, 9):
        bits = torch.tensor(list(itertools.product((0.0, 1.0), repeat=length)))
        taken = choose(route, bits[..., None], None, None, 0).chosen
        decided = torch.where(taken, bits, torch.ones(())).amin(1).bool()
        assert torch.equal(decided, bits.sum(1) >= length // 2)
    for precision in ("bf16", "log"):
        actual = said(SPECS["recursions"], precision)[1]
        assert any("MAJORITY" in s.claim and s.status == "proven" for s in actual)
        assert not any("nothing outside" in s.claim or "decides exactly" in s.claim for s in actual)
        by_threshold = said(SPECS["recursions by threshold"], precision)[1]
        assert not any("MAJORITY" in s.claim or "nothing outside" in s.claim for s in by_threshold)
    assert not any("MAJORITY" in s.claim for s in said(SPECS["loop"])[1])


def test_chain_of_thought_lines_are_about_the_steps_and_loops_at_hand():
    actual = complexity(sp.log(n) ** 2, n**3, "log", cot_steps=sp.log(n) ** 2)
    strict = next(s for s in actual if "strictly less" in s.claim)
    assert strict.status == "conditional" and strict.premises[0] == "TC^1 is not TC^2" and "polynomial padding" in strict.premises
    assert strict.citation == "2505.19245"
    fewer = next(s for s in complexity(sp.log(n) ** 3, n, "log", cot_steps=sp.log(n)) if "strictly less" in s.claim)
    assert "O(log^1 n) chain-of-thought" in fewer.claim and "Theta(log^3 n) loops" in fewer.claim
    # More steps than loops, other padding, loops between two powers, a routed model: nothing is known.
    for loops, padding, steps, options in (
        (sp.log(n) ** 2, n, sp.log(n) ** 3, {}), (1, n, n, {}), (sp.log(n), 0, sp.log(n), {}),
        (sp.log(n) * sp.log(sp.log(n)), n, sp.log(n), {}), (sp.log(n), n, sp.log(n), {"token_routing": "topk"}),
    ):
        lines = complexity(loops, padding, "log", cot_steps=steps, **options)
        assert any("no separation is proven" in s.claim for s in lines)
        assert not any("strictly less" in s.claim for s in lines)
    fixed = complexity(sp.log(n), n, "bf16", cot_steps=sp.log(n))
    assert any("at fixed precision they are not proven" in s.claim for s in fixed)
    assert not any(s.citation == "2505.19245" for s in fixed)


def test_masked_diffusion():
    actual = complexity(1, 0, "fp32", diffusion_steps=sp.log(n) ** 2)
    diffusion = [s for s in actual if s.citation == "2510.13117"]
    assert len(diffusion) == 3 and "exactly L-uniform AC^2" in diffusion[0].claim
    for s in diffusion:
        assert any("width that grows as log N" in p for p in s.premises) and any("L-uniform" in p for p in s.premises)
    once = [s.claim for s in complexity(1, 0, "fp32", diffusion_steps=sp.log(n)) if s.citation == "2510.13117"]
    assert len(once) == 4 and "log N steps is strictly weaker" in once[-1]
    between = complexity(1, 0, "fp32", diffusion_steps=sp.sqrt(sp.log(n)))
    assert not any("exactly" in s.claim for s in between if s.citation == "2510.13117")
    log = complexity(1, 0, "log", diffusion_steps=sp.log(n))
    assert any("Masked diffusion with O(log n) bits" in s.claim and s.status == "no statement" for s in log)


def test_every_proven_line_has_premises_and_a_citation():
    everything = [
        s for precision in ("log", "bf16") for t in (1, sp.log(n), sp.sqrt(sp.log(n)), n, 2**n) for p in (0, n, 2**n)
        for options in ({}, {"delay_edges": True}, {"shifts": True}, {"token_routing": True}, {"token_routing": "topk"})
        for s in complexity(t, p, precision, cot_steps=sp.log(n), diffusion_steps=sp.log(n), **options)
    ]
    for s in everything:
        if s.status != "no statement":
            assert s.premises and s.citation
            assert s.citation == "elementary" or s.citation.replace(".", "").isdigit()
        assert s.claim.endswith(".")
        assert str(s).startswith(f"[{s.status}]")


def test_bad_input_is_explained():
    with pytest.raises(InputError, match=r"precision: expected one of .*, got 'bf17'\. Did you mean 'bf16'\?"):
        precision_kind("bf17")
    with pytest.raises(InputError, match="in the number of tokens n only"):
        growth(n * sp.Symbol("m"))
    with pytest.raises(InputError, match="at least 0, got -3"):
        complexity(-3)
    with pytest.raises(InputError, match="which tends to -oo"):
        growth(5 - n)
