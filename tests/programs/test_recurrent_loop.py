"""Recurrent loops against a loop over tokens on the stock blocks: every token or every group, outputs and all gradients."""

import oracle_program as oracle
import pytest
import torch
import zoo
from turbos import enliven

import depthpass as dp

LENGTHS = [8, 5]


def transformed(name, **options):
    stock = enliven(zoo.model(name, 3, dtype=torch.float64), std=0.2)
    model = dp.transform(stock, dp.RecurrentLoop(**options))
    enliven(model.depth, seed=1, std=0.3, least=1)
    return stock, model


def want(row, p, *, encoder=0, interval=1, alpha=0.1, gate="vector", normed=True):
    keys, states, out = [oracle.Keys() for _ in row.blocks], [], []
    for i in range(row.tokens):
        x = row.embed[i]
        for b in range(encoder):
            x = row.block(b, x, i, oracle.own(keys[b]))
        source = interval * (i // interval) - 1
        if source >= 0:
            s = states[source]
            y = p["recurrent.feed.weight"] @ (s / (s.square().mean() + 1e-6).sqrt() if normed else s)
            if gate == "vector":
                y = y * p["recurrent.gate.weight"]
            if gate == "token":
                y = y / (1 + torch.exp(-p["recurrent.gate.weight"] @ torch.cat((x, s)) - p["recurrent.gate.bias"]))
            x = x + alpha * y
        for b in range(encoder, len(row.blocks)):
            x = row.block(b, x, i, oracle.own(keys[b]))
        states.append(x)
        out.append(x)
    return torch.stack(out)


@pytest.mark.parametrize(("name", "options"), [
    ("llama", {"encoder": 1}), ("gpt2", {"gate": "token", "alpha": 0.7}), ("gemma3_text", {"encoder": 2, "gate": "none"}),
    ("llama", {"encoder": 1, "interval": 3, "alpha": 0.5}), ("qwen2", {"interval": 2, "gate": "token", "normed": False}),
])
def test_outputs_and_gradients(name, options):
    stock, model = transformed(name, **options)
    oracle.compare(stock, model, zoo.batch(LENGTHS) | {"use_cache": False}, lambda row, p: want(row, p, **options))
    (region,) = model.depth_lowered
    assert (region.level, region.chunk) == ("scheduled", options.get("interval", 1))


@pytest.mark.parametrize("options", [{"encoder": 1}, {"encoder": 1, "interval": 3, "alpha": 0.6}])
def test_generation_and_saving(options, tmp_path):
    _, model = transformed("llama", **options)
    batch, greedy = zoo.batch([5, 3]), {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    cached = model.generate(**batch, **greedy)
    assert torch.equal(cached, model.generate(**batch, **greedy, use_cache=False))
    if options.get("interval"):
        model.save_pretrained(tmp_path)
        loaded = dp.from_pretrained(tmp_path)
        real = batch["attention_mask"].bool()
        torch.testing.assert_close(loaded(**batch).logits[real], model(**batch).logits[real], rtol=1e-10, atol=1e-10)
    report = dp.report(model, seq_len=7, cost=False)
    assert report.depth_at(7) == 1 + -(-7 // options.get("interval", 1)) * 2 and report.serial_blocks == 2


def test_starts_as_the_stock_model_and_bad_input():
    stock = enliven(zoo.model("llama", 3), std=0.2)
    batch = zoo.batch([7, 7])
    with torch.no_grad():
        for spec in (dp.RecurrentLoop(encoder=1), dp.RecurrentLoop(interval=3, gate="token")):
            fresh = dp.transform(stock, spec)(**batch).logits
            torch.testing.assert_close(fresh, stock(**batch).logits, rtol=1e-4, atol=1e-5)
    with pytest.raises(dp.PassError, match="expected at most 2 of the program's 3 visits, got 3"):
        dp.transform(stock, dp.RecurrentLoop(encoder=3))
    for options, message in (({"interval": 0}, "interval"), ({"alpha": 0.0}, "alpha"), ({"encoder": -1}, "encoder")):
        with pytest.raises(dp.SpecError, match=rf"recurrent_loop\.{message}"):
            dp.RecurrentLoop(**options)
