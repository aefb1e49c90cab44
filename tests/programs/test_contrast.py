"""Contrast between loops in generate, against a loop that scores the row with fewer and with all iterations."""

import math

import pytest
import torch
import zoo
from turbos import enliven

import depthpass as dp


def made(**options):
    stock = enliven(zoo.model("llama", 3), std=0.3)
    return stock, dp.transform(stock, dp.Loop(start=1, end=3, times=3, taps=True, **options))


@pytest.mark.parametrize(("loop", "strength", "plausible"), [(1, 1.0, 0.1), (-1, 2.5, 0.0), (2, 0.5, 0.3)])
def test_greedy_decoding_is_the_written_out_contrast(loop, strength, plausible):
    stock, model = made()
    whole = dp.transform(stock, dp.Loop(start=1, end=3, times=3))
    fewer = dp.transform(stock, dp.Loop(start=1, end=3, times=2 if loop == -1 else loop))
    batch = zoo.batch([6, 4])
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    with dp.LoopContrast(model, loop, strength=strength, plausible=plausible) as contrast:
        cached = model.generate(**batch, **options, logits_processor=[contrast])
        assert torch.equal(cached, model.generate(**batch, **options, use_cache=False, logits_processor=[contrast]))
        beams = model.generate(**batch, **options, num_beams=2, logits_processor=[contrast])
    for r, n in enumerate([6, 4]):
        row = batch["input_ids"][r, -n:][None]
        for _ in range(5):
            with torch.no_grad():
                p, q = (m(row).logits[0, -1].softmax(-1) for m in (whole, fewer))
            score = [math.log(x) + strength * (math.log(x) - math.log(y)) if x >= plausible * p.max() else -math.inf
                     for x, y in zip(p.tolist(), q.tolist(), strict=True)]
            row = torch.cat((row, torch.tensor([[max(range(len(score)), key=score.__getitem__)]])), 1)
        assert torch.equal(row[0, n:], cached[r, 6:])
    assert beams.shape == cached.shape
    plain = model.generate(**batch, **options)
    assert not torch.equal(plain, cached), "the contrast changes nothing here"
    with dp.LoopContrast(model, loop, strength=0.0, plausible=0.0) as none:
        assert torch.equal(plain, model.generate(**batch, **options, logits_processor=[none]))


def test_bad_input():
    stock, model = made()
    with pytest.raises(dp.SpecError, match=r"LoopContrast\.loop: expected an iteration in 1\.\.2"):
        dp.LoopContrast(model, 3)
    for options, message in (({"strength": -1}, "strength"), ({"plausible": 2}, "plausible"), ({"scope": "other"}, "taps=True")):
        with pytest.raises(dp.SpecError, match=message):
            dp.LoopContrast(model, **options)
    with pytest.raises(dp.SpecError, match="got taps of none"):
        dp.LoopContrast(dp.transform(stock, dp.Loop(times=2)))
    with dp.LoopContrast(model) as contrast, pytest.raises(dp.InputError, match="from the call before, got None"):
        dp.transform(stock, dp.Loop(times=2)).generate(zoo.batch([4, 4])["input_ids"], max_new_tokens=2,
                                                       logits_processor=[contrast])
