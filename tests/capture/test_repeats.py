"""Blocks that are passed over have the graph that a full trace gives them; whatever tells blocks apart is traced."""

from contextlib import nullcontext

import pytest
import torch
import zoo

from depthpass.capture import capture
from depthpass.capture.repeats import Repeats

INPUTS = {"input_ids": torch.ones(2, 5, dtype=torch.long), "attention_mask": torch.ones(2, 5, dtype=torch.bool)}
KINDS = ("llama", "gpt2", "gpt_neox", "gemma2", "gpt_oss", "smollm3", "mixtral", "cohere2")


def blocks(model):
    """Everything that a capture says of each block."""
    captured = capture(model, INPUTS, {})
    order = captured.templates
    assert len({id(b) for b in captured.blocks}) == len(captured.blocks)  # bindings to parameters go by block
    return [
        (order.index(b.template), b.side_inputs, sorted(b.constants), b.template.graph.code, b.template.params, b.template.sites)
        for b in captured.blocks
    ]


@pytest.fixture
def traced(monkeypatch):
    """Which blocks were passed over, by the earlier block."""
    seen = []
    initialise = Repeats.__init__
    monkeypatch.setattr(Repeats, "__init__", lambda self, *args: (initialise(self, *args), seen.append(self))[0])
    return lambda: seen[-1].of


@pytest.mark.parametrize("name", KINDS)
def test_a_full_trace_gives_the_same_templates(name, traced, monkeypatch):
    model = zoo.model(name, layers=4)
    short = blocks(model)
    assert traced(), "every block was traced"
    monkeypatch.setattr(Repeats, "installed", lambda self: nullcontext())
    assert short == blocks(model)


def test_a_forward_that_reads_its_number_is_traced(traced, monkeypatch):
    model = zoo.model("gpt2", layers=4, scale_attn_by_inverse_layer_idx=True, attn_implementation="eager")
    scales = [b.template.sites[0].scale for b in capture(model, INPUTS, {}).blocks]
    monkeypatch.setattr(Repeats, "installed", lambda self: nullcontext())
    assert scales == [b.template.sites[0].scale for b in capture(model, INPUTS, {}).blocks]


def number(self, x, *args, **kwargs):
    return type(self).stock(self, x, *args, **kwargs) * (1 + self.self_attn.layer_idx)


def counts(self, x, *args, **kwargs):
    self.calls = getattr(self, "calls", 0) + 1
    return type(self).stock(self, x, *args, **kwargs)


@pytest.mark.parametrize("forward", [number, counts])
def test_forwards_of_ones_own(forward, traced):
    model = zoo.model("llama", layers=3)
    cls = type(model.model.layers[0])
    own = type("Block", (cls,), {"forward": forward, "stock": cls.forward})
    for layer in model.model.layers:
        layer.__class__ = own
    captured = capture(model, INPUTS, {})
    assert traced() == {} and len(captured.templates) == (3 if forward is number else 1)


@pytest.mark.parametrize(("change", "passed"), [
    (lambda layers: setattr(layers[1].self_attn, "scaling", 0.7), {2: 0}),
    (lambda layers: setattr(layers[1].input_layernorm, "variance_epsilon", 0.1), {2: 0}),
    (lambda layers: setattr(layers[1].mlp, "act_fn", torch.nn.Tanh()), {2: 0}),
    (lambda layers: setattr(layers[1].mlp.up_proj, "bias", torch.nn.Parameter(torch.ones(48))), {2: 0}),
    (lambda layers: setattr(layers[1].mlp, "forward", lambda x: x), {2: 0}),
    (lambda layers: setattr(layers[1], "forward", lambda x, **kwargs: 2 * x), {2: 0}),
    (lambda layers: setattr(layers[1].mlp.up_proj, "weight", layers[0].mlp.up_proj.weight), {}),
    (lambda layers: setattr(layers[1].mlp, "unused", 3), {2: 0}),
    (lambda layers: setattr(layers[1].self_attn, "unread", 3) or setattr(layers[0].self_attn, "unread", 4)
     or setattr(layers[2].self_attn, "unread", 5), {1: 0, 2: 0}),
])
def test_what_tells_blocks_apart(change, passed, traced, monkeypatch):
    model = zoo.model("llama", layers=3)
    change(model.model.layers)
    short = blocks(model)
    assert traced() == passed
    monkeypatch.setattr(Repeats, "installed", lambda self: nullcontext())
    assert short == blocks(model)
