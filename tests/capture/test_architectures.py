"""All supported architectures: the captured pieces, run by hand, are the stock model; so are the halves of a block."""

from __future__ import annotations

from types import SimpleNamespace

import capture.dense_run as dense
import pytest
import torch
import zoo
from capture.dense_run import captured, inputs, model, run
from capture.support_table import PAGE, page, results
from depthpass_lowering.visits.cut import block_facts, cut_for

from depthpass.capture import capture
from depthpass.ir import op

W, C = zoo.WINDOW, zoo.WINDOW
FULL = (None, None)
# Per architecture: templates, and (window, chunk) of each block. Two blocks, full attention, one template unless listed.
KINDS = {
    "mistral": (1, [(W, None)] * 2),
    "mixtral": (1, [(W, None)] * 2),
    "starcoder2": (1, [(W, None)] * 2),
    "gemma2": (2, [(W, None), FULL]),
    "gemma3_text": (2, [(W, None), FULL]),
    "gpt_oss": (2, [(W, None), FULL]),
    "cohere2": (2, [(W, None)] * 3 + [FULL]),
    "olmo3": (2, [(W, None)] * 3 + [FULL]),
    "exaone4": (2, [(W, None)] * 3 + [FULL]),
    "smollm3": (2, [FULL] * 4),
    "llama4_text": (None, [(None, C)] * 3 + [FULL]),
}


OWN, MEMORY = op("block", "x", name="y", index=0, slot=0), op("block", "x", "m", name="y", index=0, slot=0, memory=True)
SHARED = op("block", "x", name="y", index=1, slot=0, keys=0)


@pytest.mark.parametrize("name", zoo.SUPPORTED)
def test_blocks_and_masks(name):
    parts = captured(name)
    templates, kinds = KINDS.get(name, (1, [FULL] * 2))
    assert [[(s.window, s.chunk) for s in b.template.sites] for b in parts.blocks] == [[k] for k in kinds]
    if templates is not None:
        assert len(parts.templates) == templates
    assert parts.width == 32
    for template in parts.templates:
        (site,) = template.sites
        attention = model(name).get_submodule(f"{parts.layers}.0.{site.path}")
        assert "Attention" in type(attention).__name__
        assert (site.heads, site.key_dim, site.value_dim) == (4, 8, 8)


@pytest.mark.parametrize("name", zoo.SUPPORTED)
@pytest.mark.parametrize(("lengths", "side"), [([1], "left"), ([9, 3], "left"), ([2, 3, 3, 3, 1], "right")])
def test_pieces_are_the_stock_model(name, lengths, side):
    """One capture, made from 2 rows of 7 tokens, for every size and padding; logits of real tokens and the loss."""
    built, parts, batch = model(name), captured(name), inputs(name, lengths, side, seed=len(lengths))
    with torch.no_grad():
        want = built(**batch, use_cache=False)
        got = run(built, parts, batch)
    assert type(got) is type(want)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(got.logits[real], want.logits[real], rtol=1e-5, atol=1e-5)
    if max(lengths) > 1:
        torch.testing.assert_close(got.loss, want.loss, rtol=1e-5, atol=1e-5)


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


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gemma3_text"])
def test_gradients_reach_the_models_own_parameters(name):
    built, parts, batch = model(name), captured(name), inputs(name, [9, 3])
    parameters = dict(built.named_parameters())
    want = torch.autograd.grad(built(**batch).loss, parameters.values(), allow_unused=True)
    got = torch.autograd.grad(run(built, parts, batch).loss, parameters.values(), allow_unused=True)
    for n, a, b in zip(parameters, got, want):
        assert (a is None) == (b is None), n
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=n)


def test_a_capture_of_one_row_serves_many():
    """The batch is symbolic even when the example has a single row and a single token."""
    built = model("llama")
    parts = capture(built, inputs("llama", [1]), {})
    batch = inputs("llama", [4, 9, 2])
    with torch.no_grad():
        torch.testing.assert_close(run(built, parts, batch).loss, built(**batch).loss)


def test_arguments_of_the_loss_are_inputs_of_the_head():
    built, batch = model("llama"), inputs("llama", [4, 9])
    batch["num_items_in_batch"] = torch.tensor(5)
    parts = capture(built, batch, {})
    assert set(parts.head.inputs) == {"labels", "num_items_in_batch"}
    batch["num_items_in_batch"] = torch.tensor(7)
    with torch.no_grad():
        torch.testing.assert_close(run(built, parts, batch).loss, built(**batch).loss)


def test_embeddings_instead_of_ids():
    built, batch = model("qwen3"), inputs("qwen3", [4, 9])
    batch["inputs_embeds"] = torch.randn(2, 9, 32)
    del batch["input_ids"]
    parts = capture(built, batch, {})
    assert "inputs_embeds" in parts.prologue.inputs
    with torch.no_grad():
        torch.testing.assert_close(run(built, parts, batch).loss, built(**batch).loss)


def test_a_shared_table_of_positions_is_taken_for_all_rows():
    built, batch = model("llama"), inputs("llama", [9, 9])
    batch["position_ids"] = torch.arange(3, 12)[None]
    parts = capture(built, batch, {})
    with torch.no_grad():
        torch.testing.assert_close(run(built, parts, batch).loss, built(**batch).loss)


def test_sequence_classification_head():
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    built = AutoModelForSequenceClassification.from_config(zoo.config("llama", 2, num_labels=3)).eval()
    batch = zoo.batch([4, 9], "right")
    parts = capture(built, batch, {})
    with torch.no_grad():
        torch.testing.assert_close(run(built, parts, batch).logits, built(**batch).logits)


def test_the_model_is_left_as_it_was():
    built = model("llama")
    before = {k: v.clone() for k, v in built.state_dict().items()}
    config, hooks = built.config.to_dict(), [len(m._forward_hooks) for m in built.modules()]
    capture(built, zoo.batch([3]), {})
    assert built.config.to_dict() == config
    assert built.config._attn_implementation == "sdpa"
    assert [len(m._forward_hooks) for m in built.modules()] == hooks
    assert "forward" not in vars(built)
    assert all(torch.equal(before[k], v) for k, v in built.state_dict().items())


def test_training_mode_keeps_dropout():
    built = zoo.model("gpt2", 2, attn_pdrop=0.25, resid_pdrop=0.5).train()
    parts = capture(built, inputs("gpt2", [7, 4]), {})
    assert [s.dropout for s in parts.templates[0].sites] == [0.25]
    drops = [n for n in parts.templates[0].graph.graph.nodes if "dropout" in str(n.target)]
    assert [n.args[1:] for n in drops] == [(0.5, True)] * 2
    built.eval()
    assert [s.dropout for s in capture(built, inputs("gpt2", [7, 4]), {}).templates[0].sites] == [0.0]


def test_support_page_is_current(request):
    result = results()
    assert list(result) == zoo.SUPPORTED and len(result) == 33
    text = page(result)
    if request.config.getoption("--update-golden"):
        PAGE.write_text(text, encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == text, "run this test with --update-golden if the change is meant"
