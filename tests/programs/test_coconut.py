"""Coconut on real models: equal to a loop that feeds the stock model's last state back, row by row, without a cache."""

import pytest
import torch
import zoo
from torch import nn
from turbos import enliven

import depthpass as dp
from depthpass.analysis.depth import depth
from depthpass.ir import parse_program, plain, verify
from depthpass.ir.interpret import Interpretation
from depthpass.passes import Context, apply_spec
from tests.passes.toy import WIDTH, Toy

K, BOT = 3, 7
PROMPTS, ANSWERS = [6, 3, 4], [2, 4, 3]
SPECS = {
    "stock": [],
    "loop": [dp.Loop(start=1, end=3, times=3, inject="add", damped=True)],
    "noise": [dp.Loop(start=1, end=3, times=2, inject="concat", state="noise")],
    "bridge": [dp.TurboConn(bridges=[(2, 0)], group=2, rank=4)],
    "plt": [dp.ParallelLoop(loops=2, window=2)],
    "exit": [dp.Loop(start=1, end=2, times=3, exit=0.6)],
}


def transformed(name, spec, dtype=torch.float64, **options):
    stock = enliven(zoo.model(name, 3, dtype=dtype), std=0.2)
    model, alone = dp.transform(stock, [*spec, dp.Coconut(K, **options)]), dp.transform(stock, spec or [dp.Identity()])
    for m in (model, alone):
        enliven(m.depth, seed=1, std=0.3, least=1)
    return stock, model, alone


def rows(side):
    """Rows of prompts, which end in BOT, and answers, padded on one side."""
    g = torch.Generator().manual_seed(3)
    texts = [torch.randint(8, zoo.VOCABULARY, (p + a,), generator=g) for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    width = max(map(len, texts))
    batch = {n: torch.full((3, width), x) for n, x in (("input_ids", 0), ("attention_mask", 0), ("labels", -100))}
    for r, text in enumerate(texts):
        text[PROMPTS[r] - 1] = BOT
        at = slice(width - len(text), width) if side == "left" else slice(0, len(text))
        batch["input_ids"][r, at], batch["attention_mask"][r, at] = text, 1
        batch["labels"][r, at.start + PROMPTS[r] : at.stop] = text[PROMPTS[r] :]
    return batch


def naive(alone, text, prompt, start):
    """Logits of one row: a whole forward per latent, each with one more embedding, as in the paper."""
    decoder, embed = alone.get_decoder(), alone.get_input_embeddings()

    def positions(x):
        return torch.arange(start, start + x.shape[1])[None]

    x = embed(text[None, :prompt])
    for _ in range(K):
        last = decoder(inputs_embeds=x, position_ids=positions(x), use_cache=False).last_hidden_state[:, -1:]
        x = torch.cat((x, last), 1)
    x = torch.cat((x, embed(text[None, prompt:])), 1)
    logits = alone(inputs_embeds=x, position_ids=positions(x), use_cache=False).logits[0]
    return logits[[*range(prompt - 1), *range(prompt + K - 1, len(text) + K)]]


def check(name, spec, side, **options):
    stock, model, alone = transformed(name, SPECS[spec], **options)
    batch = rows(side)
    out = model(**batch)
    assert out.logits.shape == (*batch["input_ids"].shape, zoo.VOCABULARY)
    # A run of one chunk is no token loop: it takes the stock graphs, and says so.
    levels = {(r.level, r.reason) for r in model.depth_lowered}
    assert spec != "bridge" or levels == {("scheduled", None), ("eager", "one chunk")}
    out.loss.backward()
    got = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(), stock.zero_grad(), alone.zero_grad()
    seen, targets = [], []
    for r, p in enumerate(PROMPTS):
        real = batch["attention_mask"][r].bool()
        text = batch["input_ids"][r, real]
        # A program that computes with positions numbers a row's own tokens.
        start = 0 if alone.depth_program.reads_positions else int(real.long().argmax())
        logits = naive(alone, text, p, start)
        torch.testing.assert_close(out.logits[r, real], logits, rtol=1e-8, atol=1e-8)
        seen.append(logits[p - 1 : -1])
        targets.append(text[p:])
    loss = nn.functional.cross_entropy(torch.cat(seen), torch.cat(targets))
    torch.testing.assert_close(out.loss.double(), loss, rtol=1e-6, atol=1e-6)
    loss.backward()
    want = {n: p.grad for n, p in alone.named_parameters() if p.grad is not None}
    assert got.keys() == want.keys()
    for n, g in want.items():
        assert (got[n] - g).abs().max() <= 1e-5 * g.abs().max() + 1e-12, n


@pytest.mark.parametrize(("name", "spec", "side"), [
    ("llama", "stock", "right"), ("llama", "loop", "left"), ("llama", "bridge", "right"),
    ("llama", "plt", "left"), ("llama", "exit", "right"), ("llama", "noise", "left"), ("gpt2", "loop", "right"),
    ("gemma3_text", "bridge", "left"), ("opt", "stock", "right"),
])
def test_outputs_loss_and_gradients(name, spec, side):
    check(name, spec, side)


def test_places():
    check("llama", "stock", "right", after=f"token:{BOT}")
    batch = rows("left")
    ids, real = batch["input_ids"], batch["attention_mask"].bool()
    stock, model, alone = transformed("llama", SPECS["bridge"], after=2)
    logits = model(ids, batch["attention_mask"]).logits
    for r in range(3):
        want = naive(alone, ids[r, real[r]], 2, int(real[r].long().argmax()))
        torch.testing.assert_close(logits[r, real[r]], want, rtol=1e-8, atol=1e-8)
    pads = dp.transform(stock, dp.Pad(K, token=5, after=2))
    row = ids[0, real[0]][None]
    written = torch.cat((row[:, :2], torch.full((1, K), 5), row[:, 2:]), 1)
    want = dp.transform(stock, dp.Identity())(written).logits[:, [0, *range(1 + K, row.shape[1] + K)]]
    torch.testing.assert_close(pads(row).logits, want, rtol=1e-9, atol=1e-9)
    # Packed rows: every sequence has its latents.
    texts = [ids[r, real[r]] for r in range(3)]
    packed = model(torch.cat(texts)[None], position_ids=torch.cat([torch.arange(len(t)) for t in texts])[None]).logits[0]
    alone_logits = torch.cat([model(t[None]).logits[0] for t in texts])
    torch.testing.assert_close(packed, alone_logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("name", "spec"), [("llama", "plt"), ("gpt2", "stock"), ("gemma3_text", "bridge")])
def test_generation(name, spec):
    _, model, alone = transformed(name, SPECS[spec])
    batch = zoo.batch([5, 3])
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    cached = model.generate(**batch, **options)
    assert torch.equal(cached[:, :5], batch["input_ids"])
    assert torch.equal(cached, model.generate(**batch, **options, use_cache=False))
    beams = model.generate(**batch, **options, num_beams=2)
    assert torch.equal(beams, model.generate(**batch, **options, num_beams=2, use_cache=False))
    for r, n in enumerate([5, 3]):
        text = batch["input_ids"][r, -n:]
        for _ in range(4):
            with torch.no_grad():
                text = torch.cat((text, naive(alone, text, n, 0)[-1].argmax()[None]))
        assert torch.equal(text[n:], cached[r, 5:])
    placed = dp.switch(model, [*(SPECS[spec] or [dp.Identity()]), dp.Coconut(K, after=2)])
    assert torch.equal(placed.generate(**batch, **options), placed.generate(**batch, **options, use_cache=False))


def test_rows_of_different_prompts_decode_from_one_cache():
    _, model, _ = transformed("llama", SPECS["plt"], after=f"token:{BOT}")
    batch = rows("left")
    whole = model(batch["input_ids"], batch["attention_mask"]).logits
    cache = dp.DepthCache(model)
    width = whole.shape[1] - 2
    first = model(batch["input_ids"][:, :width], batch["attention_mask"][:, :width], past_key_values=cache, use_cache=True).logits
    assert cache.get_seq_length() == width
    last = [model(batch["input_ids"][:, i, None], batch["attention_mask"][:, : i + 1], past_key_values=cache).logits
            for i in (width, width + 1)]
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(torch.cat((first, *last), 1)[real], whole[real], rtol=1e-9, atol=1e-9)


def test_only_latents_run_by_themselves():
    _, model, _ = transformed("llama", SPECS["stock"])
    seen = []
    handle = model.model.layers[0].register_forward_pre_hook(lambda m, args: seen.append(args[0].shape[1]))
    batch = rows("right")
    with pytest.warns(UserWarning, match="hooks on or in block 0 were called 5 times"):
        model(**batch, use_cache=False)
    handle.remove()
    assert seen == [6, *[1] * K, 5]
    states = model(**batch, output_hidden_states=True).hidden_states
    assert len(states) == 4 and states[0].shape == (*batch["input_ids"].shape, 32)


def test_no_latents_are_the_stock_model_and_saving_keeps_them(tmp_path):
    stock, model, _ = transformed("llama", SPECS["loop"], dtype=torch.float32)
    batch = zoo.batch([6, 6])
    with torch.no_grad():
        assert torch.equal(dp.transform(stock, dp.Coconut(0))(**batch).logits, stock(**batch).logits)
    model.save_pretrained(tmp_path)
    loaded = dp.from_pretrained(tmp_path)
    assert torch.equal(loaded.generate(**batch, max_new_tokens=3, do_sample=False),
                       model.generate(**batch, max_new_tokens=3, do_sample=False))
    assert dp.loops_of(dp.set_loops(model, 1, scope="coconut"), scope="coconut") == 1
    fewer = dp.transform(stock, [*SPECS["loop"], dp.Coconut(1)])
    fewer.depth.load_state_dict(model.depth.state_dict())
    assert torch.equal(model(**batch).logits, fewer(**batch).logits)


def longest(program, n, k):
    """Longest path to the last latent, by the definition alone: tokens are columns, edges are followed one by one."""
    memo = {}
    out = program.fed

    def at(name, i):
        if i < 0:
            return float("-inf")
        if (name, i) not in memo:
            o = program.defs[name]
            if o.kind == "pad":
                memo[name, i] = at(out, i - 1) if i >= n else 0
            elif o.kind == "delay":
                memo[name, i] = at(o.args[0], i - o["tokens"])
            else:
                memo[name, i] = max((at(a, i) for a in o.args), default=0)
                if o.kind == "block":
                    memo[name, i] = 1 + max(at(o.args[0], j) for j in range(i + 1))
        return memo[name, i]

    return at(out, n + k - 1)


@pytest.mark.parametrize("spec", [[], [dp.Loop(1, 3, times=2)], [dp.TurboConn(bridges=[(2, 0), (3, 1)], group=2, rank=2)],
                                  [dp.ParallelLoop(loops=3)]], ids=["stock", "loop", "bridge", "plt"])
def test_depth(spec):
    stock = plain("LlamaForCausalLM", 4, 16)
    program = apply_spec(stock, [*spec, dp.Coconut(K)], Context.of(stock))
    depths = depth(program)
    for n in range(1, 8):
        assert depths.at(n) == longest(program, n, K)
    if not spec:
        assert depths.at(6) == (K + 1) * 4
    assert len(depths.critical_path(5)) == depths.at(5)
    assert parse_program(str(program)) == program and "pad 3 (%0) feed true" in str(program)


def test_the_report_counts_latents_one_by_one():
    stock = zoo.model("llama", 4)
    for spec, calls in (([dp.Loop(1, 3, times=2)], 6 * (1 + K)), ([dp.TurboConn(bridges=[(2, 0)], group=4, rank=2)],
                                                                 4 + 4 * K + 2 * 2)):
        model = dp.transform(stock, [*spec, dp.Coconut(K)])
        report = dp.report(model, seq_len=10)
        assert report.serial_block_calls == calls
        assert report.depth_at(10) == longest(model.depth_program, 10, K)
        assert "latents" in report.to_text() and f"{calls} block calls" in report.to_text()


def test_interpreter():
    toy = Toy(2, 6)
    text = (f"program M blocks=2 width={WIDTH}\n%e = embed\n%p = pad 2 (%e) feed true\n%a = block 0 (%p) slot 0\n"
            "%b = block 1 (%a) slot 1\n%t = trim 2 (%b)\noutput %t")
    got = Interpretation(verify(parse_program(text)), toy.embed, toy.stack, lambda x: x, prompt=4).output()
    bare = verify(parse_program(text.replace("%p = pad 2 (%e) feed true\n", "").replace("(%p)", "(%e)")
                                .replace("%t = trim 2 (%b)\n", "").replace("output %t", "output %b")))
    embed = toy.embed[:4]
    for _ in range(2):
        embed = torch.cat((embed, Interpretation(bare, embed, toy.stack, lambda x: x).output()[-1:]))
    want = Interpretation(bare, torch.cat((embed, toy.embed[4:])), toy.stack, lambda x: x).output()
    torch.testing.assert_close(got, want[[0, 1, 2, 5, 6, 7]])


@pytest.mark.parametrize(("spec", "given", "said"), [
    (dp.Coconut(2, after=4), {}, "at least 4 real tokens, got 3 in row 1"),
    (dp.Coconut(2, after="token:96"), {}, "expected the token 96 in every row, got none in row 0"),
    (dp.Coconut(2), {"prompt_length": [3, 4]}, r"real tokens \[5, 3\], got \[3, 4\]"),
    (dp.Coconut(2), {"labels": torch.full((2, 5), 9)}, "row 0 has a label at its first token"),
    (dp.Coconut(125), {}, "reaches position 129 with its workspace pads, but the model's position table has 128 entries"),
    (dp.Pad(2, token=5, after=4), {}, "at least 4 real tokens, got 3 in row 1"),
    (dp.Coconut(2, after=5), {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])},
     "at least 5 real tokens, got 4 in row 1"),
])
def test_rows_without_a_place_are_refused_before_anything_runs(spec, given, said, monkeypatch):
    batch = zoo.batch([5, 3])
    if "position_ids" in given:  # two sequences packed into a row
        batch = {"input_ids": batch["input_ids"].clamp_min(3).view(1, -1)}
    model = dp.transform(zoo.model("gpt2", 2), spec)

    def nothing(*args, **kwargs):
        pytest.fail("something ran")

    monkeypatch.setattr(type(model), "_captured", nothing)
    monkeypatch.setattr(nn.Embedding, "forward", nothing)
    with pytest.raises(dp.InputError, match=said):
        model(**batch, **given)


def test_bad_input():
    stock, model, _ = transformed("llama", SPECS["stock"], after=4)
    ids = zoo.batch([5, 3], side="right")
    with pytest.raises(dp.InputError, match=r"coconut\.after: expected rows of at least 4 real tokens, got 3 in row 1"):
        model(**ids)
    with pytest.raises(dp.InputError, match=r"coconut\.after: expected rows of at least 4 real tokens, got 2 in row 0"):
        model.generate(ids["input_ids"][:, :2], max_new_tokens=2)
    missing = dp.transform(stock, dp.Coconut(2, after="token:90"))
    with pytest.raises(dp.InputError, match="expected the token 90 in every row, got none in row 0"):
        missing(ids["input_ids"])
    with pytest.raises(dp.InputError, match="got inputs_embeds"):
        missing(inputs_embeds=stock.get_input_embeddings()(ids["input_ids"]))
    with pytest.raises(dp.SpecError, match=r"coconut\.after: expected a token below the vocabulary's 97"):
        dp.transform(stock, dp.Coconut(2, after="token:97"))
    for wrong in ("bot", "token:", 0, -3):
        with pytest.raises(dp.SpecError, match=r"coconut\.after"):
            dp.Coconut(2, after=wrong)
    with pytest.raises(dp.SpecError, match=r"coconut\.latents: expected at least 0"):
        dp.Coconut(-1)
    with pytest.raises(dp.PassError, match="one pass that inserts them"):
        dp.transform(stock, [dp.Pad(2, token=5), dp.Coconut(2)])
    with pytest.raises(dp.VerifyError, match="depends on later tokens"):
        dp.transform(stock, [dp.MixtureOfDepths(mode="topk"), dp.Coconut(2)])
    with pytest.raises(dp.VerifyError, match="where a call begins"):
        dp.transform(stock, [dp.Loop(1, 3, times=2, kv="last"), dp.Coconut(2)])
    by_length = dp.transform(stock, [dp.Loop(1, 3, times="ceil(log2(n))"), dp.Coconut(2)])
    with pytest.raises(dp.InputError, match="does not follow the length"):
        by_length(ids["input_ids"])
