"""A block's graph cut in two: keys of one stream, attention and the rest of another, on every architecture."""

from types import SimpleNamespace

import capture.dense_run as dense
import pytest
import torch
import zoo
from capture.dense_run import captured, inputs, model
from depthpass_lowering.visits.cut import block_facts, cut_for, uncut
from torch import fx

from depthpass.capture import Block, Template, calls
from depthpass.errors import LoweringError
from depthpass.ir import op, plain
from depthpass.lowered import lower, parse_lowered
from depthpass.schedule import schedule

OWN, MEMORY = op("block", "x", name="y", index=0, slot=0), op("block", "x", "m", name="y", index=0, slot=0, memory=True)
SHARED = op("block", "x", name="y", index=1, slot=0, keys=0)


class Given(dense.DenseVisit):
    """Attention to keys and values from elsewhere."""

    keys = ()

    def attend(self, number, q, k, v, sinks):
        assert k is None and v is None
        return super().attend(number, q, *self.keys[2 * number : 2 * number + 2], sinks)


@pytest.mark.parametrize("name", zoo.SUPPORTED)
def test_keys_and_the_rest_are_the_block(name):
    """Of one stream to the bit; keys of another stream change the result through attention alone."""
    built, parts, batch = model(name), captured(name), inputs(name, [7, 4])
    block, layer = parts.blocks[0], built.get_submodule(parts.layers)[0]
    template = block.template
    cut = cut_for(MEMORY, template.graph)
    assert cut_for(OWN, template.graph).rest is template.graph and cut_for(SHARED, template.graph).rest is cut.rest
    assert cut_for(OWN, template.graph).keys is cut_for(SHARED, template.graph).keys is None and not cut.axes
    valid = batch["attention_mask"]
    x, *side_inputs = dense.run_part(built, parts.prologue, batch, (), dense.DenseVisit(None, (), valid))
    visit = Given(layer, template.sites, valid)
    with torch.no_grad():
        whole = dense.run_block(built, layer, block, x, side_inputs, valid)
        given = [side_inputs[s] for s in block.side_inputs], dense.params_of(built, layer, block)
        for source in (x, x.flip(1)):
            visit.keys = cut.keys(visit, source, *given[0], *given[1])
            got = cut.rest(visit, x, *given[0], *given[1])
            assert torch.equal(got, whole) == (source is x)
    facts = block_facts(SimpleNamespace(captured=parts, side_inputs_of=lambda i: parts.blocks[i].side_inputs), 0)
    assert facts.uncut is None and facts.all_side_inputs == tuple(sorted(block.side_inputs)) and not facts.side_inputs["finish"]


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
