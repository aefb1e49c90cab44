"""Generation with the cache equals generation without it, and scoring what was generated: every kind of program."""

import pytest
import torch
import zoo
from turbos import enliven

import depthpass as dp

NEW = 6
PROGRAMS = {
    "repeat": dp.IntraLayerRecurrence([1, 3, 1]),
    "block_repeat": dp.LayerProgram([0, 1, 2, 1, 2]),
    "skip_first": dp.LayerProgram([1, 2]),
    "reorder": dp.LayerProgram([2, 0, 1]),
    "damped_first_keys": dp.Loop(start=1, end=3, times=3, damped=True, kv="first"),
    "noise": dp.Loop(start=1, end=2, times=2, inject="concat", state="noise"),
    "exit": dp.Loop(start=1, end=3, times=3, exit=0.6),
    "exit_first": dp.Loop(start=1, end=3, times=4, exit=0.7, kv="first", inject="add"),
    "exit_state": dp.Loop(start=1, end=2, times=4, exit=0.6, criterion="state"),
    "exit_kl": dp.Loop(start=1, end=3, times=4, exit=0.4, criterion="kl", normalize="loop"),
    "timestep": dp.Loop(start=1, end=3, times=3, timestep=True),
    "plt": dp.ParallelLoop(loops=3, window=3),
    "plt_hidden": dp.ParallelLoop(loops=2, window=2, gate="hidden", mix=(0.7, 0.5), normalize="loop"),
    "plt_sequential": dp.ParallelLoop.iquest(window=4),
    "mor": dp.MixtureOfRecursions(start=1, recursions=3, mode="threshold", combine="delta"),
    "mor_shared": dp.MixtureOfRecursions(start=1, recursions=2, mode="threshold", kv="shared"),
    "itt": dp.InnerThinking(steps=3, mode="threshold", bypass="literal"),
    # Several passes on one program.
    "shared_mor_on_a_list": [
        dp.LayerProgram([0, 1, 2, 1]),
        dp.MixtureOfRecursions(start=1, recursions=3, mode="threshold", combine="delta", kv="shared"),
    ],
    "feedback_around_thinking": [
        dp.InnerThinking(steps=2, mode="threshold", blocks=(1,)), dp.TurboConn(bridges=[(3, 0)], group=3, rank=4),
    ],
    "feedback_around_noise": [
        dp.Loop(start=1, end=2, times=2, inject="add", state="noise"), dp.TurboConn(bridges=[(3, 1)], group=2, rank=4),
    ],
}


def transformed(name, spec, style="sdpa"):
    # Eager attention adds a mask of the largest negative number and takes a softmax in float32: no float64 there.
    dtype = torch.float64 if style == "sdpa" else torch.float32
    stock = enliven(zoo.model(name, 3, dtype=dtype), std=0.2)
    if style != stock.config._attn_implementation:
        stock.set_attn_implementation(style)
    model = dp.transform(stock, spec)
    enliven(model.depth, seed=1, std=0.3, least=1)
    return model


def close(got, want):
    """Generation hands out logits in float32."""
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, check_dtype=False)


def same_with_and_without_cache(model, lengths, **options):
    batch = zoo.batch(lengths)
    options = {
        "max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "output_logits": True,
        "return_dict_in_generate": True, **options,
    }
    cached, without = (model.generate(**batch, **options, use_cache=u) for u in (True, False))
    assert torch.equal(cached.sequences, without.sequences)
    close(torch.stack(cached.logits), torch.stack(without.logits))
    return cached


@pytest.mark.parametrize("program", [p for p in PROGRAMS if not isinstance(PROGRAMS[p], list)])
def test_greedy_on_left_padded_rows(program):
    model = transformed("llama", PROGRAMS[program])
    cached = same_with_and_without_cache(model, [7, 4])
    batch = zoo.batch([7, 4])
    mask = torch.cat((batch["attention_mask"], torch.ones(2, NEW, dtype=torch.long)), 1)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        taught = model(input_ids=cached.sequences, attention_mask=mask, position_ids=positions).logits
    close(torch.stack(cached.logits, 1), taught[:, 6:-1])


@pytest.mark.parametrize("program", ["block_repeat", "skip_first", "plt", "mor", "noise"])
def test_beams_reorder_every_kind_of_state(program):
    same_with_and_without_cache(transformed("llama", PROGRAMS[program]), [5, 3], num_beams=3)


@pytest.mark.parametrize("style", ["eager", "sdpa"])
@pytest.mark.parametrize("program", ["block_repeat", "skip_first", "reorder", "plt", "mor"])
def test_other_attention_and_models(program, style):
    # The window of gemma3's local layers is shorter than the rows, and shorter or longer than PLT's.
    same_with_and_without_cache(transformed("gemma3_text", PROGRAMS[program], style), [7, 4])
    if style == "eager":
        same_with_and_without_cache(transformed("gpt2", PROGRAMS[program], style), [6, 6])


@pytest.mark.parametrize(
    "program",
    ["plt", "mor", "itt", "noise", "damped_first_keys", "shared_mor_on_a_list", "feedback_around_thinking",
     "feedback_around_noise"],
)
def test_every_split_into_calls_is_the_whole_row(program):
    model = transformed("llama", PROGRAMS[program])
    batch = zoo.batch([8, 5, 6])
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        want = model(**batch).logits
        for split in ([1] * 8, [5, 1, 2], [2, 6]):
            cache, pieces, end = dp.DepthCache(model), [], 0
            for count in split:
                start, end = end, end + count
                out = model(input_ids=ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache)
                pieces.append(out.logits)
            real = mask.bool()
            torch.testing.assert_close(torch.cat(pieces, 1)[real], want[real], rtol=1e-8, atol=1e-8)


def test_later_loops_of_plt_keep_a_window_of_keys_only():
    model = transformed("llama", dp.ParallelLoop(loops=2, window=3))
    cache = dp.DepthCache(model)
    with torch.no_grad():
        model(input_ids=zoo.batch([8, 8])["input_ids"], past_key_values=cache)
        model(input_ids=torch.tensor([[5], [6]]), past_key_values=cache)
    lengths = [cache.state.slots[s].keys[0].shape[2] for s in sorted(cache.state.slots)]
    assert lengths == [9, 9, 9, 3, 3, 3]
    with pytest.raises(dp.CacheError, match="record"):
        cache.crop(4)
    recorded = dp.DepthCache(model, record=True)
    ids = zoo.batch([8, 8])["input_ids"]
    with torch.no_grad():
        model(input_ids=ids, past_key_values=recorded)
        recorded.crop(5)
        again = model(input_ids=ids[:, 5:], past_key_values=recorded).logits
        torch.testing.assert_close(again, model(input_ids=ids).logits[:, 5:], rtol=1e-8, atol=1e-8)


def test_sampling_with_a_seed():
    model = transformed("llama", PROGRAMS["mor"])
    batch = zoo.batch([6, 4])
    drawn = []
    for cached in (True, False):
        torch.manual_seed(3)
        drawn.append(model.generate(**batch, max_new_tokens=NEW, do_sample=True, eos_token_id=None, use_cache=cached))
    assert torch.equal(*drawn)


@pytest.mark.parametrize("spec", [dp.MixtureOfRecursions(start=1, recursions=2), dp.InnerThinking(steps=2)])
def test_top_k_over_the_row_does_not_generate(spec):
    model = transformed("llama", spec)
    batch = zoo.batch([6, 6])
    with pytest.raises(dp.InputError, match="threshold"):
        model.generate(**batch, max_new_tokens=2)
    cache = dp.DepthCache(model)
    with torch.no_grad(), pytest.raises(dp.InputError, match="whole rows"):
        model(input_ids=batch["input_ids"][:, :4], past_key_values=cache)
        model(input_ids=batch["input_ids"][:, 4:], past_key_values=cache)
