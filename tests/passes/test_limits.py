"""Specs come with checkpoints: none may fill the memory or run for ever. Every case here is refused, quickly."""

import pytest

import depthpass as dp
from depthpass.ir import parse_program, plain, verify
from depthpass.limits import INTEGER, VISITS
from depthpass.passes import Context, apply_spec
from depthpass.passes.times import count_at
from depthpass.spec import load_spec

HUGE = 10**5000


@pytest.mark.parametrize("text", [
    "n**n**n", "2**n", "n**1000", "10**18*n", "n*" * 200 + "n", "9" * 200 + "*n",
    "floor(2**(n*0.05))", "(" * 5000 + "n" + ")" * 5000, "-" * 5000 + "n", "70000 + n",
])
def test_expressions(text):
    with pytest.raises(dp.SpecError, match=r"loop\.times"):
        dp.Loop(0, 1, times=text)
    assert count_at("ceil(" * 40 + "n" + ")" * 40, 7) == 7  # deep, but short


@pytest.mark.parametrize("make", [
    lambda k: dp.Loop(0, 1, times=k), lambda k: dp.Loop(0, 1, times=(1, k)), lambda k: dp.Loop(0, 1, times=2, lora_rank=k),
    lambda k: dp.TurboConn(bridges=[(1, 0)], group=k), lambda k: dp.TurboConn(bridges=[(1, 0)], rank=k),
    lambda k: dp.ParallelLoop(loops=k), lambda k: dp.ParallelLoop(shift=k), lambda k: dp.Pad(k),
    lambda k: dp.MixtureOfRecursions(recursions=k), lambda k: dp.InnerThinking(steps=k), lambda k: dp.Repeat(0, 1, times=k),
    lambda k: dp.IntraLayerRecurrence((k, 1)), lambda k: dp.LayerProgram((0, k)), lambda k: dp.Taps((k,)),
    lambda k: dp.Skip(0, k),
])
@pytest.mark.parametrize("count", [10**5, 10**9, HUGE], ids=["1e5", "1e9", "5000 digits"])
def test_counts(make, count):
    with pytest.raises(dp.SpecError, match=f"at most {INTEGER}"):
        make(count)


@pytest.mark.parametrize("spec", [
    dp.Loop(times=INTEGER), dp.Loop(times=(1, INTEGER)), dp.ParallelLoop(loops=INTEGER), dp.Repeat(0, 4, times=INTEGER),
    dp.IntraLayerRecurrence((INTEGER,) * 4), dp.MixtureOfRecursions(start=1, recursions=INTEGER),
    dp.InnerThinking(steps=INTEGER), dp.Loop(times=VISITS // 4, taps=True, end=3),
    dp.LayerProgram((0, 1) * VISITS), dp.Loop(times=INTEGER, exit=0.5),
], ids=lambda s: s.label)
def test_programs(spec):
    stock = plain("L", 4, 32)
    with pytest.raises(dp.SpecError, match=f"at most {VISITS} block visits"):
        apply_spec(stock, [spec.settled(most=True)], Context.of(stock))


def test_programs_by_hand():
    with pytest.raises(dp.SpecError, match="at most"):
        plain("L", 10**9, 32)
    text = "program L blocks=1 width=8\n%0 = embed\n%1 = delay {} (%2)\n%2 = add (%0, %1)\noutput %2"
    verify(parse_program(text.format(INTEGER)))
    with pytest.raises(dp.VerifyError, match=f"tokens of at most {INTEGER}"):
        verify(parse_program(text.format(INTEGER + 1)))


@pytest.mark.parametrize("text", [
    "[" * 5000 + "]" * 5000, "{a: " * 5000 + "1" + "}" * 5000, "pass: loop\ntimes: " + "9" * 5000,
    '{"pass": "loop", "times": ' + "9" * 5000 + "}", "pass: loop\ntimes: 2001-99-99", "# " + "x" * (1 << 20),
    "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nd: &d [*c, *c]\n" * 1,
])
def test_texts(text):
    with pytest.raises(dp.SpecError) as error:
        load_spec(text)
    assert len(str(error.value)) < 1000


def test_aliases_do_not_explode_in_messages():
    levels = "".join(f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 10)}]\n" for i in range(1, 30))
    with pytest.raises(dp.SpecError) as error:
        load_spec("x0: &x0 [1]\n" + levels + "pass: loop\ntimes: *x29\n")
    assert len(str(error.value)) < 5000
    with pytest.raises(dp.SpecError) as error:
        load_spec([HUGE])
    assert "integer of 16610 bits" in str(error.value)


@pytest.mark.parametrize("text", ["name: a\nslices: []\n---\nname: b\n", "[" * 5000, "slices: " + "9" * 5000])
def test_mergekit_texts(text):
    with pytest.raises(dp.SpecError, match="mergekit config"):
        dp.LayerProgram.from_mergekit(text)


def test_layer_maps():
    for text in ("0:1000000000", "0:" + "9" * 5000):
        with pytest.raises(dp.SpecError):
            dp.LayerProgram.from_flat_map(text)
    with pytest.raises(dp.SpecError):
        dp.LayerProgram.from_layer_replication([[0, 10**9]])
