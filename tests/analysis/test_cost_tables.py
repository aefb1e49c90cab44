"""Cost tables of published systems, reproduced from programs and real model shapes."""

from decimal import ROUND_DOWN, ROUND_HALF_UP, Decimal
from fractions import Fraction

import pytest
import sympy as sp
from cost_models import llama_162m, tiny
from published_costs import (
    inner_thinking_flops,
    longest_of,
    loop_kv_ratio,
    mean_length,
    mean_recursions,
    recursion_capacities,
    recursion_ratios,
    recursions,
    relative_visits,
)

from depthpass.analysis.cost import cost, visit_equivalents
from depthpass.analysis.cost.symbols import B, n
from depthpass.errors import InputError
from depthpass.ir import parse_program, plain
from depthpass.passes import Context, apply_spec
from depthpass.passes.turboconn import TurboConn

# Inner Thinking Transformer (arXiv 2502.13842) ---------------------------------------------------------------------

THINKING_LAYERS = (1, 3, 5, 7)
"""Every other one of the 8 layers is an ITT layer."""

ITT_162M = {
    # Extra steps of the ITT layers: share of the tokens -> printed FLOPs; None = the row's number is not known to us,
    # only that the rule 1.88 * (1 + sum/2) reproduces it within 0.008.
    "base": ((), "1.88"),
    "Loop x3": ((1, 1), "3.76"),
    "Loop x4": ((1, 1, 1), "4.70"),
    "ITT x2": ((0.9,), "2.72"),
    "ITT x3": ((0.7, 0.7), "3.19"),
    "ITT x4 50/50/50": ((0.5, 0.5, 0.5), "3.29"),
    "90/90/90": ((0.9, 0.9, 0.9), "4.42"),
    "90/90/0": ((0.9, 0.9, 0), "3.57"),
    "90/0/90": ((0.9, 0, 0.9), "3.57"),
    "0/90/90": ((0, 0.9, 0.9), "3.57"),
    "90/90/70": ((0.9, 0.9, 0.7), None),
    "90/70/90": ((0.9, 0.7, 0.9), None),
    "70/70/90": ((0.7, 0.7, 0.9), "4.04"),
    "90/70/70": ((0.9, 0.7, 0.7), None),
    "70/70/70": ((0.7, 0.7, 0.7), "3.85"),
    "70/70/50": ((0.7, 0.7, 0.5), None),
    "70/50/70": ((0.7, 0.5, 0.7), None),
    "50/70/70": ((0.5, 0.7, 0.7), None),
    "70/50/50": ((0.7, 0.5, 0.5), None),
    "50/50/70": ((0.5, 0.5, 0.7), None),
    "50/70/50": ((0.5, 0.7, 0.5), None),
}
ROUNDED_DOWN = {"ITT x2", "ITT x3"}
"""Rows whose printed number is the computed one cut off; every other known row is rounded."""


def inner_thinking(shares, blocks=8, width=1024):
    """The program: a full pass of every block, then routed steps in the ITT layers, added to the accumulator."""
    lines, slot, value, name = ["%0 = embed"], 0, "0", 1

    def define(text):
        nonlocal name
        lines.append(f"%{name} = {text}")
        name += 1
        return str(name - 1)

    for layer in range(blocks):
        value = define(f"block {layer} (%{value}) slot {slot}")
        slot += 1
        if layer not in THINKING_LAYERS:
            continue
        for step, share in enumerate(shares, 1):
            if share == 0:
                continue
            if share == 1:
                value = define(f"block {layer} (%{value}) slot {slot}")
                slot += 1
                continue
            score = define(f"linear itt.l{layer}.router{step} (%{value}) out 1 bias false")
            route = define(f"route topk (%{score}) capacity {share} rounding ceil")
            inside = define(f"gather (%{value}, %{route})")
            visit = define(f"block {layer} (%{inside}) slot {slot}")
            slot += 1
            step_out = define(f"weigh itt.l{layer}.phi{step} (%{visit}) init 0.0")
            value = define(f"scatter (%{value}, %{step_out}, %{route})")
    value = define(f"norm (%{value})")
    return parse_program("\n".join([f"program LlamaForCausalLM blocks={blocks} width={width}", *lines,
                                    f"output %{value}"]))


def paper_base():
    """TFLOPs of one forward pass over 4096 tokens, attention without its mask and the embedding as a product."""
    model = llama_162m()
    stock = cost(plain("LlamaForCausalLM", 8, 1024), model, attention="dense")
    embedding = 2 * model.vocabulary * model.width * n
    return float((stock["FLOPs forward"] + embedding).subs({n: 4096, B: 1})) / 1e12


def printed(value, rounding):
    return str(Decimal(repr(round(value, 9))).quantize(Decimal("0.01"), rounding))


def test_inner_thinking_base_is_1_88_teraflops():
    assert llama_162m().parameters == 162_022_400
    assert paper_base() == pytest.approx(1.877, abs=5e-4)
    assert printed(paper_base(), ROUND_HALF_UP) == "1.88"
    # The usual conventions do not give it: without the embedding's product, or with the causal mask.
    assert printed(paper_base() - 2 * 32000 * 1024 * 4096 / 1e12, ROUND_HALF_UP) == "1.61"
    assert printed(paper_base() - 8 * 2 * 4096 * 4095 * 1024 / 1e12, ROUND_HALF_UP) == "1.60"


@pytest.mark.parametrize("row", ITT_162M)
def test_inner_thinking_flops(row):
    """Printed = 1.88 * (visits per token / layers): a step is charged half a model, embedding and head included."""
    shares, want = ITT_162M[row]
    program = inner_thinking(shares)
    ratio = float(visit_equivalents(program)) / 8
    assert ratio == pytest.approx(1 + 0.5 * sum(shares))
    value = round(paper_base(), 2) * ratio
    assert value == pytest.approx(inner_thinking_flops(1.88, shares, 0.5))
    if want is not None:
        assert abs(value - float(want)) <= 0.008
        assert printed(value, ROUND_DOWN if row in ROUNDED_DOWN else ROUND_HALF_UP) == want


def test_only_two_known_rows_are_cut_off():
    rounds = {row for row, (shares, want) in ITT_162M.items()
              if want and printed(1.88 * (1 + sum(shares) / 2), ROUND_HALF_UP) != want}
    cuts = {row for row, (shares, want) in ITT_162M.items()
            if want and printed(1.88 * (1 + sum(shares) / 2), ROUND_DOWN) != want}
    assert rounds == ROUNDED_DOWN
    assert cuts == {"90/90/90"}


def test_inner_thinking_counted_from_the_program_is_cheaper_than_printed():
    """No step runs the embedding or the head again, and its attention sees selected keys only: x4 is 1.40, not 1.75."""
    counted = cost(inner_thinking((0.5, 0.5, 0.5)), llama_162m(), attention="dense")
    ratio = counted.at("FLOPs forward", 4096) / counted.stock.at("FLOPs forward", 4096)
    model = llama_162m()
    linear = sum(model.blocks[0].count.gemm_flops.values()) / (n * B)
    step = 0.5 * float(linear) * 4096 + 0.25 * 4 * 4096**2 * 1024
    base = counted.stock.at("FLOPs forward", 4096)
    routers = 12 * 2 * 1024 * 4096
    assert ratio == pytest.approx((base + 12 * step + routers) / base)
    assert ratio < 1.75
    phi_and_routers = 12 * 2 * 1024
    assert counted.at("parameters new", 4096) == phi_and_routers


# TurboConn (arXiv 2602.17993) --------------------------------------------------------------------------------------

RECURSIONS = {
    # task: mean padded length, printed recursions by group.
    "parity": (154.69, {4: 38.81, 6: 25.94, 8: 19.84, 16: 10.00}),
    "arithmetic": (125.75, {4: 31.81, 6: 21.37, 8: 16.13, 16: 8.17}),
    "GSM8K": (101.92, {4: 25.86, 6: 17.40, 8: 13.18, 16: 6.84}),
}


def test_turboconn_recursions_on_parity_follow_from_its_recipe():
    """Lengths U(1..70) in batches of 64, two tokens per bit and 16 around: the longest row decides.

    Printed are means over the 6,000 batches of one pass over 384k samples: two standard errors from the exact mean.
    """
    bits = longest_of({k: Fraction(1, 70) for k in range(1, 71)}, 64)
    lengths = {2 * k + 16: p for k, p in bits.items()}
    mean, table = RECURSIONS["parity"]
    assert mean_length(lengths) == pytest.approx(mean, abs=0.01)
    for group, want in table.items():
        exact = float(recursions(lengths, group))
        variance = sum(p * (-(-length // group) - exact) ** 2 for length, p in lengths.items())
        assert exact == pytest.approx(want, abs=0.005 + 2 * float(variance / 6000) ** 0.5)
        assert exact == pytest.approx(want, abs=0.02)


@pytest.mark.parametrize("task", ["arithmetic", "GSM8K"])
@pytest.mark.parametrize("group", [4, 6, 8, 16])
def test_turboconn_recursions_from_the_mean_length(task, group):
    """Without the distribution: exact for uniform remainders, and off by what their unevenness leaves."""
    mean, table = RECURSIONS[task]
    off = 0.17 if (task, group) == ("arithmetic", 16) else 0.03
    assert mean_recursions(mean, group) == pytest.approx(table[group], abs=off)


def test_mean_recursions_is_exact_for_uniform_remainders():
    lengths = list(range(40, 64))
    for group in (2, 4, 6, 8):
        assert float(recursions(lengths, group)) == pytest.approx(mean_recursions(mean_length(lengths), group))


def test_program_steps_are_the_recursions():
    stock = plain("LlamaForCausalLM", 4, 32)
    for group in (4, 6, 8, 16):
        program = apply_spec(stock, TurboConn(bridges=((3, 0),), group=group), Context.of(stock))
        for length in (101, 126, 154, 156):
            assert cost(program, tiny()).at("serial steps", length) == recursions([length], group)


# Parallel loops (arXiv 2510.24824) ---------------------------------------------------------------------------------


def parallel_loops(loops, window, blocks=4, width=32):
    lines, value, name = ["%0 = embed"], "0", 1
    for r in range(loops):
        if r:
            lines += [f"%{name} = delay 1 (%{value})", f"%{name + 1} = add (%0, %{name})"]
            value, name = str(name + 1), name + 2
        for b in range(blocks):
            shared = f" keys {b} gate g{r}.{b} window {window}" if r else ""
            lines.append(f"%{name} = block {b} (%{value}) slot {r * blocks + b}{shared}")
            value, name = str(name), name + 1
    lines += [f"%{name} = norm (%{value})", f"output %{name}"]
    return parse_program("\n".join([f"program LlamaForCausalLM blocks={blocks} width={width}", *lines]))


def test_parallel_loops_keep_1_4_percent_more_keys():
    """1 + (R - 1) * W / T: at R = 2 and W = 64 that is 1.4 % for T of about 4.6k tokens."""
    cost_ = cost(parallel_loops(2, 64), tiny())
    ratio = Fraction(cost_.at("KV bytes", 4608), cost_.stock.at("KV bytes", 4608))
    assert ratio == loop_kv_ratio(2, 64, 4608)
    assert f"{float(ratio - 1):.1%}" == "1.4%"
    lengths = [t for t in range(64, 20000) if f"{64 / t:.1%}" == "1.4%"]
    assert (min(lengths), max(lengths)) == (4414, 4740)
    for loops in (2, 3, 4):
        cost_ = cost(parallel_loops(loops, 16), tiny())
        for tokens in (10, 200):
            got = Fraction(cost_.at("KV bytes", tokens), cost_.stock.at("KV bytes", tokens))
            assert got == loop_kv_ratio(loops, 16, tokens)
        assert cost_.at("decode block calls", 200) == 4, "all loops of a token are rows of one pass"
        linear = ("projection", "mlp")
        assert all(sp.expand(cost_.flops[c] - loops * cost_.stock.flops[c]) == 0 for c in linear)


# Mixture of recursions (arXiv 2507.10524) --------------------------------------------------------------------------


def recursions_program(count, sharing, inside=1):
    """Cycle sharing of a stack of ``inside`` blocks; each recursion takes its share of the full length."""
    lines, value, name, slot, route = ["%0 = embed"], "0", 1, 0, None
    for r, share in enumerate(recursion_capacities(count)):
        if share < 1:
            score, chosen, gathered = str(name), str(name + 1), str(name + 2)
            nest = f", %{route}" if route else ""
            lines += [f"%{score} = linear mor.r{r} (%{value}) out 1 bias false",
                      f"%{chosen} = route topk (%{score}{nest}) capacity {float(share)}",
                      f"%{gathered} = gather (%{value}, %{chosen})"]
            inner, name, route = gathered, name + 3, chosen
        else:
            inner = value
        for b in range(inside):
            keys = f" keys {b}" if sharing and r else ""
            lines.append(f"%{name} = block {b} (%{inner}) slot {slot}{keys}")
            inner, name, slot = str(name), name + 1, slot + 1
        if share < 1:
            lines.append(f"%{name} = scatter (%{value}, %{inner}, %{route})")
            inner, name = str(name), name + 1
        value = inner
    lines += [f"%{name} = norm (%{value})", f"output %{name}"]
    return parse_program("\n".join(["program LlamaForCausalLM blocks=4 width=32", *lines]))


def unrolled(depth, inside=1):
    lines = ["%0 = embed", *(f"%{i + 1} = block {i % inside} (%{i}) slot {i}" for i in range(depth))]
    return parse_program("\n".join(["program LlamaForCausalLM blocks=4 width=32", *lines,
                                    f"%{depth + 1} = norm (%{depth})", f"output %{depth + 1}"]))


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("sharing", [False, True])
def test_mixture_of_recursions_ratios(count, sharing):
    """Against a stack of equal unrolled depth: KV memory, KV reads, and attention FLOPs per recursion."""
    want, tokens = recursion_ratios(count, sharing), 120
    routed = cost(recursions_program(count, sharing), tiny(), attention="dense")
    base = cost(unrolled(count), tiny(), attention="dense")

    def ratio(quantity):
        return Fraction(routed.at(quantity, tokens), base.at(quantity, tokens))

    assert ratio("KV bytes") == want["kv_memory"]
    assert ratio("KV bytes read, decode, deepest token") == want["kv_reads"]
    attention = Fraction(routed.evaluate(routed.flops["attention"], tokens),
                         base.evaluate(base.flops["attention"], tokens))
    assert attention == sum(want["attention_flops"]) / count


def test_mixture_of_recursions_ratios_at_three():
    """Capacities 1, 2/3, 1/3 are no binary fractions: equal up to the token that rounding moves."""
    for sharing in (False, True):
        want = recursion_ratios(3, sharing)
        routed = cost(recursions_program(3, sharing), tiny(), attention="dense")
        base = cost(unrolled(3), tiny(), attention="dense")
        tokens = 3000
        assert routed.at("KV bytes", tokens) / base.at("KV bytes", tokens) == pytest.approx(
            float(want["kv_memory"]), abs=1 / 3000)
        attention = routed.evaluate(routed.flops["attention"], tokens) / base.evaluate(base.flops["attention"], tokens)
        assert attention == pytest.approx(float(sum(want["attention_flops"]) / 3), abs=1e-3)


def test_mixture_of_recursions_formulas():
    assert recursion_ratios(2, False) == {"kv_memory": Fraction(3, 4), "kv_reads": Fraction(3, 4),
                                          "attention_flops": (1, Fraction(1, 4))}
    assert recursion_ratios(3, False)["kv_memory"] == Fraction(4, 6)
    assert recursion_ratios(4, False)["kv_memory"] == Fraction(5, 8)
    assert recursion_ratios(4, True) == {
        "kv_memory": Fraction(1, 4), "kv_reads": 1,
        "attention_flops": (1, Fraction(3, 4), Fraction(1, 2), Fraction(1, 4)),
    }


# Intra-layer recurrence (arXiv 2505.01855) -------------------------------------------------------------------------


@pytest.mark.parametrize("reuse", [(1, 1, 1, 1), (2, 1, 1, 1), (1, 2, 2, 3), (4, 2, 1, 1), (2, 2, 2, 2)])
def test_intra_layer_recurrence_costs_the_sum_of_its_reuse_map(reuse):
    visits = [b for b, r in enumerate(reuse) for _ in range(r)]
    lines = ["%0 = embed", *(f"%{i + 1} = block {b} (%{i}) slot {i}" for i, b in enumerate(visits))]
    depth = len(visits)
    program = parse_program("\n".join(["program LlamaForCausalLM blocks=4 width=32", *lines,
                                       f"%{depth + 1} = norm (%{depth})", f"output %{depth + 1}"]))
    cost_ = cost(program, tiny())
    want = relative_visits(reuse, 4)
    assert visit_equivalents(program) / 4 == want
    for c in ("projection", "attention", "mlp"):
        assert cost_.evaluate(cost_.flops[c], 50) == want * (cost_.stock or cost_).evaluate(
            (cost_.stock or cost_).flops[c], 50)
    assert cost_.at("KV bytes", 50) == want * (cost_.stock or cost_).at("KV bytes", 50)


def test_bad_input_is_explained():
    with pytest.raises(InputError, match="group: expected an integer of at least 1, got 0"):
        recursions([3], 0)
    with pytest.raises(InputError, match=r"add up to 1, got 0\.5"):
        recursions({3: 0.5}, 2)
    with pytest.raises(InputError, match="at least one length"):
        recursions([], 2)
    with pytest.raises(InputError, match="loops"):
        loop_kv_ratio(0, 64, 100)
