"""Assisted decoding: programs that cannot take tokens back say so before anything runs."""

import pytest
import torch
import zoo

import depthpass as dp


@pytest.mark.parametrize(("spec", "reason"), [
    (dp.Loop(start=1, end=2, times=3, exit=0.5), "its routed visits keep some tokens only"),
    (dp.MixtureOfRecursions(start=1, end=2, mode="threshold"), "its routed visits"),
    (dp.Loop(start=1, end=2, times=2, kv="last"), "its KV policy"),
    (dp.Pad(2), "its workspace pads"),
], ids=["exit", "mor", "last", "pad"])
@pytest.mark.filterwarnings("ignore:generate. with kv=")
def test_refused(spec, reason):
    model = dp.transform(zoo.model("llama", 3), spec)
    with pytest.raises(dp.InputError, match=f"assisted decoding is not possible with this program: {reason}"):
        model.generate(zoo.batch([5])["input_ids"], max_new_tokens=2, prompt_lookup_num_tokens=2)
    helper = zoo.model("llama", 2)
    with pytest.raises(dp.InputError, match="assisted decoding is not possible"):
        model.generate(zoo.batch([5])["input_ids"], max_new_tokens=2, assistant_model=helper, do_sample=False)


def test_a_cache_says_whether_tokens_can_be_taken_back():
    """transformers asks before it drafts."""
    for spec, croppable in ((dp.Loop(start=1, end=2, times=2), True), (dp.Loop(start=1, end=2, times=3, exit=0.5), False)):
        model = dp.transform(zoo.model("llama", 3), spec)
        cache = dp.DepthCache(model, record=True)
        with torch.no_grad():
            model(zoo.batch([5])["input_ids"], cache=cache)
        assert cache.is_croppable is croppable
        if croppable:
            cache.crop(-2)
        else:
            with pytest.raises(dp.CacheError, match="routed ones cannot be cropped"):
                cache.crop(-2)
