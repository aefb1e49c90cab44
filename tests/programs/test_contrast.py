"""Contrast between loops in generate, against a loop that scores the row with fewer and with all iterations."""

import math

import pytest
import torch
import zoo
from turbos import enliven

import depthpass as dp


def transformed(**options):
    stock = enliven(zoo.model("llama", 3), std=0.3)
    return stock, dp.transform(stock, dp.Loop(start=1, end=3, times=3, taps=True, **options))


@pytest.mark.parametrize(("loop", "options"), [
    (1, {}), (-1, {"strength": 2.5, "plausible": 0.2}), (2, {"strength": 1.5, "adaptive": True}), (2, {"form": "penalty"}),
])
def test_greedy_decoding_is_the_written_out_contrast(loop, options):
    """Both formulas as published: guidance z_T + w (z_T - z_t), and log p_T - s log p_t over plausible tokens."""
    penalty = options.get("form") == "penalty"
    strength, plausible = options.get("strength", 0.3 if penalty else 1.0), options.get("plausible", 0.1 if penalty else 0.0)
    stock, model = transformed()
    whole = dp.transform(stock, dp.Loop(start=1, end=3, times=3))
    fewer = dp.transform(stock, dp.Loop(start=1, end=3, times=2 if loop == -1 else loop))
    batch = zoo.batch([6, 4])
    decode = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    with dp.LoopContrast(model, loop, **options) as contrast:
        cached = model.generate(**batch, **decode, logits_processor=[contrast])
        assert torch.equal(cached, model.generate(**batch, **decode, use_cache=False, logits_processor=[contrast]))
        beams = model.generate(**batch, **decode, num_beams=2, logits_processor=[contrast])
    for r, n in enumerate([6, 4]):
        row = batch["input_ids"][r, -n:][None]
        for _ in range(5):
            with torch.no_grad():
                late, early = (m(row).logits[0, -1].tolist() for m in (whole, fewer))
            p, q = ([math.exp(z - max(zs)) for z in zs] for zs in (late, early))
            p, q = ([x / sum(xs) for x in xs] for xs in (p, q))
            top, second = sorted(p)[-1], sorted(p)[-2]
            weight = strength * (1 - (top - second)) if options.get("adaptive") else strength
            score = [(math.log(x) - strength * math.log(y) if penalty else a + weight * (a - b)) if x >= plausible * top
                     else -math.inf for a, b, x, y in zip(late, early, p, q, strict=True)]
            row = torch.cat((row, torch.tensor([[max(range(len(score)), key=score.__getitem__)]])), 1)
        assert torch.equal(row[0, n:], cached[r, 6:])
    assert beams.shape == cached.shape
    plain = model.generate(**batch, **decode)
    assert not torch.equal(plain, cached), "the contrast changes nothing here"
    with dp.LoopContrast(model, loop, strength=0.0, plausible=0.0) as none:
        assert torch.equal(plain, model.generate(**batch, **decode, logits_processor=[none]))


def test_bad_input():
    stock, model = transformed()
    with pytest.raises(dp.SpecError, match=r"LoopContrast\.loop: expected an iteration in 1\.\.2"):
        dp.LoopContrast(model, 3)
    for options, message in (({"strength": -1}, "strength"), ({"plausible": 2}, "plausible"), ({"scope": "other"}, "taps=True"),
                             ({"form": "mean"}, "'guidance' or 'penalty'"), ({"form": "penalty", "adaptive": True}, "adaptive")):
        with pytest.raises(dp.SpecError, match=message):
            dp.LoopContrast(model, **options)
    with pytest.raises(dp.SpecError, match=r"taps=True and scope 'loop', got \[\]"):
        dp.LoopContrast(dp.transform(stock, dp.Loop(times=2)))
    with dp.LoopContrast(model) as contrast, pytest.raises(dp.InputError, match="from the call before, got None"):
        dp.transform(stock, dp.Loop(times=2)).generate(zoo.batch([4, 4])["input_ids"], max_new_tokens=2,
                                                       logits_processor=[contrast])
