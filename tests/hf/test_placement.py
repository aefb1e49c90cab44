"""Models that accelerate spreads and offloads, and torch's wrappers for activation checkpoints."""

import json

import pytest
import torch
import zoo
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from turbos import enliven

import depthpass as dp

accelerate = pytest.importorskip("accelerate")

pytestmark = [
    pytest.mark.usefixtures("one_capture"),
    pytest.mark.filterwarnings("ignore::UserWarning:transformers.*"),
    pytest.mark.filterwarnings("ignore:hooks on or in block:UserWarning"),
]

BATCH = zoo.batch([5, 9], seed=5)
IDS = zoo.batch([9, 9], seed=5)["input_ids"]
SPECS = {
    "turboconn": dp.TurboConn(bridges=[(2, 0), (2, 1)], group=3, rank=6),
    "visits with parameters of their own": dp.Loop(1, 2, 3, lora_rank=2),
    "parallel loop with gates": dp.ParallelLoop(2),
}
MIXED = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "cpu",
         "model.norm": "disk", "model.rotary_emb": "cpu", "lm_head": "cpu", "depth": "disk"}


def stock(name="llama", **more):
    return enliven(zoo.model(name, 3, dtype=torch.float64, **more))


def transformed(kind, base=None):
    model = dp.transform(base or stock(), SPECS[kind])
    enliven(model.depth, seed=1, least=1)
    return model


def place(model, how, folder):
    if how == "cpu_offload":
        return accelerate.cpu_offload(model)
    if how == "disk_offload":
        return accelerate.disk_offload(model, folder)
    held = {k: v for k, v in MIXED.items() if k != "depth" or hasattr(model, "depth")}
    return accelerate.dispatch_model(model, held, offload_dir=folder)


@pytest.mark.parametrize(("kind", "how", "order"), [
    ("turboconn", "dispatch", "after"), ("turboconn", "cpu_offload", "before"), ("turboconn", "disk_offload", "warm"),
    ("visits with parameters of their own", "dispatch", "warm"), ("visits with parameters of their own", "cpu_offload", "after"),
    ("parallel loop with gates", "disk_offload", "after"), ("parallel loop with gates", "dispatch", "before"),
])
def test_offloaded_models_compute_generate_and_save_what_whole_ones_do(tmp_path, kind, how, order):
    whole = transformed(kind)
    if order == "before":
        model = dp.transform(place(stock(), how, tmp_path / "off"), SPECS[kind])
        model.depth.load_state_dict(whole.depth.state_dict())
    else:
        model = transformed(kind)
        if order == "warm":
            model(**BATCH)
        place(model, how, tmp_path / "off")
    away = {n for n, p in model.named_parameters() if p.is_meta}
    assert away
    with torch.no_grad():
        torch.testing.assert_close(model(**BATCH).logits, whole(**BATCH).logits, atol=1e-12, rtol=0)
        wanted = whole.model(**BATCH).last_hidden_state
        torch.testing.assert_close(model.model(**BATCH).last_hidden_state, wanted, atol=1e-12, rtol=0)
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(**BATCH, **options), whole.generate(**BATCH, **options))
    model.save_pretrained(tmp_path / "saved")
    torch.testing.assert_close(dp.from_pretrained(tmp_path / "saved")(**BATCH).logits, whole(**BATCH).logits, atol=1e-12, rtol=0)
    torch.testing.assert_close(dp.restore(model)(**BATCH).logits, dp.restore(whole)(**BATCH).logits, atol=1e-12, rtol=0)
    # What was loaded for a call is gone again.
    assert {n for n, p in model.named_parameters() if p.is_meta} == away


@pytest.mark.parametrize("name", ["gpt2", "cohere", "opt"])
def test_offloaded_position_tables_and_tied_heads(name):
    whole = transformed("turboconn", stock(name))
    model = accelerate.cpu_offload(transformed("turboconn", stock(name)))
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, whole(input_ids=IDS).logits, atol=1e-12, rtol=0)


def test_loading_with_a_device_map(tmp_path):
    whole = transformed("turboconn")
    whole.save_pretrained(tmp_path / "saved")
    model = dp.from_pretrained(tmp_path / "saved", device_map=MIXED, offload_folder=tmp_path / "off")
    assert any(p.is_meta for p in model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(model(**BATCH).logits, whole(**BATCH).logits, atol=1e-12, rtol=0)
    assert torch.equal(model.generate(**BATCH, max_new_tokens=3, do_sample=False),
                       whole.generate(**BATCH, max_new_tokens=3, do_sample=False))
    model.save_pretrained(tmp_path / "again", max_shard_size="9KB")
    assert len(set(json.loads((tmp_path / "again/model.safetensors.index.json").read_text())["weight_map"].values())) > 1
    torch.testing.assert_close(dp.from_pretrained(tmp_path / "again")(**BATCH).logits, whole(**BATCH).logits, atol=1e-12, rtol=0)


def layer(module):
    return type(module).__name__ == "LlamaDecoderLayer"


@pytest.mark.parametrize("order", ["before", "first", "later"])
@pytest.mark.parametrize("kind", ["turboconn", "visits with parameters of their own"])
def test_checkpoint_wrappers_around_blocks(kind, order):
    whole = transformed(kind).train()
    whole(input_ids=IDS, labels=IDS).loss.backward()
    base = stock()
    if order == "before":
        apply_activation_checkpointing(base, check_fn=layer)
    model = transformed(kind, base).train()
    if order == "later":
        model(input_ids=IDS, labels=IDS)
    if order != "before":
        apply_activation_checkpointing(model, check_fn=layer)
    calls = []
    model.model.layers[1].self_attn.o_proj.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    model(input_ids=IDS, labels=IDS).loss.backward()
    for (name, p), q in zip(model.named_parameters(), whole.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, msg=lambda text, name=name: f"{name}: {text}")
    # Each visit and chunk ran twice: once forward, once in the backward pass.
    assert len(calls) % 2 == 0 and len(calls) >= 6
    assert list(model.state_dict()) == list(whole.state_dict())


def test_checkpoint_wrappers_inside_blocks_are_honoured_and_reentrant_ones_refused():
    whole, model = transformed("turboconn").train(), transformed("turboconn").train()
    apply_activation_checkpointing(model, check_fn=lambda m: type(m).__name__ == "LlamaMLP")
    runs = []
    model.model.layers[1].mlp.gate_proj.register_forward_hook(lambda *_: runs.append(1))
    for one in (whole, model):
        one(input_ids=IDS, labels=IDS).loss.backward()
    for p, q in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    assert len(runs) == 6  # three chunks, twice
    other = transformed("turboconn")
    apply_activation_checkpointing(
        other, lambda m: checkpoint_wrapper(m, checkpoint_impl=CheckpointImpl.REENTRANT), check_fn=layer,
    )
    with pytest.raises(dp.UnsupportedModelError, match=r"model\.layers\.0: .*REENTRANT would lose the gradient"):
        other(input_ids=IDS)
