"""Workspace pads on real models: equal to the same model run on rows with the pads written in by hand."""

import pytest
import torch
import zoo
from torch import nn
from turbos import enliven

import depthpass as dp
from depthpass.ir import parse_program, verify
from depthpass.ir.interpret import Interpretation
from tests.passes.toy import WIDTH, Toy

M, TOKEN = 3, 5
PROMPTS, ANSWERS = [5, 3], [2, 4]
SPECS = {
    "stock": [],
    "loop": [dp.Loop(start=1, end=3, times=3, inject="add")],
    "bridge": [dp.TurboConn(bridges=[(2, 0)], group=2, rank=4)],
    "exit": [dp.Loop(start=1, end=2, times=3, exit=0.6)],
    "noise": [dp.Loop(start=1, end=2, times=2, inject="concat", state="noise")],
    "zeros": [dp.Loop(start=1, end=2, times=2, inject="add", state="zeros")],
}


def transformed(name, spec, token=TOKEN, dtype=torch.float64):
    stock = enliven(zoo.model(name, 3, dtype=dtype), std=0.2)
    model, plain = dp.transform(stock, [*spec, dp.Pad(M, token=token)]), dp.transform(stock, spec or [dp.Identity()])
    for m in (model, plain):
        enliven(m.depth, seed=1, std=0.3, least=1)
    return stock, model, plain


def rows(side):
    """Rows of prompts and answers, padded on one side."""
    g = torch.Generator().manual_seed(3)
    ids = [torch.randint(6, zoo.VOCABULARY, (p + a,), generator=g) for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    width = max(map(len, ids))
    batch = {"input_ids": torch.zeros(2, width, dtype=torch.long), "attention_mask": torch.zeros(2, width, dtype=torch.long)}
    batch["labels"] = torch.full((2, width), -100)
    for r, row in enumerate(ids):
        at = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        batch["input_ids"][r, at], batch["attention_mask"][r, at] = row, 1
        start = at.start + PROMPTS[r]
        batch["labels"][r, start : at.start + len(row)] = row[PROMPTS[r] :]
    return batch


def by_hand(plain, batch, r):
    """Logits of one row without padding, pads written in: ``(all of them, those that are handed out)``."""
    real = batch["attention_mask"][r].bool()
    row, p = batch["input_ids"][r, real], PROMPTS[r]
    ids = torch.cat((row[:p], torch.full((M,), TOKEN), row[p:]))
    start = int(real.long().argmax())
    positions = torch.arange(start, start + len(ids))[None]
    logits = plain(ids[None], position_ids=positions, use_cache=False).logits[0]
    kept = [*range(p - 1), *range(p + M - 1, len(ids))]
    return logits[kept]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("name", "spec"), [
    ("llama", "stock"), ("llama", "loop"), ("llama", "bridge"), ("llama", "exit"), ("gpt2", "loop"), ("gpt_neox", "stock"),
    ("gemma3_text", "loop"), ("mixtral", "stock"), ("qwen2", "bridge"), ("llama", "noise"), ("llama", "zeros"),
])
def test_outputs_loss_and_gradients(name, spec, side):
    stock, model, plain = transformed(name, SPECS[spec])
    batch = rows(side)
    out = model(**batch)
    assert out.logits.shape == (*batch["input_ids"].shape, zoo.VOCABULARY)
    out.loss.backward()
    got = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(), stock.zero_grad(), plain.zero_grad()
    seen, targets = [], []
    for r in range(2):
        logits = by_hand(plain, batch, r)
        real = batch["attention_mask"][r].bool()
        torch.testing.assert_close(out.logits[r, real], logits, rtol=1e-8, atol=1e-8)
        # The prompt's last place has the last pad's logits, which predict the first answer token.
        seen.append(logits[PROMPTS[r] - 1 : -1])
        targets.append(batch["input_ids"][r, real][PROMPTS[r] :])
    loss = nn.functional.cross_entropy(torch.cat(seen), torch.cat(targets))
    # The head upcasts its logits to float32 for the loss.
    torch.testing.assert_close(out.loss.double(), loss, rtol=1e-6, atol=1e-6)
    loss.backward()
    want = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    assert got.keys() == want.keys()
    for n, g in want.items():
        assert (got[n] - g).abs().max() <= 1e-5 * g.abs().max().clamp_min(1e-12), n


@pytest.mark.parametrize(("name", "spec"), [("llama", "loop"), ("llama", "bridge"), ("llama", "exit"), ("gpt2", "stock"),
                                            ("gemma3_text", "loop"), ("opt", "stock"), ("llama", "noise")])
def test_generation(name, spec):
    _, model, plain = transformed(name, SPECS[spec])
    batch = zoo.batch([5, 3])
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    cached = model.generate(**batch, **options)
    assert cached.shape == (2, 10) and torch.equal(cached[:, :5], batch["input_ids"])
    assert torch.equal(cached, model.generate(**batch, **options, use_cache=False))
    ids = batch["input_ids"][:1]
    assert torch.equal(model.generate(ids, **options), model.generate(ids, **options, use_cache=False))
    beams = model.generate(**batch, **options, num_beams=3)
    assert torch.equal(beams, model.generate(**batch, **options, num_beams=3, use_cache=False))
    for r, n in enumerate([5, 3]):
        ids = torch.cat((batch["input_ids"][r, -n:], torch.full((M,), TOKEN)))
        with torch.no_grad():
            for _ in range(5):
                ids = torch.cat((ids, plain(ids[None], use_cache=False).logits[0, -1].argmax()[None]))
        assert torch.equal(ids[n + M :], cached[r, 5:])


def test_the_cache_counts_what_callers_know():
    _, model, _ = transformed("llama", SPECS["loop"])
    ids = zoo.batch([6, 6])["input_ids"]
    whole = model(ids, labels=ids.masked_fill(torch.arange(6) < 4, -100)).logits
    cache = dp.DepthCache(model)
    first = model(ids[:, :4], past_key_values=cache, use_cache=True).logits
    assert cache.get_seq_length() == 4 and cache.state.length == 4 + M
    last = model(ids[:, 4:], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(torch.cat((first, last), 1), whole, rtol=1e-9, atol=1e-9)
    cache.crop(5)
    assert cache.get_seq_length() == 5
    again = model(ids[:, 5:], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(again, whole[:, 5:], rtol=1e-9, atol=1e-9)
    with pytest.raises(dp.CacheError, match="pads"):
        cache.crop(3)


def test_the_prompt_may_be_told():
    _, model, _ = transformed("llama", SPECS["stock"])
    batch = rows("left")
    want = model(**batch)
    told = model(batch["input_ids"], batch["attention_mask"], prompt_length=torch.tensor(PROMPTS)).logits
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(told[real], want.logits[real], rtol=0, atol=0)
    # The labels of a whole text do not say where its prompt ends.
    text = {**batch, "labels": batch["input_ids"].masked_fill(~real, -100)}
    with pytest.raises(dp.InputError, match="row 0 has a label at its first token"):
        model(**text)
    assert model(**text, prompt_length=torch.tensor(PROMPTS)).loss > 0
    turns = batch["labels"].clone()
    turns[1, -2] = -100
    with pytest.raises(dp.InputError, match="row 1 has tokens without a label after the first one"):
        model(**{**batch, "labels": turns})
    embeds = model.get_input_embeddings()(batch["input_ids"])
    by_embeds = model(inputs_embeds=embeds, attention_mask=batch["attention_mask"], labels=batch["labels"]).logits
    torch.testing.assert_close(by_embeds[real], want.logits[real], rtol=1e-9, atol=1e-9)


def test_taps_and_the_last_logits():
    _, model, _ = transformed("llama", [dp.Loop(start=1, end=3, times=2, taps=True)])
    ids = zoo.batch([6, 6])["input_ids"]
    out = model(ids)
    assert out.taps["loop.t1"].shape == out.logits.shape == (2, 6, zoo.VOCABULARY)
    only = model(ids, logits_to_keep=1)
    torch.testing.assert_close(only.logits, out.logits[:, -1:])


@pytest.mark.parametrize("spec", [
    dp.MixtureOfRecursions(recursions=2, start=0, end=2, router="token", taps=True),
    dp.MixtureOfRecursions(recursions=2, start=0, end=2, router="expert", mode="threshold", taps=True),
    dp.MixtureOfDepths(mode="threshold", taps=True),
], ids=["mor by token", "mor by expert", "mod"])
def test_taps_of_routes_are_those_of_the_callers_tokens(spec):
    stock = enliven(zoo.model("llama", 4), std=0.2)
    ids = torch.randint(6, zoo.VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(4))
    padded = torch.cat((ids, torch.full((2, M), TOKEN)), 1)
    plain = dp.transform(stock, spec)
    enliven(plain.depth, seed=1, std=0.3, least=1)
    for order in ([spec, dp.Pad(M, token=TOKEN)], [dp.Pad(M, token=TOKEN), spec]):
        model = dp.transform(stock, order)
        model.depth.load_state_dict(plain.depth.state_dict())
        with torch.no_grad():
            got, wanted = model(input_ids=ids, use_cache=False).taps, plain(input_ids=padded, use_cache=False).taps
        assert got.keys() == wanted.keys() and any(n.endswith("taken") for n in got)
        for name, tap in wanted.items():
            # The prompt's last token has what the last pad has.
            kept = torch.cat((tap[:, :7], tap[:, -1:]), 1)
            torch.testing.assert_close(got[name], kept, msg=lambda text, name=name: f"{name}: {text}")


def test_zero_pads_change_nothing_and_saving_keeps_them(tmp_path):
    stock, model, _ = transformed("llama", SPECS["loop"], dtype=torch.float32)
    batch = zoo.batch([6, 6])
    with torch.no_grad():
        assert torch.equal(dp.transform(stock, dp.Pad(0))(**batch).logits, stock(**batch).logits)
    model.save_pretrained(tmp_path)
    loaded = dp.from_pretrained(tmp_path)
    assert torch.equal(loaded.generate(**batch, max_new_tokens=3, do_sample=False),
                       model.generate(**batch, max_new_tokens=3, do_sample=False))
    assert "3 pads" in str(dp.report(loaded, seq_len=8)) or "pad 3" in str(loaded.depth_program)


def test_bad_input():
    stock, model, plain = transformed("llama", SPECS["stock"])
    ids = zoo.batch([4, 4])["input_ids"]
    with pytest.raises(dp.InputError, match="only a model with workspace pads"):
        plain(ids, prompt_length=2)
    for wrong in (0, 5, torch.tensor([2, 9]), [1, 1, 1]):
        with pytest.raises(dp.InputError, match="prompt_length: expected between 1 and"):
            model(ids, prompt_length=wrong)
    with pytest.raises(dp.InputError, match="prompt_length: expected an integer"):
        model(ids, prompt_length=2.5)
    cache = dp.DepthCache(model)
    model(ids, past_key_values=cache, use_cache=True)
    with pytest.raises(dp.InputError, match="an earlier call"):
        model(ids[:, :1], past_key_values=cache, prompt_length=2)
    with pytest.raises(dp.InputError, match="guidance_scale: without a cache"):
        model.generate(ids, attention_mask=torch.ones_like(ids), guidance_scale=1.5, use_cache=False, max_new_tokens=2)
    with pytest.raises(dp.InputError, match="prefill_chunk_size"):
        model.generate(ids, prefill_chunk_size=2, max_new_tokens=2)
    with pytest.raises(dp.SpecError, match=r"pad\.token: expected a token below the vocabulary's 97, got 97"):
        dp.transform(stock, dp.Pad(2, token=97))
    stock.config.pad_token_id = None
    with pytest.raises(dp.SpecError, match=r"pad\.token: expected a token whose embedding"):
        dp.transform(stock, dp.Pad(2))
    short = dp.transform(zoo.model("gpt2", 2, n_positions=8), dp.Pad(4))
    with pytest.raises(dp.InputError, match="reaches position 9 with its workspace pads"):
        short(zoo.batch([6, 6])["input_ids"])


def test_interpreter():
    toy = Toy(2, 7)
    text = (
        f"program M blocks=2 width={WIDTH}\n%e = embed\n{{}}%a = block 0 ({{}}) slot 0\n%b = block 1 (%a) slot 1\n{{}}"
        "output {}"
    )
    padded = verify(parse_program(text.format("%p = pad 2 (%e)\n", "%p", "%t = trim 2 (%b)\n", "%t")))
    plain = verify(parse_program(text.format("", "%e", "", "%b")))
    pad = torch.randn(WIDTH, dtype=torch.float64)
    got = Interpretation(padded, toy.embed, toy.stack, lambda x: x, pad=pad, prompt=4).output()
    embed = torch.cat((toy.embed[:4], pad.expand(2, -1), toy.embed[4:]))
    want = Interpretation(plain, embed, toy.stack, lambda x: x).output()
    torch.testing.assert_close(got, want[[0, 1, 2, 5, 6, 7, 8]])
