"""Blocks that cannot be cut between keys and the rest. Every architecture's are cut in test_architectures.py."""

from types import SimpleNamespace

import pytest
from depthpass_lowering.visits.cut import block_facts, cut_for, uncut
from torch import fx

from depthpass.capture import Block, Template, calls
from depthpass.errors import LoweringError
from depthpass.ir import op, plain
from depthpass.lowered import lower, parse_lowered
from depthpass.schedule import schedule

OWN, MEMORY = op("block", "x", name="y", index=0, slot=0), op("block", "x", "m", name="y", index=0, slot=0, memory=True)
SHARED = op("block", "x", name="y", index=1, slot=0, keys=0)


def test_keys_behind_an_attention_call_of_their_own_block_stay_in_it():
    graph = fx.Graph()
    visit, hidden = graph.placeholder("visit"), graph.placeholder("hidden")
    first = graph.call_function(calls.attend, (visit, 0, hidden, hidden, hidden, None))
    graph.output(graph.call_function(calls.attend, (visit, 1, hidden, first, first, None)))
    gm = fx.GraphModule({}, graph)
    reason = uncut(gm)
    assert reason is not None and cut_for(OWN, gm).rest is cut_for(SHARED, gm).rest is gm
    with pytest.raises(LoweringError, match="block 0: its keys depend on an earlier attention call"):
        cut_for(MEMORY, gm)
    template = Template(gm, 0, (), ())
    host = SimpleNamespace(captured=SimpleNamespace(blocks=[Block(template, ())] * 2), side_inputs_of=lambda i: ())
    text = str(lower(schedule(plain("M", 2, 8)), facts=lambda i: block_facts(host, i)))
    assert f"%1 = block 0 (%0) slot 0  reads slot 0  writes slot 0  uncut {reason}" in text
    assert str(parse_lowered(text)) == text
