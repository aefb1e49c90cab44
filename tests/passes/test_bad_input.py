"""What loops, taps and bridges refuse, with advice: positions that hold routed tokens, names taken, pads twice."""

import pytest

from depthpass.errors import PassError, SpecError
from depthpass.ir import plain
from depthpass.passes.base import Context, Pass
from depthpass.passes.loop import Loop
from depthpass.passes.mixture_of_recursions import MixtureOfRecursions
from depthpass.passes.pad import Pad
from depthpass.passes.pipeline import apply_spec
from depthpass.passes.relaxed_recursion import RelaxedRecursion
from depthpass.passes.taps import Taps
from depthpass.passes.turboconn import TurboConn


@pytest.mark.parametrize(("spec", "message"), [
    ([MixtureOfRecursions(start=1, end=3, mode="threshold"), TurboConn(bridges=[(2, 0)])],
     r"turboconn: expected visits that every token takes, got position 2 .* runs routed tokens only\. "
     r"Use positions among \[0, 7\], or put turboconn before"),
    ([Loop(1, 2, times=3, exit=0.5), TurboConn(bridges=[(3, 1)])],
     r"turboconn: .* got position 3 .* \(loop\(start=1, end=2, times=3, exit=0\.5\)\)"),
    ([Loop(1, 2, times=3, exit=0.5), Taps([2])], r"taps: .* got position 2"),
    ([Taps([1]), Taps([1])], r"taps\.at: the program already has a tap taps\.v1\. Set scope='another_name'"),
    ([Loop(0, 1, times=2, taps=True), Loop(1, 2, times=2)], r"loop: expected a straight|loop\.scope"),
    ([Loop(4, times=2)], r"loop\.start: expected a position below 4, got 4: the program has 4 visits"),
    ([RelaxedRecursion(times=2, start=9)], r"relaxed_recursion\.start: expected a position below 4, got 9"),
    ([Pad(2), Loop(1, 2, times=3), Pad(1)], r"pad: expected a program without pads, got %1 = pad of pad\(tokens=2\)"),
], ids=["bridge", "bridge of an exit", "tap", "taps twice", "loops", "start", "tied start", "pads"])
def test_refused_with_advice(spec: list[Pass], message: str) -> None:
    program = plain("M", 4, 8)
    with pytest.raises(PassError, match=message):
        apply_spec(program, spec, Context.of(program))


def test_positions_that_every_token_takes_may_be_bridged() -> None:
    program = plain("M", 4, 8)
    spec = [MixtureOfRecursions(start=1, end=3, mode="threshold"), TurboConn(bridges=[(7, 0)])]
    rewritten = apply_spec(program, spec, Context.of(program))
    assert any(o.kind == "delay" for o in rewritten)


def test_huginns_names_of_key_policies_are_known() -> None:
    for name, said in (("latest-m4", "kv='latest' here"), ("always-last-m4", "depends on the exits of all others")):
        with pytest.raises(SpecError, match=said):
            Loop(1, 2, times=3, exit=0.5, kv=name)
