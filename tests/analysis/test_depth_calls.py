"""Depth of programs whose function depends on the split into calls: formulas of KV policies, by brute force."""

import pytest

from depthpass.analysis.depth import depth
from depthpass.ir import plain
from depthpass.ir.interpret import Interpretation
from depthpass.passes.base import Context
from depthpass.passes.loop import Loop
from depthpass.passes.pipeline import apply_spec
from tests.analysis.recorded import brute_depth
from tests.passes.toy import WIDTH, Toy


def looped(p, c, coda, times, kv, width=8):
    program = plain("M", p + c + coda, width)
    return apply_spec(program, Loop(p, p + c, times=times, kv=kv), Context.of(program))


@pytest.mark.parametrize("kv", ["own", "first", "last", "mod:1", "mod:2", "mod:3"])
@pytest.mark.parametrize(("p", "c", "coda", "times"), [(0, 1, 0, 2), (1, 2, 1, 3), (2, 1, 0, 4), (0, 3, 2, 5)])
def test_formulas(kv, p, c, coda, times):
    program = looped(p, c, coda, times, kv)
    k = {"own": None, "first": None, "last": 1}.get(kv, int(kv[4:]) if kv.startswith("mod") else 0)
    step = 0 if k is None else k * ((times - 1) // k) * c
    calls = depth(program, calls=True)
    assert depth(program).at(9) == p + times * c + coda
    for m in range(4):
        assert calls.at(m + 1) == p + times * c + coda + m * step
        assert brute_depth(program, 3 + m, calls=[3] + [1] * m) == calls.at(m + 1)
        assert brute_depth(program, m + 1, calls=[1] * (m + 1)) == calls.at(m + 1)


def test_interpreter_reads_another_iterations_keys_of_earlier_calls():
    program = looped(1, 1, 1, 3, "last", WIDTH)
    own = looped(1, 1, 1, 3, "own", WIDTH)
    toy = Toy(3, 5)

    def run(prog, calls=None):
        return Interpretation(prog, toy.embed, toy.stack, lambda x: x, calls=calls).output()

    assert run(program).equal(run(own))
    split = run(program, [3, 2])
    assert split[:3].equal(run(own)[:3]) and not split[3:].equal(run(own)[3:])
    assert not split[4].equal(run(program, [3, 1, 1])[4])
