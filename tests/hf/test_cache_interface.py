"""A DepthCache read as tools of transformers read caches, and the generation modes that need another one."""

import copy
import io

import pytest
import torch
import zoo
from transformers import GenerationConfig
from turbos import pair, spec, stock_of, turbo_of

import depthpass as dp

BATCH = zoo.batch([6, 4])
pytestmark = pytest.mark.usefixtures("one_capture")


@pytest.fixture
def filled():
    turbo = pair("llama")[1]
    cache = dp.DepthCache(turbo.model)  # a decoder's cache is its model's
    with torch.no_grad():
        turbo(**BATCH, past_key_values=cache)
    return turbo, cache


def following(turbo, cache):
    mask = torch.cat((BATCH["attention_mask"], torch.ones(2, 1, dtype=torch.long)), 1)
    with torch.no_grad():
        return turbo(input_ids=BATCH["input_ids"][:, -1:], attention_mask=mask, past_key_values=cache).logits


def test_layers_are_the_keys_of_the_stock_cache(filled):
    stock, ids = pair("llama")[0], zoo.batch([5, 5])["input_ids"]
    same = dp.transform(stock, dp.Identity())
    with torch.no_grad():
        mine, theirs = same(input_ids=ids)[zoo.CACHE], stock(input_ids=ids)[zoo.CACHE]
    assert len(mine) == len(mine.layers) == len(theirs.layers) == len(list(mine)) == 3
    for layer, pair_, other in zip(mine.layers, mine, theirs.layers):
        assert torch.equal(layer.keys, other.keys) and torch.equal(layer.values, other.values)
        assert pair_[0] is layer.keys and torch.equal(pair_[1], other.values)
        assert layer.get_seq_length() == other.get_seq_length() == 5 and layer.is_initialized
        assert layer.dtype == other.keys.dtype and layer.device == other.keys.device
        assert layer.get_mask_sizes(2) == other.get_mask_sizes(2)
    assert mine[1][0] is mine.layers[1].keys and mine.get_max_cache_shape() == -1 and "slot=1" in repr(mine.layers)
    assert not dp.DepthCache(same).layers


def test_what_is_assigned_to_a_layer_stands_in_the_cache(filled):
    turbo, cache = filled
    want, changed = following(turbo, copy.deepcopy(cache)), copy.deepcopy(cache)
    for layer in changed.layers:
        layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
    assert torch.equal(following(turbo, copy.deepcopy(changed)), want)
    changed.layers[0].values = changed.layers[0].values * 2
    assert (following(turbo, changed) - want).abs().max() > 1e-3
    assert torch.equal(following(turbo, copy.deepcopy(cache)), want)
    with pytest.raises(dp.CacheError, match=r"layers\[0\].keys: expected a tensor of shape \(2, 2, 6, 8\), got \(1,\)"):
        cache.layers[0].keys = torch.zeros(1)
    with pytest.raises(dp.CacheError, match="use the method of that name of the cache"):
        cache.layers[0].crop(-1)
    with pytest.raises(dp.CacheError, match="filled by its model"):
        cache.layers = [1]


def test_caches_move_and_are_saved(filled):
    turbo, cache = filled
    want = following(turbo, copy.deepcopy(cache))
    wide = copy.deepcopy(cache).to(torch.float64)
    assert all(k.dtype == v.dtype == torch.float64 for k, v in wide) and cache.layers[0].dtype == torch.float32
    assert wide.state.valid.dtype == torch.bool
    torch.testing.assert_close(following(turbo, wide.to("cpu", torch.float32)), want)
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    other = turbo_of(pair("llama")[0], group=2)
    assert torch.equal(following(turbo, copy.deepcopy(loaded)), want)
    with pytest.raises(dp.CacheError, match="of another program"):
        following(other, copy.deepcopy(loaded))
    following(turbo, loaded)
    with pytest.raises(dp.CacheError, match=r"move it with cache.to"):
        loaded.offload(0)
    with pytest.raises(dp.CacheError, match="belongs to another model"):  # it has found its model
        following(turbo_of(pair("llama")[0]), loaded)


@pytest.mark.parametrize(("options", "message"), [
    ({"cache_implementation": "paged"}, "continuous batching"),
    ({"cache_implementation": "static"}, "cache_implementation='static': a transformed model keeps its own DepthCache"),
    ({"cache_implementation": "offloaded"}, "cache_implementation='offloaded'"),
    ({"assistant_early_exit": 2}, "assistant_early_exit: the draft would come from the model's own first blocks"),
])
def test_generation_modes_are_refused_before_any_work(options, message, monkeypatch):
    turbo = turbo_of(stock_of("llama"))
    import depthpass_lowering.executors.eager

    ids = BATCH["input_ids"][:1]
    settings = turbo.config.to_dict()
    with monkeypatch.context() as patch:
        patch.setattr(depthpass_lowering.executors.eager, "run", lambda *a, **k: pytest.fail("computed"))
        with pytest.raises(dp.InputError, match=message):
            turbo.generate(ids, max_new_tokens=3, **options)
        if options.get("cache_implementation") != "paged":  # transformers looks for it among the arguments only
            with pytest.raises(dp.InputError, match=message):
                turbo.generate(ids, generation_config=GenerationConfig(max_new_tokens=3, **options))
    if options == {"cache_implementation": "offloaded"}:  # and in the model's own settings
        monkeypatch.setattr(turbo.generation_config, "cache_implementation", "offloaded")
        with pytest.raises(dp.InputError, match=message):
            turbo.generate(ids, max_new_tokens=3)
        # Gemma's checkpoints say how the stock model is to lay out its keys.
        monkeypatch.setattr(turbo.generation_config, "cache_implementation", "hybrid")
    assert turbo.config.to_dict() == settings and turbo.generate(ids, max_new_tokens=2, eos_token_id=None).shape == (1, 8)


def test_continuous_batching_is_refused_by_name():
    turbo = dp.transform(pair("llama")[0], spec())
    for call in (lambda: turbo.generate_batch([[1, 2]]), lambda: turbo.init_continuous_batching()):
        with pytest.raises(dp.InputError, match=r"generate_batch, .* has no pages. Use generate with a left-padded batch"):
            call()
