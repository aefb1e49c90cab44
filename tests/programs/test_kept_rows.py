"""A cache of routed visits after its rows were dropped, repeated or reordered: beams, batch selection."""

import pytest
import torch
import zoo
from turbos import enliven

import depthpass as dp

ROUTED = {
    "token": dp.MixtureOfRecursions(recursions=2, start=1, router="token"),
    "threshold": dp.MixtureOfRecursions(recursions=2, start=1, mode="threshold"),
    "threshold, shared keys": dp.MixtureOfRecursions(recursions=3, start=1, mode="threshold", kv="shared"),
    "mod": dp.MixtureOfDepths(mode="threshold"),
    "itt, routed keys": dp.InnerThinking(steps=3, mode="threshold", keys="routed"),
    "exits": dp.Loop(1, 2, times=3, exit=0.7),
}


@pytest.fixture(scope="module")
def stock():
    return enliven(zoo.model("llama", 3, dtype=torch.float64), std=0.2)


@pytest.mark.parametrize("system", ROUTED)
@pytest.mark.parametrize("left", [False, True], ids=["full", "left-padded"])
def test_rows_that_are_kept_go_on_as_they_were(stock, system, left):
    model = dp.transform(stock, ROUTED[system]).eval()
    batch = zoo.batch([12, 7, 10] if left else [12] * 3)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    narrowed = 0
    for seed in range(6):
        enliven(model.depth, seed=seed, std=2.0, least=1)
        with torch.no_grad():
            want = model(**batch, use_cache=False).logits
            for rows in ([0], [2], [2, 1], [1, 1, 0], [2, 0, 1]):
                cache, kept = dp.DepthCache(model), torch.tensor(rows)
                model(input_ids=ids[:, :9], attention_mask=mask[:, :9], past_key_values=cache)
                cache.batch_select_indices(kept)
                narrowed += any(
                    s.columns is not None and s.valid is not None and int(s.valid.sum(-1).max()) < s.columns.shape[1]
                    for s in cache.state.slots.values()
                )
                for i in range(9, 12):
                    got = model(input_ids=ids[kept, i : i + 1], attention_mask=mask[kept, : i + 1], past_key_values=cache)
                    torch.testing.assert_close(got.logits[:, 0], want[kept, i], rtol=1e-9, atol=1e-9)
                    kept_again = torch.arange(len(rows)).flip(0)
                    cache.reorder_cache(kept_again)
                    kept = kept[kept_again]
    assert narrowed or "shared" in system  # the longest row of some slot was dropped


@pytest.mark.parametrize("system", ["token", "mod", "exits"])
def test_beams(stock, system):
    model = dp.transform(stock, ROUTED[system]).eval()
    enliven(model.depth, seed=3, std=2.0, least=1)
    batch = zoo.batch([6, 9])
    options = {"max_new_tokens": 6, "num_beams": 4, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(**batch, **options), model.generate(**batch, **options, use_cache=False))


@pytest.mark.parametrize("system", ["threshold", "threshold, shared keys", "itt, routed keys", "exits", "windows"])
def test_rows_that_stand_anywhere_read_their_own_keys(stock, system, monkeypatch):
    """Keys of rows at uneven distances are picked a few rows at a time: one and three here."""
    from depthpass_lowering.visits import routed

    if system == "windows":  # shorter than the row
        stock, system = enliven(zoo.model("mistral", 3, dtype=torch.float64), std=0.2), "threshold"
    model = dp.transform(stock, ROUTED[system]).eval()
    batch, uneven, pieces = zoo.batch([12, 7, 10, 12, 9, 11, 8]), 0, set()
    evenly, attention = routed._evenly, routed.RunningVisit.attention

    def seen(rows):
        nonlocal uneven
        actual = evenly(rows)
        uneven += rows is not None and actual is None
        return actual

    def counted(visit, number, q, *rest):
        pieces.add(len(q))
        return attention(visit, number, q, *rest)

    monkeypatch.setattr(routed, "_evenly", seen)
    monkeypatch.setattr(routed.RunningVisit, "attention", counted)
    for seed, picked in ((1, 1), (2, 3 * 2 * 2 * 8 * 11), (4, 1 << 20)):
        monkeypatch.setattr(routed, "PICKED", picked)
        enliven(model.depth, seed=seed, std=2.0, least=1)
        with torch.no_grad():
            want, cache = model(**batch, use_cache=False).logits, dp.DepthCache(model)
            for start, end in ((0, 8), (8, 9), (9, 10), (10, 12)):
                ids, mask = batch["input_ids"][:, start:end], batch["attention_mask"][:, :end]
                got = model(input_ids=ids, attention_mask=mask, past_key_values=cache).logits
                real = mask[:, start:].bool()
                torch.testing.assert_close(got[real], want[:, start:end][real], rtol=1e-9, atol=1e-9)
    assert uneven and 1 in pieces
