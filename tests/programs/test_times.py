"""Loop counts that vary on real models: drawn in training, per row by its length, gradients cut off."""

import oracle_program as oracle
import pytest
import torch
import zoo
from turbos import enliven

import depthpass as dp

LENGTHS = [9, 3, 5]  # ceil(log2(n)) = 4, 2, 3
LOG = "ceil(log2(n))"


def transformed(name, spec, layers=3, dtype=torch.float64):
    stock = enliven(zoo.model(name, layers, dtype=dtype), std=0.2)
    model = dp.transform(stock, spec)
    enliven(model.depth, seed=1, std=0.3, least=1)
    return stock, model


def test_a_range_is_drawn_in_training_and_fixed_in_evaluation():
    stock, model = transformed("llama", dp.Loop(1, 2, times=(1, 7), inject="add"))
    batch = zoo.batch([7, 7])
    fixed = {t: dp.transform(stock, dp.Loop(1, 2, times=t, inject="add"))(**batch).logits for t in range(1, 8)}
    torch.testing.assert_close(model(**batch).logits, fixed[4], rtol=0, atol=0)
    assert len(model.depth_program.visits) == 6
    model.train()
    seen = []
    for seed in range(12):
        torch.manual_seed(seed)
        got = model(**batch).logits
        (t,) = [t for t, want in fixed.items() if torch.equal(got, want)]
        assert [(len(p.visits), rows) for p, rows in model.depth_ran] == [(2 + t, 2)]
        seen.append(t)
        torch.manual_seed(seed)
        assert torch.equal(model(**batch).logits, got)
    assert len(set(seen)) > 2
    torch.testing.assert_close(model.eval()(**batch).logits, fixed[4], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_every_row_has_the_loops_of_its_own_length(name, side):
    stock, model = transformed(name, dp.Loop(1, 2, times=LOG, inject="concat"))

    def want(row, p):
        adapter = (p["loop.inject.weight"], p["loop.inject.bias"])
        times = {9: 4, 3: 2, 5: 3}[row.tokens]
        return oracle.loop(row, 1, 2, times, inject="concat", adapter=adapter)[-1]

    oracle.compare(stock, model, zoo.batch(LENGTHS, side), want)


def test_rows_of_different_counts_share_one_loss_and_no_cache():
    _, model = transformed("llama", dp.Loop(1, 3, times=LOG))
    batch = zoo.batch(LENGTHS)
    assert model(**batch).past_key_values is None
    for more in ({"use_cache": True}, {"past_key_values": dp.DepthCache(model)}):
        with pytest.raises(dp.InputError, match=r"different loop counts \(9, 5, 7 visits\)"):
            model(**batch, **more)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    loss = model(**batch, labels=labels).loss
    logits = model(**batch).logits[:, :-1]
    torch.testing.assert_close(
        loss, torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100))
    cache = dp.DepthCache(model)
    ids = batch["input_ids"][:1]
    with torch.no_grad():
        model(input_ids=ids[:, :5], past_key_values=cache)
        step = model(input_ids=ids[:, 5:8], past_key_values=cache).logits
        torch.testing.assert_close(step, model(input_ids=ids[:, :8]).logits[:, 5:], rtol=1e-9, atol=1e-9)
        with pytest.raises(dp.CacheError, match=r"8 tokens of another program .*follows the row's tokens"):
            model(input_ids=ids[:, 8:], past_key_values=cache)


def test_generation_with_a_cache_where_the_count_stays_and_without_one_elsewhere():
    stock, model = transformed("llama", dp.Loop(1, 2, times=LOG), dtype=torch.float32)
    batch = zoo.batch([6, 5])
    settings = {"do_sample": False, "eos_token_id": None}
    cached = model.generate(**batch, max_new_tokens=2, **settings)
    assert torch.equal(cached, model.generate(**batch, max_new_tokens=2, use_cache=False, **settings))
    with dp.using(model, dp.Loop(1, 2, times=3)):
        assert torch.equal(cached, model.generate(**batch, max_new_tokens=2, **settings))
    with pytest.raises(dp.InputError, match=r"this call has 5 to 11, and changes at 9.*use_cache=False"):
        model.generate(**batch, max_new_tokens=6, **settings)
    far = model.generate(**batch, max_new_tokens=6, use_cache=False, **settings)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    for _ in range(6):
        rows = []
        for row, real in zip(ids, mask):
            alone = dp.transform(stock, dp.Loop(1, 2, times=max(1, (int(real.sum()) - 1).bit_length())))
            columns = torch.arange(len(row))[real.bool()][None]
            rows.append(alone(input_ids=row[None, real.bool()], position_ids=columns, use_cache=False).logits[:, -1].argmax(-1))
        ids, mask = torch.cat((ids, torch.stack(rows)), 1), torch.nn.functional.pad(mask, (0, 1), value=1)
    assert torch.equal(far, ids)


@pytest.mark.parametrize("length", [{"max_new_tokens": 3}, {"max_length": 10}, {"max_new_tokens": 3, "num_beams": 2}])
def test_generation_without_padding_is_refused_at_the_start(length):
    """``generate`` drops a mask of ones, and hands neither it nor the ids to what prepares the cache."""
    stock, model = transformed("llama", dp.Loop(1, 3, times=LOG), dtype=torch.float32)
    ids = zoo.batch([7, 7])["input_ids"]
    ran = []
    model.model.layers[0].register_forward_pre_hook(lambda *args: ran.append(1))
    settings = {"do_sample": False, "eos_token_id": None}
    for prompt in ({"inputs": ids}, {"inputs": ids, "attention_mask": torch.ones_like(ids)},
                   {"inputs_embeds": model.get_input_embeddings()(ids)}):
        if "inputs_embeds" in prompt and "max_length" in length:
            continue
        with pytest.raises(dp.InputError, match=r"this call has 7 to 9, and changes at 9"):
            model.generate(**prompt, **length, **settings)
        assert not ran
    # One token less: the ninth is generated, and never run.
    got = model.generate(ids, max_new_tokens=2, **settings)
    assert torch.equal(got, dp.transform(stock, dp.Loop(1, 3, times=3)).generate(ids, max_new_tokens=2, **settings))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_truncated_backpropagation(name):
    stock, model = transformed(name, dp.Loop(1, 2, times=4, inject="add", state="zeros", bptt=2))
    oracle.compare(stock, model, zoo.batch([6, 4]),
                   lambda row, p: oracle.loop(row, 1, 2, 4, inject="add", state="zeros", bptt=2)[-1])
    whole = dp.transform(stock, dp.Loop(1, 2, times=4, inject="add", state="zeros"))
    batch = zoo.batch([6, 6])
    assert torch.equal(whole(**batch).logits, model(**batch).logits)
    seen = []
    for m in (whole, model):
        stock.zero_grad()
        m(**batch).logits.square().sum().backward()
        seen.append(next(p.grad.clone() for n, p in stock.named_parameters() if "norm" in n or "ln_1" in n))
    assert not torch.allclose(*seen)


def test_what_is_cut_off_is_not_recorded():
    stock, _ = transformed("llama", dp.Identity())
    batch = zoo.batch([6, 6])

    def saved(times, bptt):
        model = dp.set_loops(dp.transform(stock, dp.Loop(1, 2, times=2, inject="add", bptt=bptt)), times)
        count = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: count.append(1) or t, lambda t: t):
            model(**batch)
        return len(count)

    assert saved(12, 2) == saved(3, 2) < saved(3, None) < saved(12, None)


def test_reports_follow_n():
    model = dp.transform(zoo.model("llama", 4), dp.Loop(1, 3, times="ceil(2*log2(n)**1)"))
    report = dp.report(model, seq_len=17)
    assert [report.depth_at(n) for n in (1, 2, 17, 100)] == [4, 6, 20, 30] and report.visits == 20
    assert report.depth.subs("n", 5) != 0 and "log" in str(report.depth)
    assert any("TC^1" in s.claim or "AC^1" in s.claim for s in report.complexity)
    assert "ceil(2*log2(n)**1), at least 1" in str(report) and "KV cache" in str(report)
    drawn = dp.report(zoo.model("llama", 4), dp.Loop(1, 3, times=(1, 9), bptt=2), seq_len=17)
    assert drawn.depth_at(17) == 12 and "drawn from 1..9 in training, 5 in evaluation" in str(drawn)
    whole = dp.report(zoo.model("llama", 4), dp.Loop(1, 3, times=5), seq_len=17)
    cut, full = (r.cost.at("FLOPs backward", 17) for r in (drawn, whole))
    head = 2 * 2 * 17 * 32 * zoo.VOCABULARY
    assert (cut - head) / (full - head) == pytest.approx(5 / 12)


def test_save_load_and_peft_keep_the_range(tmp_path):
    stock, model = transformed("llama", dp.Loop(1, 2, times=(1, 4), lora_rank=2), dtype=torch.float32)
    assert {n.split(".")[1] for n, _ in model.depth.named_parameters()} == {"t0", "t1", "t2", "t3"}
    model.save_pretrained(tmp_path)
    loaded = dp.from_pretrained(tmp_path)
    assert loaded.depth_spec == model.depth_spec
    batch = zoo.batch([5, 5])
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)
        torch.manual_seed(3)
        want = model.train()(**batch).logits
        torch.manual_seed(3)
        assert torch.equal(loaded.train()(**batch).logits, want)
    with pytest.raises(dp.SpecError, match=r"new parameters loop\.t4"):
        dp.set_loops(model, (1, 5))
    with pytest.raises(dp.SpecError, match="expected a fixed loop count"):
        dp.attach(stock, dp.Loop(1, 2, times=(1, 4)))
