"""The depth that is derived against the longest path of what was really read, while real models ran token by token."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import zoo
from depthpass_lowering.executors.recording import record
from turbos import enliven

import depthpass as dp
from depthpass.analysis.depth import depth
from depthpass.ir import parse_program
from depthpass.ir.ops import OPS
from depthpass.passes import registry
from depthpass.passes.base import Pass
from tests.programs.random_runnable import kinds_of, runnable

TOKENS = 6
SEEDS = range(64)


@dataclass(frozen=True)
class Given(Pass):
    """A program as it is written."""

    name: ClassVar[str] = "given"
    text: str

    def apply(self, program, ctx):
        return parse_program(self.text)


@pytest.fixture(scope="module")
def stocks():
    return {name: enliven(zoo.model(name, 4, dtype=torch.float64), std=0.2) for name in ("llama", "gpt2")}


def row(tokens=TOKENS):
    return torch.randint(6, zoo.VOCABULARY, (tokens,), generator=torch.Generator().manual_seed(3))


def alive(stock, spec):
    model = dp.transform(stock, spec).eval()
    return enliven(model.depth, seed=1, std=0.3, least=1) and model


@pytest.mark.parametrize("chunk", range(8))
def test_random_programs_with_every_op_kind(chunk, stocks, monkeypatch):
    monkeypatch.setitem(registry._registered, Given.name, Given)
    name = "gpt2" if chunk % 4 == 3 else "llama"
    stock, met = stocks[name], 0
    for seed in SEEDS[chunk::8]:
        program = runnable(seed, type(stock).__name__, 4, 32, zoo.VOCABULARY)
        waits = any(o.kind == "route" and o["rule"] == "topk" for o in program)
        try:
            depths = depth(program)
        except dp.PassError:
            with pytest.raises(dp.PassError, match="top-k route lies on a delay cycle"):
                dp.transform(stock, Given(str(program)))
            continue
        model = alive(stock, Given(str(program)))
        recorded = record(model, row())
        assert recorded.depth() == depths.at(TOKENS), (seed, str(program))
        for tap in program.taps:
            assert recorded.depth(tap["name"]) == depth(program, tap["name"]).at(TOKENS), (seed, tap["name"], str(program))
        met += 1
        if waits:
            short = record(model, row(2))
            assert short.depth() == depths.at(2), (seed, str(program))
    assert met >= 5


def test_the_random_programs_have_every_op_kind():
    programs = [runnable(s, "LlamaForCausalLM", 4, 32, zoo.VOCABULARY) for s in SEEDS]
    # rescale comes with T2MLR (test_feedback.py); programs that see ahead are not run token by token (tests/diffusion).
    assert kinds_of(programs) == set(OPS) - {"rescale", "ahead", "denoise"}


SYSTEMS = {
    "bridges": dp.TurboConn(bridges=[(3, 0), (2, 1)], group=2, rank=3),
    "bridges on the input": dp.TurboConn(bridges=[(3, 1)], group=1, rank=3, write="input"),
    "bridges over pads": [dp.TurboConn(bridges=[(3, 0)], group=1, rank=3), dp.Pad(3, token=5)],
    "loops over pads": [dp.Loop(1, 3, times=3, inject="add"), dp.Pad(2, token=5)],
    "states of layers": dp.SameLayerState(share=0.4),
    "groups": [dp.RecurrentLoop(encoder=1, interval=3), dp.TurboConn(bridges=[(2, 0)], group=2, rank=3)],
    "parallel loops": dp.ParallelLoop(loops=3, window=2),
    "recursions": dp.MixtureOfRecursions(start=1, end=3, recursions=2),
    "recursions by threshold": dp.MixtureOfRecursions(start=1, end=3, recursions=3, mode="threshold", kv="shared"),
    "thinking": dp.InnerThinking(blocks=[1, 2], steps=3),
    "huginn": dp.Loop.huginn(1, 3, times=3, exit=0.3, criterion="kl"),
    "exits picked afterwards": dp.Loop(1, 3, times=3, exit=0.3, skip=False, taps=True),
    "truncated gradients": dp.Loop(1, 3, times=3, bptt=1, lora_rank=2),
}


@pytest.mark.parametrize("system", SYSTEMS)
def test_systems(system, stocks):
    model = alive(stocks["llama"], SYSTEMS[system])
    recorded, program = record(model, row()), model.depth_program
    for name in (None, *(o["name"] for o in program.taps)):
        assert recorded.depth(name) == depth(program, name).at(TOKENS)
    uneven = {0: 2, 1: 0, 2: 5, 3: 1}
    assert recorded.depth(weights=uneven) == depth(program, weight=uneven).at(TOKENS)


@pytest.mark.parametrize(("kv", "calls"), [("last", [3, 1, 1, 1]), ("mod:2", [1, 1, 1, 1]), ("last", [2, 2]), ("own", [2, 1, 1])])
def test_calls_add_depth_where_they_read_later_iterations(kv, calls, stocks):
    model = alive(stocks["llama"], dp.Loop(1, 3, times=4, kv=kv))
    recorded = record(model, row(sum(calls)), calls)
    program = model.depth_program
    if max(calls[1:]) == 1:
        assert recorded.depth() == depth(program, calls=True).at(len(calls))
    assert record(model, row(sum(calls))).depth() == depth(program).at(sum(calls))


def test_a_model_that_sweeps_is_recorded_token_by_token(stocks):
    spec = dp.TurboConn(bridges=[(3, 1)], group=1, rank=3)
    model = dp.transform(stocks["llama"], spec, schedule="fixed_point").eval()
    enliven(model.depth, seed=1, std=0.3, least=1)
    policy = model._depth.fixed_point
    assert record(model, row()).depth() == depth(model.depth_program).at(TOKENS)
    assert model._depth.fixed_point is policy is not None


def test_what_a_record_shows():
    """Token 3 of a bridge 2 -> 0 over two tokens: what each visit read, and nothing else."""
    model = alive(zoo.model("llama", 3, dtype=torch.float64), dp.TurboConn(bridges=[(2, 0)], group=2, rank=None))
    before = model._depth.lowering
    recorded, program = record(model, row(4)), model.depth_program
    first, delay, up, landed, second, third, norm = (o.name for o in program if o.name and o.kind != "embed")
    assert recorded.reads[delay, 3] == {(third, 1)} and recorded.reads[delay, 1] == set()
    assert recorded.reads[landed, 3] == {(first, 3), (up, 3)} and recorded.reads[landed, 1] == {(first, 1)}
    assert recorded.reads[second, 3] == {(landed, i) for i in range(4)}
    assert recorded.reads[">output", 3] == {(norm, 3)}
    assert model._depth.lowering == before and model.training is False
    with pytest.raises(dp.InputError, match="expected one of output, got 'midle'"):
        recorded.depth("midle")
    with pytest.raises(dp.InputError, match=r"that add up to 4 tokens, got \[3, 2\]"):
        record(model, row(4), [3, 2])
