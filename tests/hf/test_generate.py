"""``generate`` and step-by-step decoding: with a cache, without one, and with a cache that is cut, copied or reused."""

import copy

import pytest
import torch
import zoo
from transformers import DynamicCache, StaticCache
from turbos import GROUP, pair, turbo_of

import depthpass as dp
from depthpass.errors import CacheError, InputError

NAMES = ["llama", "gpt2", "gemma3_text", "gpt_oss", "llama4_text", "opt", "mixtral"]
NEW = 2 * GROUP + 2
pytestmark = pytest.mark.usefixtures("one_capture")


@pytest.fixture(params=NAMES)
def turbo(request):
    return pair(request.param)[1]


@pytest.fixture
def llama():
    return pair("llama")[1]


def run(model, batch, **options):
    """Sequences, and the scores of every step as one tensor."""
    out = model.generate(**batch, **{
        "max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True,
        "output_logits": True, **options,
    })
    return out.sequences, torch.stack(out.logits, 1)


def logits(model, ids, mask=None, **more):
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, **more).logits


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lengths", [[6, 6], [7, 2, 5]], ids=["full", "padded"])
@pytest.mark.parametrize("options", [
    {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2, "do_sample": True, "top_k": 20},
    {"do_sample": True, "temperature": 0.8, "top_p": 0.9}, {"do_sample": True, "num_return_sequences": 3},
    {"repetition_penalty": 1.3},
], ids=["beams", "sampled-beams", "sampling", "several", "penalty"])
def test_cached_generation_equals_uncached(turbo, options, lengths):
    batch = zoo.batch(lengths, seed=3)
    seen = []
    for use_cache in (True, False):
        torch.manual_seed(11)
        seen.append(run(turbo, batch, use_cache=use_cache, **options))
    (tokens, scores), (want, want_scores) = seen
    assert torch.equal(tokens, want)
    close(scores, want_scores)
    assert tokens.shape[1] == batch["input_ids"].shape[1] + NEW


def test_a_padded_row_generates_as_it_does_alone(turbo):
    batch = zoo.batch([7, 2, 5], seed=3)
    tokens, scores = run(turbo, batch)
    for row in range(3):
        real = batch["attention_mask"][row].bool()
        alone, alone_scores = run(turbo, {"input_ids": batch["input_ids"][row, real][None]})
        assert torch.equal(tokens[row, 7:], alone[0, real.sum():])
        close(scores[row], alone_scores[0])


def test_stops_at_the_end_token(llama):
    batch = zoo.batch([6, 3], seed=3)
    tokens, _ = run(llama, batch)
    end = int(tokens[0, 8])
    actual = [run(llama, batch, eos_token_id=end, pad_token_id=0, use_cache=u)[0] for u in (True, False)]
    assert torch.equal(*actual) and (actual[0][0, 9:] == 0).all()


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_continues_a_prompt_from_its_cache(turbo, name):
    ids = zoo.batch([9, 9], seed=4)["input_ids"]
    want, _ = run(turbo, {"input_ids": ids})
    cache = dp.DepthCache(turbo)
    logits(turbo, ids[:, :5], past_key_values=cache)
    kept = copy.deepcopy(cache)
    assert torch.equal(run(turbo, {"input_ids": ids}, **{name: cache})[0], want)
    assert cache.get_seq_length() == 9 + NEW - 1
    # The copy has not moved, and a second question can be asked of the same prompt.
    other = torch.cat((ids[:, :5], ids[:, 5:].flip(1)), 1)
    assert kept.get_seq_length() == 5
    assert torch.equal(run(turbo, {"input_ids": other}, **{name: kept})[0], run(turbo, {"input_ids": other})[0])


def test_generation_returns_the_cache(llama):
    out = llama.generate(**zoo.batch([5]), max_new_tokens=3, eos_token_id=None, return_dict_in_generate=True)
    assert isinstance(out[zoo.CACHE], dp.DepthCache) and out[zoo.CACHE].get_seq_length() == 7
    assert not hasattr(pair("llama")[1].model, "generate")


def test_prefill_in_chunks(turbo):
    batch = zoo.batch([11, 6], seed=4)
    want, scores = run(turbo, batch)
    got, got_scores = run(turbo, batch, prefill_chunk_size=4)
    assert torch.equal(got, want)
    close(got_scores, scores)


@pytest.mark.parametrize("lengths", [[9, 9, 9], [9, 4, 6]], ids=["full", "padded"])
def test_crop_takes_tokens_back(turbo, lengths):
    batch = zoo.batch(lengths, seed=5)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    want = logits(turbo, ids, mask)
    for end in (8, 6, 2):
        cache = dp.DepthCache(turbo, record=True)
        # In two steps, so that recorded lines are also extended.
        logits(turbo, ids[:, :4], mask[:, :4], past_key_values=cache)
        junk = ids.clone()
        junk[:, end:] = 5
        logits(turbo, junk[:, 4:], mask, past_key_values=cache)
        cache.crop(end if end != 6 else -3)
        assert cache.get_seq_length() == end
        got = logits(turbo, ids[:, end:], mask, past_key_values=cache)
        real = mask[:, end:].bool()
        close(got[real], want[:, end:][real])


def test_crop_of_everything_and_of_nothing(llama):
    ids = zoo.batch([7])["input_ids"]
    cache = dp.DepthCache(llama, record=True)
    logits(llama, ids, past_key_values=cache)
    cache.crop(7)
    cache.crop(100)
    assert cache.get_seq_length() == 7
    cache.crop(0)
    assert cache.get_seq_length() == 7
    with pytest.raises(CacheError, match="cannot drop 8 of 7"):
        cache.crop(-8)
    cache.crop(-7)
    assert cache.get_seq_length() == 0
    close(logits(llama, ids, past_key_values=cache), logits(llama, ids))
    cache.crop(-7)  # nothing is left of the row, so others may come, in any number
    close(logits(llama, ids.repeat(3, 1), past_key_values=cache), logits(llama, ids.repeat(3, 1)))


def test_crop_needs_recorded_lines(llama):
    ids = zoo.batch([7])["input_ids"]
    cache = dp.DepthCache(llama)
    logits(llama, ids, past_key_values=cache)
    with pytest.raises(CacheError, match="record=True"):
        cache.crop(5)
    assert cache.get_seq_length() == 7
    # Recording from here on is enough to take back what comes after.
    cache.activate_past_recording()
    logits(llama, ids[:, :2], past_key_values=cache)
    with pytest.raises(CacheError, match="record"):
        cache.crop(5)
    cache.crop(7)
    more = torch.cat((ids, ids[:, 3:5]), 1)
    close(logits(llama, ids[:, 3:5], past_key_values=cache), logits(llama, more)[:, 7:])


@pytest.mark.parametrize("lengths", [[6, 6, 6], [6, 2, 4]], ids=["full", "padded"])
def test_rows_are_selected_and_repeated(turbo, lengths):
    batch = zoo.batch(lengths, seed=6)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    want = logits(turbo, ids, mask)

    def prefilled():
        cache = dp.DepthCache(turbo)
        logits(turbo, ids[:, :4], mask[:, :4], past_key_values=cache)
        return cache

    for name in ("batch_select_indices", "reorder_cache"):
        rows, cache = torch.tensor([2, 0]), prefilled()
        getattr(cache, name)(rows)
        assert cache.batch_size == 2
        close(logits(turbo, ids[rows, 4:], mask[rows], past_key_values=cache), want[rows, 4:])
    rows, cache = torch.tensor([0, 0, 1, 1, 2, 2]), prefilled()
    cache.batch_repeat_interleave(2)
    close(logits(turbo, ids[rows, 4:], mask[rows], past_key_values=cache), want[rows, 4:])
    cache.reset()
    assert cache.get_seq_length() == 0 and not cache.is_initialized
    close(logits(turbo, ids, mask, past_key_values=cache)[mask.bool()], want[mask.bool()])


def test_prompt_lookup_and_assistants_give_greedy_tokens(turbo):
    ids = zoo.batch([6], seed=7)["input_ids"].repeat(1, 2)
    want, _ = run(turbo, {"input_ids": ids})
    assert torch.equal(run(turbo, {"input_ids": ids}, prompt_lookup_num_tokens=3)[0], want)
    assert torch.equal(run(turbo, {"input_ids": ids}, assistant_model=turbo)[0], want)


def test_assists_a_stock_model_and_is_assisted_by_one(llama):
    stock, ids = dp.restore(llama), zoo.batch([6], seed=7)["input_ids"].repeat(1, 2)
    for model, assistant in ((llama, stock), (stock, llama)):
        want, _ = run(model, {"input_ids": ids})
        assert torch.equal(run(model, {"input_ids": ids}, assistant_model=assistant)[0], want)


@pytest.mark.parametrize("turbo", ["gpt2", "gemma3_text", "opt"], indirect=True)
def test_generates_from_embeddings(turbo):
    batch = zoo.batch([7, 4], seed=8)
    embeds = turbo.get_input_embeddings()(batch["input_ids"]).detach()
    if turbo.config.model_type == "gemma3_text":  # its embedding module scales; so does the model's own call of it
        assert turbo.get_input_embeddings().embed_scale != 1
    want, _ = run(turbo, batch)
    got, _ = run(turbo, {"inputs_embeds": embeds, "attention_mask": batch["attention_mask"]})
    assert torch.equal(got, want[:, 7:])


def test_cache_of_another_kind_or_model_is_refused(llama):
    ids = zoo.batch([5])["input_ids"]
    for given in (DynamicCache(config=llama.config), StaticCache(config=llama.config, max_cache_len=32)):
        with pytest.raises(CacheError, match=rf"expected a DepthCache .* got {type(given).__name__}.*dp.DepthCache"):
            llama(input_ids=ids, past_key_values=given)
        with pytest.raises(CacheError, match="expected a DepthCache"):
            run(llama, {"input_ids": ids}, past_key_values=given)
    for other in (pair("gpt2")[1], turbo_of(pair("llama")[0])):
        cache = dp.DepthCache(other)
        logits(other, ids, past_key_values=cache)
        with pytest.raises(CacheError, match="belongs to another model"):
            llama(input_ids=ids[:, :1], past_key_values=cache)
        assert cache.get_seq_length() == 5
    with pytest.raises(CacheError, match="expected a transformed model, got LlamaForCausalLM"):
        dp.DepthCache(pair("llama")[0])
    # And a stock model cannot run on ours.
    with pytest.raises(CacheError, match="stock attention layer cannot"):
        pair("llama")[0](input_ids=ids, **{zoo.CACHE: dp.DepthCache(llama)})


def test_cache_with_other_rows_is_refused(llama):
    ids = zoo.batch([5, 5])["input_ids"]
    cache = dp.DepthCache(llama)
    logits(llama, ids, past_key_values=cache)
    with pytest.raises(CacheError, match="holds 2 rows, the call has 1"):
        llama(input_ids=ids[:1, :1], past_key_values=cache)
    assert cache.get_seq_length() == 5


@pytest.mark.parametrize("kind", ["static", "offloaded", "quantized"])
def test_other_cache_implementations_are_refused(llama, kind):
    with pytest.raises(InputError, match=f"cache_implementation='{kind}': .*DepthCache"):
        run(llama, zoo.batch([5]), cache_implementation=kind)


def test_right_padded_prompts_are_warned_of_and_rows_of_padding_refused(llama, caplog):
    import logging

    import transformers

    transformers.logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING):
            run(llama, zoo.batch([6, 3], "right"))
    finally:
        transformers.logging.disable_propagation()
    assert "right-padding" in caplog.text
    batch = zoo.batch([5, 3])
    batch["attention_mask"][1] = 0
    with pytest.raises(InputError, match="row 1 is padding only"):
        run(llama, batch)


def test_attentions_are_refused_by_name(llama):
    with pytest.raises(InputError, match="output_attentions"):
        run(llama, zoo.batch([5]), output_attentions=True)


def test_a_cache_shows_what_it_holds(llama):
    cache = dp.DepthCache(llama)
    logits(llama, zoo.batch([5, 5])["input_ids"], past_key_values=cache)
    # 3 slots of keys and values, 2 rows, 2 heads of 8, 5 tokens; 2 lines of 3 tokens of rank 6.
    assert repr(cache) == (
        f"DepthCache(tokens=5, slots=3, delay_lines=2, kv_bytes={3 * 2 * 2 * 2 * 8 * 5 * 4}, "
        f"delay_line_bytes={2 * 2 * 3 * 6 * 4})"
    )
