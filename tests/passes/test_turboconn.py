"""TurboConn: the rule and its presets, the rewritten program, parameters, schedules, and every refusal."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from depthpass.errors import PassError, SpecError
from depthpass.ir import Program, parameters, plain
from depthpass.passes import Context, apply_spec
from depthpass.passes.layer_program import LayerProgram
from depthpass.passes.turboconn import TurboConn
from depthpass.schedule import schedule
from depthpass.testing import turboconns


def turbo(program: Program, *passes: TurboConn) -> Program:
    return apply_spec(program, passes, Context.of(program))


def bridges_of(program: Program) -> set[tuple[int, int, int]]:
    """(source, destination, tokens) of every bridge, read off the program: what is added where, from where."""
    visit_of: dict[str, int] = {}
    for o in program:
        if o.kind == "block":
            visit_of[o.name] = len(set(visit_of.values()))
        elif o.kind == "add" and o.args[0] in visit_of:
            visit_of[o.name] = visit_of[o.args[0]]
    seen = set()
    for o in program:
        for arriving in o.args[1:] if o.kind == "add" else ():
            delay = program.defs[arriving]
            while delay.kind != "delay":
                delay = program.defs[delay.args[0]]
            source = program.defs[delay.args[0]]
            if source.kind == "linear":
                source = program.defs[source.args[0]]
            # The source is captured after every bridge that lands on it: nothing else may read the bare visit.
            assert all(u.name in visit_of for u in program.users(source.name) if u.kind == "add")
            seen.add((visit_of[source.name], visit_of[o.name], delay["tokens"]))
    return seen


def test_small(golden) -> None:
    golden(str(turbo(plain("LlamaForCausalLM", 4, 64), TurboConn(bridges=[(2, 0), (3, 1), (3, 0)], rank=8))))


def test_small_gain_on_the_input(golden) -> None:
    golden(str(turbo(plain("LlamaForCausalLM", 4, 64), TurboConn(bridges=[(2, 0), (3, 2)], alpha=1.0, write="input"))))


def test_small_full_rank(golden) -> None:
    """Two bridges from one source share one delay line; a bridge lands on a source of another."""
    spec = TurboConn(bridges=[(3, 0), (3, 2), (2, 0)], rank=None, gain=0.5)
    golden(str(turbo(plain("LlamaForCausalLM", 4, 64), spec)))


def test_llama_1b(golden) -> None:
    golden(str(turbo(plain("LlamaForCausalLM", 16, 2048), TurboConn.llama_1b())))


def test_on_a_program_with_repeats(golden) -> None:
    """Source and destination are positions in the list of visits."""
    stock = plain("LlamaForCausalLM", 3, 64)
    spec = [LayerProgram([0, 1, 1, 2]), TurboConn(bridges=[(2, 0)], group=2)]
    golden(str(apply_spec(stock, spec, Context.of(stock))))


def test_the_bands_of_the_official_code() -> None:
    band_1b = {(s, d) for s in range(0, 16, 2) for d in range(0, 16, 2) if s - d > 5}
    band_8b = {(s, d) for s in range(6, 31, 2) for d in range(7, 26, 2) if s - d > 6}
    assert (len(band_1b), len(band_8b)) == (15, 45)
    assert set(TurboConn.llama_1b().resolve(16)) == set(TurboConn().resolve(16)) == band_1b
    assert set(TurboConn.llama_8b().resolve(32)) == band_8b
    assert TurboConn.sparse().resolve(28) == TurboConn(bridges=[(-1, 0)]).resolve(28) == ((27, 0),)


@pytest.mark.parametrize(("preset", "blocks", "serial"), [("llama-1b", 16, 14), ("llama-8b", 32, 23), ("sparse", 8, 7)])
@pytest.mark.parametrize("group", [1, 4, 16])
def test_only_blocks_between_the_ends_are_serial(preset, blocks: int, serial: int, group: int) -> None:
    plan = schedule(turbo(plain("LlamaForCausalLM", blocks, 64), TurboConn(preset=preset, group=group)))
    assert (plan.serial_visits, plan.chunk, len(plan.serial_regions)) == (serial, group, 1)
    assert plan.steps(10 * group) == blocks - serial + 10 * serial


@pytest.mark.parametrize("visits", range(3, 40))
def test_the_default_rule_fits_every_stack(visits: int) -> None:
    bridges = TurboConn().resolve(visits)
    spans = [s - d for s, d in bridges]
    assert bridges and max(spans) == (visits - 1) // 2 * 2
    assert min(spans) == min(6, max(spans))
    assert all(s % 2 == d % 2 == 0 and s < visits for s, d in bridges)


def test_sizes_of_the_published_models() -> None:
    """Bridges have 7.4 M parameters on Llama 1B and 44.4 M on 8B."""
    for preset, blocks, width, millions in (("llama-1b", 16, 2048, 7.4), ("llama-8b", 32, 4096, 44.4)):
        params = parameters(turbo(plain("LlamaForCausalLM", blocks, width), TurboConn(preset=preset)))
        count = sum(p.shape[0] * (p.shape[1] if len(p.shape) == 2 else 1) for p in params.values())
        assert round(count / 1e6, 1) == millions


def test_parameters_start_as_published() -> None:
    params = parameters(turbo(plain("M", 4, 64), TurboConn(bridges=[(2, 0)], rank=8)))
    assert {n: (p.shape, p.init, p.fill) for n, p in params.items()} == {
        "turboconn.s2_d0.down.weight": ((8, 64), 0.02, None),
        "turboconn.s2_d0.down.bias": ((8,), 0.0, None),
        "turboconn.s2_d0.up.weight": ((64, 8), 0.0, None),
        "turboconn.s2_d0.up.bias": ((64,), 0.0, None),
    }
    full = parameters(turbo(plain("M", 4, 64), TurboConn(bridges=[(2, 0)], rank=None)))
    assert {n: (p.shape, p.init) for n, p in full.items()} == {
        "turboconn.s2_d0.full.weight": ((64, 64), 0.0), "turboconn.s2_d0.full.bias": ((64,), 0.0),
    }


@pytest.mark.parametrize(
    ("options", "scale"),
    [({}, None), ({"alpha": 1.0}, 0.01), ({"alpha": 30}, 0.3), ({"gain": 1.0}, None), ({"gain": 0.5}, 0.5)],
)
def test_multiplier_stands_before_up_and_only_when_it_is_not_one(options: dict, scale: float | None) -> None:
    program = turbo(plain("M", 4, 64), TurboConn(bridges=[(2, 0)], **options))
    scales = [o["by"] for o in program if o.kind == "scale"]
    assert scales == ([] if scale is None else [scale])
    (up,) = [o for o in program if o.kind == "linear" and str(o["name"]).endswith(".up")]
    assert program.defs[up.args[0]].kind == ("delay" if scale is None else "scale")


@given(st.integers(2, 7).flatmap(lambda n: st.tuples(st.just(n), turboconns(n))))
def test_program_has_just_the_bridges_asked_for(case: tuple[int, TurboConn]) -> None:
    visits, spec = case
    program = turbo(plain("M", visits, 8), spec)
    want = {(s, d, spec.group) for s, d in spec.bridges or ()}
    if spec.write == "output":
        assert bridges_of(program) == want
    delays = [o for o in program if o.kind == "delay"]
    assert len(delays) == len(want) if spec.rank else len(delays) == len({s for s, _, _ in want})
    assert sum(o.kind == "add" for o in program) == len({d for _, d, _ in want})
    assert [o["index"] for o in program.visits] == [o["slot"] for o in program.visits] == list(range(visits))
    on_cycles = {v for s, d, _ in want for v in range(d + (spec.write == "output"), s + 1)}
    assert schedule(program).serial_visits == len(on_cycles)


def test_two_passes_compose() -> None:
    """The second pass lands after, and captures after, the bridges of the first."""
    stock = plain("M", 5, 8)
    long, short = TurboConn(bridges=[(3, 1), (4, 3)], group=4), TurboConn(bridges=[(3, 1)], group=2, scope="short")
    both = turbo(stock, long, short)
    assert bridges_of(both) == {(3, 1, 4), (4, 3, 4), (3, 1, 2)}
    with pytest.raises(PassError, match=r"already has a parameter 'turboconn.s3_d1.down'.*scope="):
        turbo(stock, TurboConn(bridges=[(3, 1)], group=4), TurboConn(bridges=[(3, 1)], group=2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group": 0}, "turboconn.group: expected at least 1 token, got 0"),
        ({"group": 2.5}, "turboconn.group: expected an integer, got 2.5 (float)"),
        ({"group": True}, "turboconn.group: expected an integer, got True (bool)"),
        ({"rank": 0}, "turboconn.rank: expected at least 1, got 0. Use null (None)"),
        ({"alpha": float("nan")}, "turboconn.alpha: expected a number, got nan"),
        ({"gain": 0.5, "alpha": 1.0}, "turboconn.gain: expected either gain or alpha"),
        ({"bridges": []}, "turboconn.bridges: expected at least one (source, destination) pair"),
        ({"bridges": [(2, 0, 1)]}, "turboconn.bridges: expected a list of (integer, integer) or null"),
        ({"bridges": (2, 0)}, "turboconn.bridges: expected a list of (integer, integer) or null"),
        ({"bridges": [(2, 0)], "preset": "sparse"}, "turboconn.preset: expected either bridges or preset"),
        ({"bridges": [(2, 0)], "min_span": 2}, "turboconn.min_span: expected no rule beside bridges"),
        ({"preset": "llama-1b", "stride": 1}, "turboconn.stride: expected no rule beside preset"),
        ({"preset": "lama-1b"}, "Did you mean 'llama-1b'?"),
        ({"stride": 0}, "turboconn.stride: expected at least 1"),
        ({"min_span": 0}, "turboconn.min_span: expected at least 1"),
        ({"sources": (4, 4)}, "turboconn.sources: expected a half-open range 0 <= start < stop"),
        ({"destinations": (-4, 4)}, "turboconn.destinations: expected a half-open range"),
        ({"write": "ouput"}, "expected 'output' or 'input', got 'ouput' (str). Did you mean 'output'?"),
        ({"init_std": 0.0}, "turboconn.init_std: expected a positive number"),
        ({"scope": "a.b"}, "turboconn.scope: expected a plain name"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(SpecError) as error:
        TurboConn(**options)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bridges": [(4, 0)]}, "expected positions in 0..3 (or negative ones from the end), got 4 in (4, 0)"),
        ({"bridges": [(-5, 0)]}, "got -5 in (-5, 0)"),
        ({"bridges": [(1, 1)]}, "expected a source above its destination, got (1, 1)"),
        ({"bridges": [(0, 3)]}, "expected a source above its destination, got (0, 3)"),
        ({"bridges": [(-4, -1)]}, "got (-4, -1), that is (0, 3)"),
        ({"bridges": [(3, 0), (2, 1), (3, 0)]}, "(3, 0) is given twice"),
        ({"bridges": [(3, 0), (-1, -4)]}, "(3, 0) is given twice"),
        ({"min_span": 6}, "(stride 2, min_span 6, sources [0, 2], destinations [0, 2]) gives no bridge on 4 visits. "
                          "Lower min_span to at most 2"),
        ({"sources": (0, 1)}, "gives no bridge on 4 visits"),
        ({"sources": (0, 5)}, "turboconn.sources: expected a range within 0..4, got (0, 5)"),
        ({"preset": "llama-8b"}, "expected a program of at least 31 visits for 'llama-8b', got 4"),
    ],
)
def test_what_the_model_does_not_allow(options: dict, message: str) -> None:
    with pytest.raises(PassError) as error:
        turbo(plain("M", 4, 8), TurboConn(**options))
    assert message in str(error.value)


def test_one_block_takes_no_bridge() -> None:
    with pytest.raises(PassError, match="a bridge needs at least two visits"):
        turbo(plain("M", 1, 8), TurboConn())
    with pytest.raises(PassError, match="expected a program of at least 2 visits for 'sparse'"):
        turbo(plain("M", 1, 8), TurboConn.sparse())
    assert TurboConn(bridges=[(1, 0)]).resolve(2) == TurboConn(stride=1).resolve(2) == ((1, 0),)


@pytest.mark.parametrize(("preset", "blocks", "last"), [("llama-1b", 16, 14), ("llama-8b", 32, 30)])
def test_the_public_codes_wiring_reads_one_source(preset: str, blocks: int, last: int) -> None:
    """All bridges read the last one's source; the depth is the longest climb from there, not the longest bridge."""
    program = turbo(plain("LlamaForCausalLM", blocks, 64), TurboConn(preset=preset, wiring="code", rank=3))
    bridges = TurboConn(preset=preset).resolve(blocks)
    assert bridges_of(program) == {(last, d, 4) for _, d in bridges}
    own = [d for s, d in bridges if s == last]
    names = set(parameters(program))
    assert names == {f"turboconn.s{s}_d{d}.up.{k}" for s, d in bridges for k in ("weight", "bias")} | {
        f"turboconn.s{last}_d{d}.down.{k}" for d in own for k in ("weight", "bias")
    }
    assert sum(o.kind == "delay" for o in program) == len(own)
    one_source = [TurboConn(bridges=[(3, 0), (3, 1)], rank=3, wiring=w) for w in ("paper", "code")]
    assert len({str(turbo(plain("M", 4, 8), spec)) for spec in one_source}) == 1


@pytest.mark.parametrize(("bridges", "message"), [
    ([(3, 0), (3, 1), (2, 0)], r"\(3, 1\) is bridge 2 of its source, the last one's source 2 has 1"),
    ([(3, 2), (1, 0)], r"\(3, 2\) lands above the source 1 of the last bridge"),
])
def test_what_the_public_code_could_not_run_is_refused(bridges: list, message: str) -> None:
    with pytest.raises(PassError, match=message):
        turbo(plain("M", 4, 8), TurboConn(bridges=bridges, wiring="code", rank=2))
    with pytest.raises(SpecError, match=r"turboconn\.wiring: expected 'paper' without a rank"):
        TurboConn(wiring="code", rank=None)
