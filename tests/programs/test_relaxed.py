"""Relaxed recursion: tied blocks with low-rank updates from a truncated SVD, against stock models with the weights written in."""

import copy

import pytest
import torch
import zoo
from torch import nn
from turbos import enliven

import depthpass as dp
from depthpass.hf.modules.parameters import linear_maps

LENGTHS = [7, 5]


def untied(name="llama", layers=6, alike=False):
    stock = enliven(zoo.model(name, layers, dtype=torch.float64), std=0.2)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for p in stock.parameters():
            if p.dim() == 1 and not alike:
                p.copy_(1 + 0.1 * torch.randn(p.shape, generator=generator))
    return stock


def layers_of(model):
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def written(stock, order, shared, rank):
    """A stock model whose block at place p is the shared one, its matrices moved towards block order[p] by a rank-r SVD."""
    copied = copy.deepcopy(stock)
    blocks = layers_of(copied)
    with torch.no_grad():
        for place, (kept, own) in enumerate(zip(shared, order, strict=True)):
            if kept is None:
                continue
            block = blocks[place]
            block.load_state_dict(kept)
            for path, m in linear_maps(block):
                theirs = dict(linear_maps(layers_of(stock)[own]))[path].weight
                u, s, v = torch.linalg.svd(theirs - m.weight)
                n = min(rank, len(s))
                m.weight += (u[:, :n] * s[:n]) @ v[:n]
    return copied


@pytest.mark.parametrize(("name", "init", "rank"), [("llama", "average", 3), ("gpt2", "first", 4), ("qwen2", "stepwise", 2)])
def test_the_start_is_the_best_approximation(name, init, rank):
    stock = untied(name)
    model = dp.transform(stock, dp.RelaxedRecursion(times=2, start=1, end=5, rank=rank, init=init))
    states = [b.state_dict() for b in layers_of(stock)]
    mean = [{k: (states[i][k] + states[i + 2][k]) / 2 for k in states[i]} for i in (1, 2)]
    kept = {"average": mean, "first": [states[1], states[2]], "stepwise": [states[1], states[4]]}[init]
    by_hand = written(stock, range(6), [None, *kept, *kept, None], rank)
    batch = zoo.batch(LENGTHS)
    got, want = model(**batch).logits, by_hand(**batch).logits
    mask = batch["attention_mask"].bool()
    torch.testing.assert_close(got[mask], want[mask], rtol=1e-8, atol=1e-8)
    # A shared block's gradient is the sum over its visits, each taken at that visit's own weights.
    weight = torch.randn(got.shape, generator=torch.Generator().manual_seed(5), dtype=got.dtype)
    (got * weight)[mask].sum().backward()
    (want * weight)[mask].sum().backward()
    places = {"average": (1, 2), "first": (1, 2), "stepwise": (1, 4)}[init]
    for j, index in enumerate(places):
        mine = dict(layers_of(model)[index].named_parameters())
        theirs = [dict(layers_of(by_hand)[p].named_parameters()) for p in (1 + j, 3 + j)]
        for n, p in mine.items():
            total = theirs[0][n].grad + theirs[1][n].grad
            assert (p.grad - total).abs().max() <= 1e-6 * total.abs().max(), n
    # ... and a LoRA's is that of its visit, seen through its own two factors.
    update = model.depth.relaxed.t1.b0.lora.get_submodule(linear_maps(layers_of(model)[1])[0][0])
    whole = linear_maps(layers_of(by_hand)[3])[0][1].weight.grad
    torch.testing.assert_close(update.b.grad, whole @ update.a.T, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(update.a.grad, update.b.T @ whole, rtol=1e-6, atol=1e-8)


def test_a_full_rank_gives_the_stack_back_and_the_given_model_stays(tmp_path):
    stock = untied(alike=True)
    before = copy.deepcopy(stock.state_dict())
    ids = zoo.batch([6, 6])["input_ids"]
    model = dp.transform(stock, dp.RelaxedRecursion(times=3, rank=32))
    torch.testing.assert_close(model(ids).logits, stock(ids).logits, rtol=1e-8, atol=1e-8)
    assert all(torch.equal(v, before[k]) for k, v in stock.state_dict().items())
    tied = dp.transform(stock, dp.RelaxedRecursion(times=3, rank=0))
    assert not list(tied.depth.parameters()) and not torch.allclose(tied(ids).logits, stock(ids).logits)
    with torch.no_grad():
        errors = [float((dp.transform(stock, dp.RelaxedRecursion(times=3, rank=r))(ids).logits - stock(ids).logits).norm())
                  for r in (4, 30)]
    assert errors == sorted(errors, reverse=True)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    cached = model.generate(ids, **options)
    assert torch.equal(cached, model.generate(ids, **options, use_cache=False))
    model.save_pretrained(tmp_path)
    loaded = dp.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    report = dp.report(model, seq_len=6)
    assert report.depth_at(6) == 6 and report.new_parameters == sum(p.numel() for p in model.depth.parameters())
    assert isinstance(model.depth.relaxed, nn.Module)


def test_bad_input():
    stock = zoo.model("llama", 6)
    with pytest.raises(dp.PassError, match="a number that divides the 6 visits from 0 to 6, got 4"):
        dp.transform(stock, dp.RelaxedRecursion(times=4))
    with pytest.raises(dp.PassError, match="visits every block once"):
        dp.transform(stock, [dp.LayerProgram([0, 1, 1, 2]), dp.RelaxedRecursion(times=2)])
    with pytest.raises(dp.SpecError, match=r"relaxed_recursion\.rank: expected at least 0"):
        dp.RelaxedRecursion(rank=-1)
    llama4 = zoo.model("llama4_text", 4, interleave_moe_layer_step=2)
    with pytest.raises(dp.UnsupportedModelError, match=r"cannot be (tied|averaged)"):
        dp.transform(llama4, dp.RelaxedRecursion(times=4, rank=2))
    with torch.no_grad():
        assert torch.equal(dp.transform(stock, dp.RelaxedRecursion(times=1))(**zoo.batch([4, 4])).logits,
                           stock(**zoo.batch([4, 4])).logits)
