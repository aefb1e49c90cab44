"""Loop counts that are drawn or follow the row's length, as text and as numbers."""

import math

import pytest
import torch

import depthpass as dp
from depthpass.passes.draws import draw
from depthpass.passes.times import count_at
from depthpass.spec import dump_spec, load_spec, spec_to_json, spec_to_yaml


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("ceil(log2(n))", lambda n: math.ceil(math.log2(n))),
        ("ceil(1.5*log2(n)**2)", lambda n: math.ceil(1.5 * math.log2(n) ** 2)),
        ("max(2, n // 3) + 1", lambda n: max(2, n // 3) + 1),
        ("floor(sqrt(n) - 0.5)", lambda n: math.floor(math.sqrt(n) - 0.5)),
    ],
)
def test_expressions(text, want):
    from depthpass.analysis.closed_form import n as symbol
    from depthpass.passes.times import formula

    for n in (1, 2, 3, 16, 17, 100):
        assert count_at(text, n) == max(1, want(n)) == formula(text).subs(symbol, n)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("4", "no n. Write a fixed count as a number"), ("ceil(log2(n)", "expected an expression in n"),
        ("ceill(log2(n))", "Did you mean 'ceil'"), ("log2(n) / 3", "whole number"), ("__import__('os') + n", "not understood"),
        ("ceil(log2(m + n))", "'m' in"), ("ceil(1 / (n - 1024))", "no value at n = 1024"), ("ceil(n, base=2)", "not understood"),
    ],
)
def test_expressions_that_are_refused(text, word):
    with pytest.raises(dp.SpecError, match=word.replace("(", r"\(").replace(")", r"\)")):
        dp.Loop(0, 1, times=text)


@pytest.mark.parametrize(("text", "want"), [
    ("floor(n*0.29)", lambda n: max(1, 29 * n // 100)),
    ("ceil(log(n, 5))", lambda n: next(k for k in range(1, 99) if 5**k >= n or n == 1)),
    ("floor(log(n, 10)) + 1", lambda n: len(str(n))),
    ("ceil(log2(n) / 3)", lambda n: max(1, next(k for k in range(99) if 8**k >= n))),
    ("round(n / 2)", lambda n: max(1, round(n / 2))), ("round(0.25*n)", lambda n: max(1, round(n / 4))),
    ("2**log2(n)", lambda n: n), ("floor(sqrt(n)**2)", lambda n: n), ("floor((n*0.1)*10)", lambda n: n),
])
def test_counts_are_exact_and_those_of_the_report(text, want):
    from depthpass.analysis.closed_form import n as symbol
    from depthpass.passes.times import formula

    times = formula(text)
    for n in (*range(1, 130), 625, 1000, 3125, 15625):
        assert count_at(text, n) == want(n) == times.subs(symbol, n), n


def test_drawn_counts_are_huginns():
    """r - 1 has the mean of the rate and the variance of a log-normal Poisson mixture."""
    generator = torch.Generator().manual_seed(0)
    actual = torch.tensor([draw(6.0, 0.5, 1, 10**6, generator) for _ in range(20000)], dtype=torch.float64) - 1
    variance = 6.0 + 36.0 * (math.exp(0.25) - 1)
    assert abs(actual.mean() - 6.0) < 5 * math.sqrt(variance / 20000)
    assert abs(actual.var() / variance - 1) < 0.1
    assert actual.min() >= 0
    clipped = {draw(6.0, 0.5, 3, 5, generator) for _ in range(300)}
    assert clipped == {3, 4, 5}


def test_settling():
    p = dp.Loop(0, 1, times=(2, 9), mean=3.0)
    assert p.varies == "drawn" and p.settled().times == 4 and p.settled(most=True).times == 9
    assert dp.Loop(0, 1, times=(2, 9)).settled().times in (5, 6) and dp.Loop(0, 1, times=(1, 1)).settled().times == 1
    assert dp.Loop(0, 1, times=(2, 9), eval_times=12).settled(most=True).times == 12
    q = dp.Loop(0, 1, times="ceil(log2(n))")
    assert q.varies == "length" and [q.settled(tokens=n).times for n in (1, 2, 3, 9)] == [1, 1, 2, 4]
    assert p.with_loops(3) == dp.Loop(0, 1, times=3) and p.with_loops([1, 2]) == dp.Loop(0, 1, times=(1, 2), mean=3.0)


@pytest.mark.parametrize("p", [dp.Loop(0, 1, times=(1, 8), mean=2.5, eval_times=3, bptt=4),
                               dp.Loop(0, 2, times="ceil(2*log2(n)**1.5)")])
def test_specs_hold_them(p):
    assert load_spec(spec_to_yaml(p)) == load_spec(spec_to_json(p)) == load_spec(dump_spec(p)) == (p,)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"times": (0, 3)}, r"range \[low, high\]"), ({"times": (4, 3)}, r"range \[low, high\]"),
        ({"times": 3, "mean": 2.0}, "loop.mean: expected a range"), ({"times": (1, 3), "mean": 0.0}, "positive"),
        ({"times": 3, "eval_times": 2}, "loop.eval_times: expected a range"), ({"bptt": 0}, "loop.bptt"),
        ({"times": "n", "taps": True}, "loop.taps: expected nothing beside"), ({"times": (1, 4), "exit": 0.5}, "at least 2"),
        ({"times": "n", "lora_rank": 2}, "loop.lora_rank"),
    ],
)
def test_bad_options(options, word):
    with pytest.raises(dp.SpecError, match=word):
        dp.Loop(0, 1, **options)


def test_truncation_is_one_op_where_it_cuts():
    from depthpass.ir import plain
    from depthpass.passes import Context, apply_spec

    stock = plain("M", 3, 8)

    def program(**options):
        return apply_spec(stock, dp.Loop(1, 2, inject="add", **options), Context.of(stock))

    cut = program(times=5, bptt=2)
    assert [o.kind for o in cut].count("detach") == 1
    assert [o["index"] for o in cut.visits if o.name in cut.stopped] == [1, 1, 1]
    assert dp.parse_program(str(cut)).without_notes() == cut.without_notes()
    assert program(times=2, bptt=2).without_notes() == program(times=2).without_notes() and not program(times=5).stopped
