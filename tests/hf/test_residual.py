"""Keys of later iterations kept as residuals: what is kept, what decoding reads, what it costs."""

import copy
import pickle

import pytest
import torch
import zoo
from turbos import transformed

import depthpass as dp
from depthpass.analysis.kv import bytes_per_token, group_of, later_slots
from depthpass.hf.caches.residual import Packed

pytestmark = pytest.mark.usefixtures("one_capture")

LOOP = dp.Loop(start=1, end=3, times=3)
BATCH = zoo.batch([9, 6])


def by_hand(x, base, bits, group):
    """base + the residual rounded to 2**bits levels between its least and largest value, group by group."""
    out = torch.empty_like(x)
    for at in range(0, x.shape[-1], group):
        r = x[..., at : at + group] - base[..., at : at + group]
        low, high = r.min(-1, keepdim=True).values, r.max(-1, keepdim=True).values
        step = (high - low) / (2**bits - 1)
        out[..., at : at + group] = base[..., at : at + group] + low + torch.round((r - low) / step) * step
    return out


@pytest.mark.parametrize(("width", "bits"), [(8, 4), (8, 2), (64, 4), (80, 2), (6, 4)])
def test_packing(width, bits):
    x = torch.randn(2, 3, 5, width, dtype=torch.float64)
    packed = Packed.of(x, bits)
    torch.testing.assert_close(packed.whole(width), by_hand(x, torch.zeros_like(x), bits, group_of(width)))
    assert packed.codes.shape[-1] == -(-width * bits // 8) and group_of(80) == 20 and group_of(64) == 32
    constant = torch.full((1, 1, 2, width), 3.5, dtype=torch.float64)
    assert torch.equal(Packed.of(constant, bits).whole(width), constant)


@pytest.mark.parametrize("bits", [4, 2])
def test_decoding_reads_what_was_packed(bits):
    model = transformed("llama", LOOP)
    small, whole = dp.DepthCache(model, residual_bits=bits), dp.DepthCache(model)
    with torch.no_grad():
        for cache in (small, whole):
            model(**BATCH, **{zoo.CACHE: cache}, use_cache=True)
        first = {3: 1, 4: 2, 5: 1, 6: 2}
        assert later_slots(model.depth_program) == first
        lost = {}
        for slot, base in first.items():
            for side in ("keys", "values"):
                x, b = getattr(whole.layers[slot], side), getattr(whole.layers[base], side)
                read = by_hand(x, b, bits, 8)
                torch.testing.assert_close(getattr(small.layers[slot], side), read)
                lost.setdefault(slot, []).append(((x - read).square().sum(), x.square().sum()))
        for slot, sums in lost.items():
            a, b = (sum(s[i] for s in sums) for i in (0, 1))
            assert small.residual_error[slot] == pytest.approx(float((a / b).sqrt()), rel=1e-4)
        # A step on whole keys that were replaced by those values is the same step.
        for slot, base in first.items():
            layer = whole.layers[slot]
            first_layer = whole.layers[base]
            layer.keys = by_hand(layer.keys, first_layer.keys, bits, 8)
            layer.values = by_hand(layer.values, first_layer.values, bits, 8)
        step = {"input_ids": torch.tensor([[7], [8]]), "use_cache": True,
                "attention_mask": torch.cat((BATCH["attention_mask"], torch.ones(2, 1, dtype=torch.long)), 1)}
        torch.testing.assert_close(model(**step, **{zoo.CACHE: small}).logits, model(**step, **{zoo.CACHE: whole}).logits)
    assert small.state.nbytes()[0] < whole.state.nbytes()[0]


def test_generation_beams_copies_and_crops():
    model = transformed("llama", LOOP, torch.float32)
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for more in ({}, {"num_beams": 3}):
        cache = dp.DepthCache(model, residual_bits=4)
        out = model.generate(**BATCH, **settings, **more, **{zoo.CACHE: cache})
        assert out.shape[1] == 15 and cache.get_seq_length() == 14 and len(cache.residual_error) == 4
    cache = dp.DepthCache(model, residual_bits=4)
    with torch.no_grad():
        model(**BATCH, **{zoo.CACHE: cache}, use_cache=True)
        want = cache.layers[3].keys
        cache.batch_repeat_interleave(2)
        assert torch.equal(cache.layers[3].keys, want.repeat_interleave(2, 0))
        cache.reorder_cache(torch.tensor([0, 2]))
        for other in (copy.deepcopy(cache), cache):
            other.crop(-2)
            assert torch.equal(other.layers[3].keys, want[:, :, :-2])
        loaded = pickle.loads(pickle.dumps(cache))
        step = {"input_ids": torch.tensor([[7], [8]]), "attention_mask": BATCH["attention_mask"][:, :8], "use_cache": True}
        assert torch.equal(model(**step, **{zoo.CACHE: loaded}).logits, model(**step, **{zoo.CACHE: cache}).logits)


def test_bytes_of_a_token_are_reported_as_they_are_kept():
    model = transformed("llama", LOOP, torch.float32)
    for bits in (None, 4, 2):
        cache = dp.DepthCache(model, residual_bits=bits)
        with torch.no_grad():
            model(input_ids=BATCH["input_ids"][:1], **{zoo.CACHE: cache}, use_cache=True)
        kept = cache.state.nbytes()[0] / BATCH["input_ids"].shape[1]
        assert kept == bytes_per_token(model.depth_program, [(8,) * 4] * 4, 4, bits)
    text = dp.report(model, seq_len=8, cost=False).to_text()
    assert "KV of one more token" in text and "with residual_bits=2" in text
    for name, spec in {
        "gpt_oss": dp.Loop(start=1, end=3, times=3, kv="last"), "gpt2": dp.ParallelLoop(loops=2, window=3),
        "olmo2": dp.Loop(start=1, end=3, times=3, exit=1e-9, kv="latest"),
    }.items():
        model, sizes = transformed(name, spec, torch.float32), []
        cache = dp.DepthCache(model)
        with torch.no_grad():
            for token in BATCH["input_ids"][:1, :6].split(1, 1):
                model(input_ids=token, **{zoo.CACHE: cache}, use_cache=True)
                sizes.append(cache.state.nbytes()[0])
        assert dp.report(model, seq_len=8).number("kv_bytes_per_token").value == sizes[-1] - sizes[-2]
    assert "KV of one more token" not in dp.report(dp.restore(model), dp.Skip(1), seq_len=8, cost=False).to_text()


def test_bad_input():
    model = transformed("llama", LOOP, torch.float32)
    with pytest.raises(dp.InputError, match="residual_bits: expected 4 or 2"):
        dp.DepthCache(model, residual_bits=3)
    for spec in (dp.TurboConn(bridges=((3, 0),), group=2, rank=4), dp.Loop(start=1, end=3, times=4, kv="mod:2")):
        one = transformed("llama", spec, torch.float32)
        with pytest.raises(dp.InputError, match="visits a block with keys of its own again"):
            one(**BATCH, use_cache=True, **{zoo.CACHE: dp.DepthCache(one, residual_bits=4)})
