"""Arguments of a call: each means what it means to the stock model, or is refused by name."""

import pytest
import torch
import zoo
from transformers import (
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from turbos import GROUP, enliven, pair, spec, stock_of, turbo_of

import depthpass as dp
from depthpass.errors import CacheError, InputError

NAMES = ["llama", "gpt2", "gemma3_text", "opt", "mixtral"]
pytestmark = pytest.mark.usefixtures("one_capture")


@pytest.fixture(params=NAMES)
def same(request):
    """A stock model and its identity transform: what stock does with an argument, bit for bit."""
    stock = pair(request.param)[0]
    return stock, dp.transform(stock, dp.Identity())


@pytest.fixture
def llama():
    return pair("llama")[1]


def equal(got, want, real=None):
    for key in want.keys() - {zoo.CACHE}:
        a, b = (x if real is None or key != "logits" else x[real] for x in (got[key], want[key]))
        assert torch.equal(a, b), key
    assert got.keys() == want.keys()


def test_labels(same):
    stock, turbo = same
    batch = zoo.batch([8, 5, 6])
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for more in ({}, {"num_items_in_batch": 13}, {"num_items_in_batch": torch.tensor(5)}):
        with torch.no_grad():
            got, want = (m(**batch, labels=labels, **more) for m in same)
        assert torch.equal(got.loss, want.loss) and got.loss > 1
    with torch.no_grad():
        parts = turbo(**batch, labels=labels, return_dict=False, use_cache=False)
    assert isinstance(parts, tuple) and len(parts) == 2 and torch.equal(parts[1], got.logits)
    assert stock(**batch, labels=labels, use_cache=False, return_dict=False)[1].shape == parts[1].shape


def test_labels_are_not_cut(llama):
    batch = zoo.batch([8, 8])
    with pytest.raises(InputError, match="logits_to_keep: cannot be combined with labels"):
        llama(**batch, labels=batch["input_ids"], logits_to_keep=2)


@pytest.mark.parametrize("keep", [1, 3, 0, torch.tensor([0, 4, 5]), torch.tensor([7])], ids=str)
def test_logits_to_keep(same, keep):
    with torch.no_grad():
        got, want = (m(**zoo.batch([8, 8]), logits_to_keep=keep).logits for m in same)
    assert torch.equal(got, want) and got.shape[1] == (8 if isinstance(keep, int) and not keep else want.shape[1])


def test_inputs_embeds(same):
    stock, turbo = same
    batch = zoo.batch([8, 5])
    embeds = stock.get_input_embeddings()(batch["input_ids"]).detach()
    with torch.no_grad():
        got, want = (m(inputs_embeds=embeds, attention_mask=batch["attention_mask"]) for m in same)
    equal(got, want, batch["attention_mask"].bool())
    leaf = embeds.clone().requires_grad_()
    turbo(inputs_embeds=leaf).logits.square().mean().backward()
    assert leaf.grad.abs().sum() > 0
    turbo.zero_grad()


def test_position_ids(same):
    batch = zoo.batch([8, 5, 7])
    mask = batch["attention_mask"]
    compact = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        got, want = (m(**batch, position_ids=compact) for m in same)
        equal(got, want, mask.bool())
        ids = batch["input_ids"]
        for positions in (torch.arange(8)[None], torch.arange(8)[None] + 5, torch.arange(8).expand(3, -1)):
            got, want = (m(input_ids=ids, position_ids=positions) for m in same)
            equal(got, want)


def test_positions_reach_every_chunk(llama):
    ids = zoo.batch([8, 8])["input_ids"]
    with torch.no_grad():
        plain, moved = llama(input_ids=ids).logits, llama(input_ids=ids, position_ids=torch.arange(8)[None] + 9).logits
        torch.testing.assert_close(moved, plain, rtol=1e-3, atol=1e-3)  # rotary positions are relative
        # An attention mask says that gaps are meant, and no packing.
        gaps = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": torch.arange(0, 16, 2)[None]}
        far = llama(**gaps).logits
        cache, steps = dp.DepthCache(llama), []
        for i in range(8):
            steps.append(llama(
                input_ids=ids[:, i : i + 1], position_ids=torch.tensor([[2 * i]]), past_key_values=cache
            ).logits)
    assert (far - plain).abs().max() > 1e-2
    torch.testing.assert_close(torch.cat(steps, 1), far, rtol=1e-4, atol=1e-4)


def test_masks_of_every_number_type(same):
    batch = zoo.batch([8, 5])
    want = same[1](**batch).logits
    for dtype in (torch.bool, torch.int32, torch.float32):
        got = same[1](input_ids=batch["input_ids"], attention_mask=batch["attention_mask"].to(dtype)).logits
        assert torch.equal(got, want)


def test_positional_arguments(same):
    batch = zoo.batch([8, 5])
    if same[0].config.model_type == "gpt2":  # its second argument is the cache
        got = same[1](batch["input_ids"], None, batch["attention_mask"])
    else:
        got = same[1](batch["input_ids"], batch["attention_mask"])
    assert torch.equal(got.logits, same[1](**batch).logits)


def test_cache_or_not(llama):
    batch = zoo.batch([5])
    assert isinstance(llama(**batch).past_key_values, dp.DepthCache)
    assert llama(**batch).past_key_values.get_seq_length() == 5
    assert llama(**batch, use_cache=False).past_key_values is None
    cache = dp.DepthCache(llama)
    out = llama(**batch, past_key_values=cache)
    assert out.past_key_values is cache and cache.get_seq_length() == 5
    first = llama(**batch).past_key_values
    second = llama(**batch).past_key_values
    assert first is not second and first.state is not second.state


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_cache_has_two_names(kind, name):
    turbo, ids, cache = pair(kind)[1], zoo.batch([7, 7])["input_ids"], dp.DepthCache(pair(kind)[1])
    with torch.no_grad():
        out = turbo(input_ids=ids[:, :4], **{name: cache})
        assert out[zoo.CACHE] is getattr(out, zoo.CACHE) is out.past_key_values is cache and out.to_tuple()[-1] is cache
        got = turbo(input_ids=ids[:, 4:], **{name: cache}).logits
        torch.testing.assert_close(got, turbo(input_ids=ids).logits[:, 4:], rtol=1e-4, atol=1e-4)
    for given, message in (
        (((ids, ids),), "expected a DepthCache made for this model, got tuple"),
        (dp.DepthCache(turbo_of(pair(kind)[0])), "this DepthCache belongs to another model"),
        (cache, "holds 2 rows, the call has 1"),
    ):
        with pytest.raises(CacheError, match=f"^{name}: {message}"):
            turbo(input_ids=ids[:1], **{name: given})
    with dp.using(turbo, dp.Identity()), pytest.raises(CacheError, match=f"^{name}: .* of another program"):
        turbo(input_ids=ids, **{name: cache})


def test_two_caches_are_refused(llama):
    ids, one, two = zoo.batch([5])["input_ids"], dp.DepthCache(llama), dp.DepthCache(llama)
    for call in (llama, llama.generate):
        with pytest.raises(InputError, match="past_key_values and cache: expected one cache, got two"):
            call(input_ids=ids, past_key_values=one, cache=two)
    assert one.get_seq_length() == two.get_seq_length() == 0
    llama(input_ids=ids, past_key_values=one, cache=one)
    llama(input_ids=ids, past_key_values=None, cache=two)
    assert one.get_seq_length() == two.get_seq_length() == 5


@pytest.mark.parametrize("auto", [AutoModelForSequenceClassification, AutoModelForTokenClassification])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_classification_heads(auto, name):
    torch.manual_seed(0)
    stock = enliven(auto.from_config(zoo.config(name, 3, num_labels=3)).eval())
    batch = zoo.batch([8, 5, 7], "right" if auto is AutoModelForSequenceClassification else "left")
    labels = torch.tensor([0, 2, 1])
    if auto is AutoModelForTokenClassification:
        labels = batch["input_ids"].remainder(3).masked_fill(batch["attention_mask"] == 0, -100)
    real = batch["attention_mask"].bool() if auto is AutoModelForTokenClassification else slice(None)
    same, turbo = dp.transform(stock, dp.Identity()), turbo_of(stock)
    assert isinstance(turbo, type(stock))
    with torch.no_grad():
        got, want = (m(**batch, labels=labels) for m in (same, stock))
        assert torch.equal(got.logits[real], want.logits[real])
        torch.testing.assert_close(got.loss, want.loss)
        assert got.keys() == want.keys()
        moved = turbo(**batch, labels=labels)
    assert (moved.logits - want.logits)[real].abs().max() > 1e-2
    turbo(**batch, labels=labels).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in dp.new_parameters(turbo))


def test_a_question_answering_head():
    torch.manual_seed(0)
    stock = enliven(AutoModelForQuestionAnswering.from_config(zoo.config("llama", 3)).eval())
    same = dp.transform(stock, dp.Identity())
    batch = zoo.batch([8, 8])
    places = {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])}
    with torch.no_grad():
        got, want = same(**batch, **places), stock(**batch, **places)
    equal(got, want)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_a_model_without_a_head(name):
    torch.manual_seed(0)
    stock = enliven(AutoModel.from_config(zoo.config(name, 3)).eval())
    same, turbo = dp.transform(stock, dp.Identity()), turbo_of(stock)
    batch = zoo.batch([8, 5])
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        got, want, moved = same(**batch), stock(**batch), turbo(**batch)
        assert torch.equal(got.last_hidden_state[real], want.last_hidden_state[real])
        assert (moved.last_hidden_state - want.last_hidden_state)[real].abs().max() > 1e-2
        cache, ids, mask = dp.DepthCache(turbo), batch["input_ids"], batch["attention_mask"]
        a = turbo(input_ids=ids[:, :5], attention_mask=mask[:, :5], past_key_values=cache).last_hidden_state
        b = turbo(input_ids=ids[:, 5:], attention_mask=mask, past_key_values=cache).last_hidden_state
    torch.testing.assert_close(torch.cat((a, b), 1)[real], moved.last_hidden_state[real], rtol=1e-4, atol=1e-4)


def test_gpt2_token_types_are_refused_or_honoured():
    stock = pair("gpt2")[0]
    same = dp.transform(stock, dp.Identity())
    batch = zoo.batch([6, 6])
    kinds = torch.randint(0, 5, (2, 6))
    with torch.no_grad():
        assert torch.equal(same(**batch, token_type_ids=kinds).logits, stock(**batch, token_type_ids=kinds).logits)


IDS = torch.tensor([[5, 6, 7, 8, 9]])


@pytest.mark.parametrize(("arguments", "message"), [
    ({}, "expected exactly one of input_ids and inputs_embeds, got neither"),
    ({"input_ids": IDS, "inputs_embeds": torch.zeros(1, 5, 32)}, r"exactly one .* got \['input_ids', 'inputs_embeds'\]"),
    ({"input_ids": IDS[0]}, r"input_ids: expected a non-empty tensor of 2 dimensions .*, got shape \(5,\)"),
    ({"input_ids": IDS[:, :0]}, r"input_ids: expected a non-empty tensor .*, got shape \(1, 0\)"),
    ({"input_ids": IDS[:0]}, r"got shape \(0, 5\)"),
    ({"inputs_embeds": IDS.float()}, r"inputs_embeds: .* 3 dimensions \[batch, tokens, width\], got shape \(1, 5\)"),
    ({"input_ids": IDS.float()}, r"input_ids: expected integers, got torch.float32"),
    ({"input_ids": IDS.tolist()}, r"input_ids: expected a tensor, got list"),
    ({"input_ids": IDS, "attention_mask": torch.zeros(1, 5)}, "row 0 is padding only; every row needs at least one"),
    ({"input_ids": IDS, "attention_mask": torch.ones(1, 4)}, r"attention_mask: expected shape \(1, 5\).*got \(1, 4\)"),
    ({"input_ids": IDS, "attention_mask": torch.ones(1, 1, 5, 5)}, r"expected a 2-D mask .*Dense and block masks"),
    ({"input_ids": IDS, "attention_mask": {"full_attention": torch.ones(1, 1, 5, 5).bool()}}, "not causal over the row's"),
    ({"input_ids": IDS, "attention_mask": {"full_attention": torch.ones(1, 5)}}, r"expected a mask \[batch, 1, 5, 5\]"),
    ({"input_ids": IDS, "attention_mask": {"linear": torch.ones(1, 1, 5, 5).bool()}}, "got one for 'linear' layers"),
    ({"input_ids": IDS, "position_ids": torch.arange(4)[None]}, r"position_ids: expected shape \(1, 5\).*\(1, 4\)"),
    ({"input_ids": IDS, "position_ids": torch.tensor([[0, 1, 2, 0, 1]]), "use_cache": True}, "rows of this call are packed"),
    ({"input_ids": IDS, "output_attentions": True}, "output_attentions: not available"),
    ({"input_ids": IDS, "attention_masks": torch.ones(1, 5)}, "attention_masks: .*Did you mean 'attention_mask'"),
    ({"input_ids": IDS, "logits_to_keep": -1}, "logits_to_keep: expected at least 0, got -1"),
    ({"input_ids": IDS, "logits_to_keep": torch.tensor([5])}, "logits_to_keep: .* 0..4, got 5"),
    ({"input_ids": IDS, "logits_to_keep": "all"}, "logits_to_keep: expected an integer or a tensor .*, got 'all'"),
    ({"input_ids": IDS, "labels": torch.zeros(1, 4, dtype=torch.long)}, r"labels: expected shape \(1, 5\), got \(1, 4\)"),
    ({"input_ids": IDS, "past_key_values": ((IDS, IDS),)}, "past_key_values: expected a DepthCache .* got tuple"),
])
def test_bad_arguments_are_refused_before_any_compute(llama, arguments, message, monkeypatch):
    import depthpass_lowering.executors.eager

    monkeypatch.setattr(depthpass_lowering.executors.eager, "run", lambda *a, **k: pytest.fail("computed"))
    with pytest.raises((InputError, CacheError), match=message):
        llama(**arguments)


def test_a_cache_is_not_half_changed_by_a_refused_call(llama):
    cache = dp.DepthCache(llama)
    ids = zoo.batch([6, 6])["input_ids"]
    with torch.no_grad():
        llama(input_ids=ids[:, :4], past_key_values=cache)
        state = cache.state
        for arguments, message in (
            ({"attention_mask": torch.ones(2, 5)}, "expected shape"),
            ({"attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1]] * 2)}, "differs from the mask they were cached with"),
            ({"output_attentions": True}, "output_attentions"),
        ):
            with pytest.raises(InputError, match=message):
                llama(input_ids=ids[:, 4:], past_key_values=cache, **arguments)
            assert cache.state is state and state.length == 4
        with pytest.raises(IndexError):  # as the stock model says it
            llama(input_ids=ids[:, 4:] + zoo.VOCABULARY, past_key_values=cache)
        assert cache.state is state and state.length == 4
        got = llama(input_ids=ids[:, 4:], past_key_values=cache).logits
        torch.testing.assert_close(got, llama(input_ids=ids).logits[:, 4:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_the_position_table_is_not_run_out_of(name):
    stock = stock_of(name, **{"n_positions" if name == "gpt2" else "max_position_embeddings": 8})
    turbo = turbo_of(stock)
    with torch.no_grad():
        assert turbo(**zoo.batch([8])).logits.shape[1] == 8
        with pytest.raises(InputError, match="reaches position 8, but the model's position table has 8 entries"):
            turbo(**zoo.batch([9]))
        cache = dp.DepthCache(turbo)
        turbo(**zoo.batch([7]), past_key_values=cache)
        turbo(input_ids=IDS[:, :1], past_key_values=cache)
        with pytest.raises(InputError, match="position table"):
            turbo(input_ids=IDS[:, :1], past_key_values=cache)
        assert cache.get_seq_length() == 8
        # Left padding takes no positions: 8 real tokens fit.
        padded = zoo.batch([10, 8])
        padded["input_ids"], padded["attention_mask"] = padded["input_ids"][1:], padded["attention_mask"][1:]
        positions = (padded["attention_mask"].cumsum(-1) - 1).clamp_min(0)
        assert turbo(**padded, position_ids=positions).logits.shape[1] == 10
        with pytest.raises(InputError, match="position"):
            turbo(input_ids=IDS, position_ids=torch.arange(5)[None] + 5)


def test_nan_weights_give_nan_and_do_not_hang():
    turbo = turbo_of(stock_of("llama"))
    with torch.no_grad():
        turbo.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
        assert turbo(**zoo.batch([8, 5])).logits.isnan().any()
        tokens = turbo.generate(**zoo.batch([5]), max_new_tokens=GROUP + 1, do_sample=False, eos_token_id=None)
    assert tokens.shape == (1, 5 + GROUP + 1)


def test_refused_specs_leave_the_model_alone():
    stock = stock_of("llama")
    keys, settings = list(stock.state_dict()), stock.config.to_dict()
    for arguments, kind, message in (
        ({"bridges": [(0, 2)]}, dp.PassError, r"source above its destination, got \(0, 2\)"),
        ({"bridges": [(1, 1)]}, dp.PassError, "source above its destination"),
        ({"bridges": [(3, 0)]}, dp.PassError, r"positions in 0..2 .* got 3 in \(3, 0\)"),
        ({"bridges": [(2, 0), (2, 0)]}, dp.PassError, r"\(2, 0\) is given twice"),
        ({"bridges": [(2, 0), (-1, 0)]}, dp.PassError, "given twice"),
        ({"preset": "llama-1b", "bridges": None}, dp.PassError, "at least 15 visits for 'llama-1b', got 3"),
    ):
        with pytest.raises(kind, match=message):
            dp.transform(stock, spec(**arguments))
    for arguments, message in (
        ({"group": 0}, "group: expected at least 1 token, got 0"), ({"rank": 0}, "rank: expected at least 1, got 0"),
        ({"group": 2.5}, "group: expected an integer"), ({"bridges": []}, "at least one"),
    ):
        with pytest.raises(dp.SpecError, match=message):
            spec(**arguments)
    for given, message in (
        ("pass: turboconn\ngruop: 4\n", "unknown field 'gruop'. Did you mean 'group'"),
        ("no_such_spec.yaml", "no_such_spec.yaml' cannot be read"),
        ("pass: turbocon", "turbocon.*Did you mean 'turboconn'"), (3, "expected a pass"),
    ):
        with pytest.raises(dp.SpecError, match=message):
            dp.transform(stock, given)
    for chunk, message in ((0, "at least 1, got 0"), (GROUP + 1, f"at most {GROUP}"), ("2", "integer")):
        with pytest.raises(dp.SpecError, match=f"chunk: .*{message}"):
            dp.transform(stock, spec(), chunk=chunk)
    with pytest.raises(dp.UnsupportedModelError, match=r"expected a transformers decoder, got Linear"):
        dp.transform(torch.nn.Linear(2, 2), spec())
    stock.depth = torch.nn.Linear(2, 2)
    with pytest.raises(dp.UnsupportedModelError, match="already has an attribute 'depth'"):
        dp.transform(stock, spec())
    del stock.depth
    assert list(stock.state_dict()) == keys and stock.config.to_dict() == settings
    assert not any("forward" in m.__dict__ for m in stock.modules())


def test_a_padded_row_of_opt_runs_out_of_its_table_by_its_real_tokens():
    turbo = turbo_of(stock_of("opt", max_position_embeddings=8))
    with torch.no_grad():
        assert turbo(**zoo.batch([8, 5])).logits.shape[1] == 8
        longer = zoo.batch([10, 8])
        assert turbo(**{n: x[1:] for n, x in longer.items()}).logits.shape[1] == 10  # 8 real tokens
        with pytest.raises(InputError, match="reaches position 9, but the model's position table has 8 entries"):
            turbo(**longer)


def test_the_position_table_is_asked_as_it_is_now():
    turbo = turbo_of(stock_of("gpt2", n_positions=8))
    with torch.no_grad():
        turbo(**zoo.batch([8]))
        turbo.transformer.wpe = torch.nn.Embedding(16, turbo.config.n_embd)
        assert turbo(**zoo.batch([12])).logits.shape[1] == 12
