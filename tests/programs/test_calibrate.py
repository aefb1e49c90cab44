"""Thresholds from data: shares met on it, kept when decoding, found again by a count over sorted scores."""

import dataclasses

import pytest
import torch
import zoo
from turbos import enliven

import depthpass as dp


def batches(count=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    batches = [{"input_ids": torch.randint(3, zoo.VOCABULARY, (4, 12), generator=g)} for _ in range(count)]
    return [*batches, zoo.batch([12, 7, 9], seed=seed)]


def transformed(spec, layers=6):
    stock = enliven(zoo.model("llama", layers), std=0.2)
    model = dp.transform(stock, spec)
    enliven(model.depth, seed=1, std=0.4, least=1)
    return stock, model


def measured(model, passes, data):
    """Shares of all real tokens that the routes take, from what the model hands out."""
    taken, tokens = {}, 0
    with dp.using(model, passes), torch.no_grad():
        for batch in data:
            mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
            routing = dp.routing_of(model, model(**batch, use_cache=False), mask)
            for name, x in routing.taken.items():
                taken[name] = taken.get(name, 0) + int(x.sum())
            tokens += int(mask.sum())
    return [n / tokens for n in taken.values()]


SPECS = {
    "mor": dp.MixtureOfRecursions(recursions=2, capacity=(1.0, 0.4)),
    "mor all": dp.MixtureOfRecursions(recursions=2, sharing="cycle", capacity=(0.8, 0.3)),
    "mor sequence": dp.MixtureOfRecursions(recursions=2, sharing="sequence", capacity=(1.0, 0.5)),
    "mor shared": dp.MixtureOfRecursions(recursions=2, start=1, end=3, kv="shared", capacity=(1.0, 0.25)),
    "mod": dp.MixtureOfDepths(capacity=0.25),
}


@pytest.mark.parametrize("name", SPECS)
def test_routes_take_their_trained_share_and_decode(name):
    _, model = transformed(SPECS[name])
    data = batches()
    result = dp.calibrate(model, data)
    capacity = SPECS[name].capacity
    want = [capacity] * 3 if name == "mod" else [*capacity[name == "mor shared" :]] * (3 if name == "mor sequence" else 1)
    assert result.wanted == pytest.approx(want)
    # The first router of "mor all" reads embeddings, and equal tokens have equal scores.
    assert result.found == pytest.approx(want, abs=0.02 if name == "mor all" else 1 / result.tokens)
    assert result.before != pytest.approx(want, abs=0.02)
    tapped = [dataclasses.replace(result.spec[0], taps=True)]
    assert measured(model, tapped, data) == pytest.approx(result.found)
    # Other tokens of the same kind, and generation.
    assert measured(model, tapped, batches(seed=1)) == pytest.approx(want, abs=0.15)
    assert model.depth_spec == dp.dump_spec(list(result.spec))
    ids = zoo.batch([6, 4])
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(**ids, **options), model.generate(**ids, **options, use_cache=False))
    assert "thresholds from 220 tokens" in str(result)


def test_the_threshold_is_the_count_over_sorted_scores():
    _, model = transformed(dp.MixtureOfDepths(capacity=0.125, blocks=(1, 3)))
    data = batches()
    result = dp.calibrate(model, data, shares=[0.5, 0.1])
    seen = []
    with dp.using(model, dp.MixtureOfDepths(blocks=(1, 3), mode="threshold", threshold=(result.thresholds[0], 9.0), taps=True)), \
            torch.no_grad():
        for batch in data:
            mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
            seen += model(**batch, use_cache=False).taps["mod.v3"][..., 0][mask].tolist()
    reached = sum(s >= result.thresholds[1] for s in seen)
    assert reached == round(0.1 * len(seen)) and sorted(seen)[-reached] >= result.thresholds[1] > sorted(seen)[-reached - 1]
    again = dp.calibrate(model, data, shares={"mod": 0.2})
    assert again.found == pytest.approx([0.2, 0.2], abs=1 / again.tokens)
    nobody = dp.calibrate(model, data, shares=[0.0, 1.0])
    assert nobody.found == (0.0, 1.0)


def test_saved_thresholds_load_again(tmp_path):
    _, model = transformed(SPECS["mor"])
    dp.calibrate(model, batches())
    model.save_pretrained(tmp_path)
    loaded = dp.from_pretrained(tmp_path)
    ids = zoo.batch([6, 6])["input_ids"]
    assert loaded.depth_spec == model.depth_spec and torch.equal(loaded(ids).logits, model(ids).logits)


def test_bad_input():
    stock, model = transformed(SPECS["mod"])
    with pytest.raises(dp.InputError, match="at least one batch"):
        dp.calibrate(model, [])
    with pytest.raises(dp.InputError, match=r"batches\[0\]: expected input_ids"):
        dp.calibrate(model, [{"labels": torch.ones(1, 2)}])
    with pytest.raises(dp.InputError, match="expected 3 shares, one for each route"):
        dp.calibrate(model, batches(1), shares=[0.5])
    with pytest.raises(dp.InputError, match="no route has the label 'other'"):
        dp.calibrate(model, batches(1), shares={"other": 0.5})
    with pytest.raises(dp.InputError, match=r"shares in \[0, 1\]"):
        dp.calibrate(model, batches(1), shares=[0.5, 0.5, 1.5])
    with pytest.raises(dp.SpecError, match="expected a spec with one MixtureOfDepths"):
        dp.calibrate(dp.transform(stock, dp.Loop(times=2)), batches(1))
    with pytest.raises(dp.PassError, match="one for each of the 3 routes of this program, got 2"):
        dp.transform(stock, dp.MixtureOfDepths(mode="threshold", threshold=(0.1, 0.2)))
    with pytest.raises(dp.SpecError, match="mode='threshold' beside it"):
        dp.MixtureOfDepths(threshold=0.5)
    with pytest.raises(dp.SpecError, match="a number between 0 and 1"):
        dp.MixtureOfRecursions(mode="threshold", threshold=(0.5, 1.5))
