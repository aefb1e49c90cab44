"""Every supported architecture: equal to the stock model at the start, equal to itself however it is run."""

import pytest
import torch
import zoo
from turbos import GROUP, enliven, spec, stock_of, turbo_of

import depthpass as dp

LENGTHS = [8, 5, 7]
pytestmark = pytest.mark.usefixtures("one_capture")


@pytest.fixture(scope="module", params=zoo.SUPPORTED)
def models(request):
    stock = stock_of(request.param)
    return stock, turbo_of(stock)


def logits(model, batch, **more):
    with torch.no_grad():
        return model(**batch, **more).logits


def close(got, want, real=slice(None)):
    torch.testing.assert_close(got[real], want[real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("style", ["sdpa", "eager"])
def test_identity_is_bitwise_stock(models, style):
    stock, _ = models
    actual = stock.config._attn_implementation
    if style == "sdpa" and actual != "sdpa":
        pytest.skip("the stock model has no sdpa attention")
    stock.set_attn_implementation(style)
    try:
        same = dp.transform(stock, dp.Identity())
        full, padded = zoo.batch([9, 9]), zoo.batch(LENGTHS)
        real = padded["attention_mask"].bool()
        for cache in (True, False):
            assert torch.equal(logits(same, full, use_cache=cache), logits(stock, full, use_cache=cache))
            got, want = (logits(m, padded, use_cache=cache) for m in (same, stock))
            assert torch.equal(got[real], want[real])
    finally:
        stock.set_attn_implementation(actual)


def test_zero_init_equals_stock(models):
    stock, _ = models
    zero = dp.transform(stock, spec())
    assert type(zero).__name__ == type(stock).__name__ and isinstance(zero, type(stock))
    # One chunk holds the whole row: the same ops in the same order.
    short, padded = zoo.batch([GROUP, GROUP]), zoo.batch([GROUP, 2])
    assert torch.equal(logits(zero, short), logits(stock, short))
    real = padded["attention_mask"].bool()
    assert torch.equal(logits(zero, padded)[real], logits(stock, padded)[real])
    for side in ("left", "right"):
        batch = zoo.batch(LENGTHS, side)
        close(logits(zero, batch), logits(stock, batch), batch["attention_mask"].bool())
    # A new model is the stock model only until it is trained.
    enliven(zero.depth, least=1)
    assert (logits(zero, short) - logits(stock, short)).abs().max() == 0
    long = zoo.batch([GROUP + 1] * 2)
    moved = (logits(zero, long) - logits(stock, long)).abs().amax((0, 2))
    assert moved[GROUP] > 1e-2 and moved[:GROUP].max() < 1e-4


def test_every_chunk_and_every_split_is_token_by_token(models):
    stock, turbo = models
    batch = zoo.batch(LENGTHS)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    want, real = logits(turbo, batch), mask.bool()
    assert (want - logits(stock, batch))[real].abs().max() > 1e-2
    for chunk in range(1, GROUP + 1):
        small = dp.transform(stock, spec(), chunk=chunk)
        small.depth.load_state_dict(turbo.depth.state_dict())
        close(logits(small, batch), want, real)
    for split in ([1] * 8, [5, 1, 2], [2, 6]):
        cache, pieces, end = dp.DepthCache(turbo), [], 0
        for count in split:
            start, end = end, end + count
            pieces.append(logits(
                turbo, {"input_ids": ids[:, start:end], "attention_mask": mask[:, :end]}, past_key_values=cache
            ))
        assert cache.get_seq_length() == 8
        close(torch.cat(pieces, 1), want, real)


def test_greedy_generation_needs_no_cache(models):
    turbo = models[1]
    batch = zoo.batch(LENGTHS)
    options = {
        "max_new_tokens": 2 * GROUP + 1, "do_sample": False, "eos_token_id": None, "output_logits": True,
        "return_dict_in_generate": True,
    }
    with_cache, without = (turbo.generate(**batch, **options, use_cache=u) for u in (True, False))
    assert torch.equal(with_cache.sequences, without.sequences)
    close(torch.stack(with_cache.logits), torch.stack(without.logits))
    # Teacher forcing on what was generated gives the same logits again.
    length = batch["input_ids"].shape[1]
    mask = torch.cat((batch["attention_mask"], torch.ones(3, 2 * GROUP + 1, dtype=torch.long)), 1)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    taught = logits(turbo, {"input_ids": with_cache.sequences, "attention_mask": mask}, position_ids=positions)
    close(torch.stack(with_cache.logits, 1), taught[:, length - 1 : -1])


def test_save_and_load(models, tmp_path):
    stock, turbo = models
    batch = zoo.batch(LENGTHS)
    turbo.save_pretrained(tmp_path)
    style = turbo.config._attn_implementation  # not part of a checkpoint
    loaded = dp.from_pretrained(tmp_path, attn_implementation=style)
    assert {n: t.shape for n, t in loaded.state_dict().items()} == {n: t.shape for n, t in turbo.state_dict().items()}
    assert torch.equal(logits(loaded, batch), logits(turbo, batch))
    turbo.save_pretrained(tmp_path, stock=True)
    assert torch.equal(logits(dp.from_pretrained(tmp_path, attn_implementation=style), batch), logits(turbo, batch))
    plain = type(stock).from_pretrained(tmp_path, attn_implementation=style)
    assert type(plain) is type(stock) and torch.equal(logits(plain, batch), logits(stock, batch))
