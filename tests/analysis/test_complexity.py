import pytest
import sympy as sp

from depthpass.analysis.complexity import Growth, complexity, growth, precision_kind
from depthpass.errors import InputError

n = sp.Symbol("n", integer=True, positive=True)


@pytest.mark.parametrize(("expr", "want"), [
    (1, Growth("constant", 0)),
    (sp.Integer(7), Growth("constant", 0)),
    (4 + 3 / n, Growth("constant", 0)),
    (sp.Min(n, 4) * 16, Growth("constant", 0)),  # cross-loop parallelism: min(R, n) * L
    (sp.ceiling(sp.log(n, 2)), Growth("polylog", 1)),
    (3 * sp.ceiling(2 * sp.log(n)) + 5, Growth("polylog", 1)),
    (sp.log(n) ** 2, Growth("polylog", 2)),
    (sp.ceiling(sp.log(n, 2) ** sp.Rational(3, 2)), Growth("polylog", 2)),
    (sp.log(n) ** 3 + sp.log(n), Growth("polylog", 3)),
    (sp.log(sp.log(n)), Growth("polylog", 1)),
    (sp.Max(1, sp.log(n)), Growth("polylog", 1)),
    (n, Growth("polynomial")),
    (12 * sp.ceiling(n / 4) + 4, Growth("polynomial")),
    (sp.sqrt(n), Growth("polynomial")),
    (n**2 * sp.log(n), Growth("polynomial")),
    (2**n, Growth("beyond")),
])
def test_growth(expr, want):
    assert growth(expr) == want


def claims(statements, status):
    return [s.claim for s in statements if s.status == status]


def test_log_precision_loops_with_padding_are_exactly_tc():
    (exact, whole) = complexity(sp.ceiling(sp.log(n, 2) ** 2), n**2, "log")
    assert "exactly first-order-uniform TC^2" in exact.claim
    assert exact.status == "proven" and exact.citation == "2505.18948"
    assert any("O(log n) bits" in p for p in exact.premises)
    assert "exactly NC" in whole.claim


@pytest.mark.parametrize("precision", ["bf16", "fp32", "torch.float16", "fixed"])
def test_hardware_precision_is_reported_as_ac(precision):
    found = complexity(sp.log(n), n, precision)
    assert "exactly first-order-uniform AC^1" in found[0].claim
    assert found[0].citation == "2605.30523"
    assert not any("exactly first-order-uniform TC" in s.claim for s in found)


def test_without_padding_only_the_upper_bound_is_proven():
    found = complexity(1, 0, "log")
    assert "nothing outside first-order-uniform TC^0" in found[0].claim
    assert found[1].status == "no statement" and "Without polynomial padding" in found[1].claim


def test_constant_loops_stay_in_the_class_of_the_stock_model():
    stock, looped = complexity(1, n, "log"), complexity(4, n, "log")
    assert [s.claim for s in stock] == [s.claim for s in looped]


def test_linear_loops_get_no_class():
    nothing, upper = complexity(n, n, "log")
    assert nothing.status == "no statement" and "do not cover" in nothing.claim
    assert upper.status == "proven" and upper.claim.startswith("At most P")
    (only,) = complexity(2**n, n, "log")
    assert only.status == "no statement"


def test_delay_edges_say_what_can_and_cannot_be_said():
    """TurboConn: depth grows with n, yet no theorem gives it a class."""
    found = complexity(1, 0, "bf16", delay_edges=True)
    assert found[0].status == "no statement" and "no class is proven" in found[0].claim
    assert any("At most P" in c for c in claims(found, "proven"))
    assert any("At least what the model without the edges" in c for c in claims(found, "proven"))
    assert not any("AC^" in s.claim or "TC^" in s.claim for s in found)


def test_chain_of_thought_comparisons():
    found = complexity(sp.log(n) ** 2, n**3, "log", cot_steps=sp.log(n) ** 2)
    strict = next(s for s in found if "strictly weaker" in s.claim)
    assert strict.status == "conditional" and strict.premises[0] == "TC^1 is not TC^2"
    assert strict.citation == "2505.19245"
    none = complexity(1, n, "log", cot_steps=n)
    assert any("no separation is proven" in s.claim for s in none)
    assert not any("strictly weaker" in s.claim for s in none)
    fixed = complexity(sp.log(n), n, "bf16", cot_steps=sp.log(n))
    assert any("at fixed precision they are not proven" in s.claim for s in fixed)


def test_masked_diffusion():
    found = complexity(1, 0, "fp32", diffusion_steps=sp.log(n) ** 2)
    diffusion = [s for s in found if s.citation == "2510.13117"]
    assert len(diffusion) == 4 and "exactly AC^2" in diffusion[0].claim
    log = complexity(1, 0, "log", diffusion_steps=sp.log(n))
    assert any("Masked diffusion with O(log n) bits" in s.claim and s.status == "no statement" for s in log)


def test_routing_gets_no_statement():
    assert any("Routing tokens" in s.claim and s.status == "no statement"
               for s in complexity(4, 0, "bf16", token_routing=True))


def test_every_proven_line_has_premises_and_a_citation():
    everything = [
        s for precision in ("log", "bf16") for t in (1, sp.log(n), n, 2**n) for p in (0, n) for delay in (False, True)
        for s in complexity(t, p, precision, cot_steps=sp.log(n), diffusion_steps=sp.log(n), delay_edges=delay)
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
