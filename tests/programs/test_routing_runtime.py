"""Ratios at run time, training callbacks, statistics, KV memory and decoding of routed programs."""

import pytest
import torch
import zoo
from transformers import Trainer, TrainingArguments
from turbos import enliven

import depthpass as dp

LENGTHS = [9, 6]
pytestmark = pytest.mark.usefixtures("one_capture")


def transformed(spec, name="llama", layers=3, dtype=torch.float64):
    stock = enliven(zoo.model(name, layers, dtype=dtype), std=0.2)
    model = dp.transform(stock, spec).eval()
    enliven(model.depth, seed=1, std=0.4, least=1)
    return stock, model


def logits(model, batch):
    with torch.no_grad():
        return model(**batch, use_cache=False).logits[batch["attention_mask"].bool()]


def copied(source, stock, spec):
    """Another program on the same weights."""
    other = dp.transform(stock, spec).eval()
    other.depth.load_state_dict(source.depth.state_dict())
    return other


def test_ratios_act_without_a_new_trace_and_equal_a_program_with_them():
    stock, model = transformed(dp.InnerThinking(steps=4, ratios=[0.5, 0.5, 0.5]))
    batch = zoo.batch(LENGTHS, "left")
    before = logits(model, batch)
    traces = len(model._depth.captures)
    for ratios in ([0.9, 0.3, 1.0], [1.0, 1.0, 1.0]):
        dp.set_ratios(model, ratios)
        want = logits(copied(model, stock, dp.InnerThinking(steps=4, ratios=ratios)), batch)
        torch.testing.assert_close(logits(model, batch), want, rtol=1e-12, atol=1e-12)
    assert len(model._depth.captures) == traces == 1
    dp.set_ratios(model, None)
    assert torch.equal(logits(model, batch), before)


@pytest.mark.parametrize("mode", ["topk", "threshold"])
def test_a_dropped_step_is_a_step_whose_encoding_is_zero(mode):
    _, model = transformed(dp.InnerThinking(steps=3, mode=mode, blocks=[1]))
    batch = zoo.batch(LENGTHS)
    dp.set_ratios(model, {"itt.t1": 0})
    got = logits(model, batch)
    ids = batch["input_ids"]
    if mode == "threshold":
        assert model.generate(**batch, max_new_tokens=3, do_sample=False).shape == (2, ids.shape[1] + 3)
    dp.set_ratios(model, None)
    with torch.no_grad():
        model.depth.itt.v1.phi1.weight.zero_()
    torch.testing.assert_close(logits(model, batch), got, rtol=1e-12, atol=1e-12)


def test_dropped_recursions():
    stock, model = transformed(dp.MixtureOfRecursions(start=1, recursions=3, mode="threshold"))
    batch = zoo.batch(LENGTHS)
    dp.set_ratios(model, {"mor.r3": 0})
    two = dp.transform(stock, dp.MixtureOfRecursions(start=1, recursions=2, mode="threshold")).eval()
    two.depth.load_state_dict({k: v for k, v in model.depth.state_dict().items() if "r3" not in k})
    torch.testing.assert_close(logits(model, batch), logits(two, batch), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("spec", "ratios", "message"),
    [
        (dp.InnerThinking(steps=3), [0.5], "expected 2 shares, for itt.t1, itt.t2, got [0.5]"),
        (dp.InnerThinking(steps=3), {"itt.t9": 0.5}, "unknown label 'itt.t9'. Did you mean"),
        (dp.InnerThinking(steps=3), {"itt.t1": 1.5}, "ratios['itt.t1']: expected a share between 0 and 1, got 1.5"),
        (dp.InnerThinking(steps=3, mode="threshold"), {"itt.t1": 0.5}, "expected 0 (drop the step) or 1"),
        (dp.MixtureOfRecursions(start=1), {"mor.r2": 0.2}, "shares do not grow"),
        (dp.Loop(times=2), [0.5], "expected a program with labelled routes"),
    ],
)
def test_bad_ratios_change_nothing(spec, ratios, message):
    model = dp.transform(zoo.model("llama", 3), spec)
    with pytest.raises(dp.DepthpassError) as error:
        dp.set_ratios(model, ratios)
    assert message in str(error.value)
    assert model._depth.ratios == {}
    with pytest.raises(dp.SpecError, match="expected a transformed model"):
        dp.set_ratios(zoo.model("llama", 2), [0.5])


def test_capacities_warm_up_in_a_trainer(tmp_path):
    model = dp.transform(zoo.model("llama", 3), dp.MixtureOfRecursions(start=1, taps=True))
    seen = []
    model.register_forward_hook(lambda m, args, out: seen.append(float(out.taps["mor.r3.taken"].float().mean())))
    data = [{"input_ids": row, "labels": row} for row in torch.randint(3, 90, (5, 12))]
    Trainer(
        model=model, train_dataset=data, callbacks=[dp.CapacityWarmup(4)],
        args=TrainingArguments(str(tmp_path), per_device_train_batch_size=1, max_steps=5, report_to=[], use_cpu=True,
                               save_strategy="no", disable_tqdm=True),
    ).train()
    # Half a cosine from 1 to 1/3: 1, 0.902, 0.667, 0.431, 0.333 of 12 tokens.
    assert seen == pytest.approx([12 / 12, 10 / 12, 8 / 12, 5 / 12, 4 / 12])
    for bad in (-0.1, 1.5):
        with pytest.raises(dp.InputError, match="between 0 and 1"):
            dp.capacity_warmup(model, bad)
    with pytest.raises(dp.InputError, match="at least 1"):
        dp.CapacityWarmup(0)


def test_statistics_and_picture(tmp_path):
    _, model = transformed(dp.MixtureOfRecursions(start=1, mode="threshold", taps=True))
    batch = zoo.batch(LENGTHS, "left")
    with torch.no_grad():
        out = model(**batch)
    routing = dp.routing_of(model, out, batch["attention_mask"])
    ran = {name: out.taps[f"{name}.taken"] for name in ("mor.r1", "mor.r2", "mor.r3")}
    active = torch.ones(2, 9, dtype=torch.bool)
    depth = torch.full((2, 9), 2)
    for r in (1, 2, 3):
        active = active & (torch.sigmoid(out.taps[f"mor.r{r}"][..., 0]) >= 0.5) & batch["attention_mask"].bool()
        assert torch.equal(ran[f"mor.r{r}"], active)
        assert routing.share[f"mor.r{r}"] == pytest.approx(float(active.sum()) / 15)
        depth = depth + active
    assert torch.equal(routing.depth, torch.where(routing.valid, depth, 0))
    words = [[f"<w{i}>" for i in range(9)] for _ in range(2)]
    picture = dp.plot_depth(words, routing, title="a & b")
    html = picture._repr_html_()
    assert html.count("&lt;w8&gt;") == 2 and html.count("&lt;w0&gt;") == 1 and "a &amp; b" in html
    picture.save(tmp_path / "depth.html")
    assert "<script" not in (tmp_path / "depth.html").read_text() and "http" not in (tmp_path / "depth.html").read_text()
    with pytest.raises(dp.InputError, match="rows of"):
        dp.plot_depth([["a"]], routing)
    plain = dp.transform(zoo.model("llama", 3), dp.MixtureOfRecursions(start=1))
    with pytest.raises(dp.InputError, match="taps=True"):
        dp.routing_of(plain, plain(**batch))


SYSTEMS = {
    "own": dp.MixtureOfRecursions(start=1, capacity=(0.9, 0.5, 0.3)),
    "defaults": dp.MixtureOfRecursions(start=1),
    "shared": dp.MixtureOfRecursions(start=1, kv="shared"),
    "itt": dp.InnerThinking(steps=3, ratios=(0.5, 0.3)),
    "itt, routed keys": dp.InnerThinking(steps=3, ratios=(0.5, 0.3), keys="routed"),
    "mod": dp.MixtureOfDepths(capacity=0.3),
}


@pytest.mark.parametrize("system", SYSTEMS)
def test_kv_memory_is_what_the_report_says(system):
    _, model = transformed(SYSTEMS[system], dtype=torch.float32)
    for tokens, batch in ((13, 2), (9, 3)):
        cache = dp.DepthCache(model)
        with torch.no_grad():
            model(input_ids=torch.randint(3, 90, (batch, tokens)), past_key_values=cache)
        report = dp.report(model, seq_len=tokens, batch=batch)
        assert cache.state.nbytes()[0] == report.kv_bytes
        assert report.number("causal").value == "no"


def test_kv_memory_of_thresholds_at_the_shares_that_came_out():
    _, model = transformed(dp.MixtureOfRecursions(start=1, mode="threshold", taps=True), dtype=torch.float32)
    cache = dp.DepthCache(model)
    with torch.no_grad():
        out = model(input_ids=torch.randint(3, 90, (1, 20)), past_key_values=cache)
    shares = dp.routing_of(model, out).share
    report = dp.report(model, seq_len=20, batch=1, ratios=shares)
    assert cache.state.nbytes()[0] == report.kv_bytes
    assert report.number("token_visits_expected").value == pytest.approx(2 + sum(shares.values()))
    assert report.number("causal").value == "yes"
    assert [report.number(k).value for k in ("depth_min_at_n", "depth_max_at_n", "token_visits_min", "token_visits_max")] == [
        2, 5, 2, 5
    ]


def test_report_follows_the_ratios_that_are_set():
    _, model = transformed(dp.InnerThinking(steps=3, ratios=(0.5, 0.5), blocks=[1]), dtype=torch.float32)
    whole = dp.report(model, seq_len=16)
    dp.set_ratios(model, {"itt.t1": 0, "itt.t2": 0.25})
    less = dp.report(model, seq_len=16)
    assert whole.number("token_visits_expected").value == 4 and less.number("token_visits_expected").value == 3.25
    assert less.cost.at("FLOPs forward", 16) < whole.cost.at("FLOPs forward", 16)
    cache = dp.DepthCache(model)
    with torch.no_grad():
        model(input_ids=torch.randint(3, 90, (1, 16)), past_key_values=cache)
    assert cache.state.nbytes()[0] == less.kv_bytes


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "mixtral"])
@pytest.mark.parametrize(
    "spec",
    [
        dp.MixtureOfRecursions(start=1, router="token"), dp.MixtureOfRecursions(start=1, router="token", kv="shared"),
        dp.MixtureOfRecursions(start=1, mode="threshold"), dp.InnerThinking(steps=3, mode="threshold"),
        dp.InnerThinking(steps=3, mode="threshold", keys="routed"), dp.MixtureOfDepths(mode="threshold"),
    ],
    ids=lambda s: s.label,
)
def test_decoding_equals_teacher_forcing(name, spec):
    """Left padded rows in pieces of several sizes, and the cache of an earlier step continued twice."""
    _, model = transformed(spec, name)
    batch = zoo.batch(LENGTHS, "left")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        want = model(**batch, use_cache=False).logits
        cache = dp.DepthCache(model)
        for first, last in ((0, 5), (5, 6), (6, 7), (7, 9)):
            if first == 7:
                held = cache.state
            got = model(input_ids=ids[:, first:last], attention_mask=mask[:, :last], past_key_values=cache).logits
            real = mask[:, first:last].bool()
            torch.testing.assert_close(got[real], want[:, first:last][real], rtol=1e-9, atol=1e-9)
        for _ in range(2):
            cache.state = held
            for i in (7, 8):
                got = model(input_ids=ids[:, i : i + 1], attention_mask=mask[:, : i + 1], past_key_values=cache).logits
                torch.testing.assert_close(got[:, 0], want[:, i], rtol=1e-9, atol=1e-9)


def test_only_routed_tokens_pay_for_queries_and_mlp():
    _, model = transformed(dp.InnerThinking(steps=2, ratios=(0.5,), blocks=[1]))
    sizes = []
    attention = model.model.layers[1].self_attn
    for matrix in (attention.q_proj, attention.k_proj, model.model.layers[1].mlp.up_proj):
        matrix.weight.data = matrix.weight.data.clone()
    up = model.model.layers[1].mlp.up_proj.weight
    seen = {id(attention.q_proj.weight): "q", id(attention.k_proj.weight): "k", id(up): "up"}

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, fn, types, args=(), kwargs=None):
            for a in args:
                if isinstance(a, torch.Tensor) and a._is_view() and id(a._base) in seen and fn is torch.ops.aten.mm.default:
                    sizes.append((seen[id(a._base)], args[0].shape[0]))
            return fn(*args, **(kwargs or {}))

    ids = torch.randint(3, 90, (2, 12))
    with torch.no_grad(), Spy():
        model(input_ids=ids, use_cache=False)
    assert sorted(sizes) == [("k", 24), ("k", 24), ("q", 12), ("q", 24), ("up", 12), ("up", 24)]
