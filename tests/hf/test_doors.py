"""Every door runs the program: the whole model, its decoder, and whatever stands between them."""

import copy
import pickle

import pytest
import torch
import zoo
from transformers import AutoModelForCausalLM, AutoModelForQuestionAnswering, AutoModelForSequenceClassification
from turbos import BRIDGES, GROUP, enliven, pair, spec, stock_of, turbo_of

import depthpass as dp

LENGTHS = [8, 5, 7]
SCALED = {"granite": {"logits_scaling": 3.0}, "cohere": {"logit_scale": 0.5}, "gemma3_text": {"final_logit_softcapping": 2.0}}
DECODERS = {"gpt2": "transformer", "gpt_neox": "gpt_neox", "opt": "model.decoder"}
pytestmark = pytest.mark.usefixtures("one_capture")


def head(model, hidden):
    """What each architecture's paper does after the final norm, by the config's numbers."""
    config, logits = model.config, model.get_output_embeddings()(hidden)
    logits = logits * (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    if cap := getattr(config, "final_logit_softcapping", None):
        logits = torch.tanh(logits / cap) * cap
    return logits


def decoder_of(model):
    return model.get_submodule(DECODERS.get(model.config.model_type, "model"))


@pytest.fixture(scope="module", params=zoo.SUPPORTED)
def models(request):
    # Stock gemma2 takes its softmax of a float64 mask in float32, which makes it NaN where a row is padded.
    dtype = torch.float32 if request.param == "gemma2" else torch.float64
    stock = stock_of(request.param, dtype=dtype, **SCALED.get(request.param, {}))
    return stock, turbo_of(stock)


def test_the_head_of_the_decoders_output_is_the_models_output(models):
    stock, turbo = models
    decoder, batch = decoder_of(turbo), zoo.batch(LENGTHS)
    real = batch["attention_mask"].bool()
    actual, want = decoder(**batch), turbo(**batch)
    hidden = actual.last_hidden_state
    limit = {"rtol": 1e-12, "atol": 1e-12} if hidden.dtype == torch.float64 else {}
    torch.testing.assert_close(head(turbo, hidden)[real], want.logits[real], **limit)
    # The oracle of the head itself, and that the program has moved what the decoder returns.
    plain = decoder_of(stock)(**batch).last_hidden_state
    torch.testing.assert_close(head(stock, plain)[real], stock(**batch).logits[real], **limit)
    assert (hidden - plain)[real].abs().max() > 1e-2
    assert isinstance(actual[zoo.CACHE], dp.DepthCache) and actual[zoo.CACHE].get_seq_length() == 8
    assert type(actual) is type(decoder_of(stock)(**batch)) and isinstance(decoder, type(decoder_of(stock)))
    # llama4_text names a base model that it does not have, so that its base_model is the whole model.
    for other in {turbo.base_model, turbo.get_decoder(), decoder} - {turbo}:
        assert torch.equal(other(**batch).last_hidden_state[real], hidden[real])
    assert torch.equal(decoder(**batch, return_dict=False)[0][real], hidden[real])


def test_gradients_reach_the_new_parameters_through_the_decoder(models):
    """As a fused head trains: the decoder, then a head and a loss of the trainer's own."""
    _, turbo = models
    ids = zoo.batch([9, 9])["input_ids"]

    def gradients(logits):
        turbo.zero_grad()
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).double(), ids[:, 1:].flatten()).backward()
        return {n: p.grad for n, p in turbo.named_parameters() if p.grad is not None}

    own = gradients(head(turbo, decoder_of(turbo)(input_ids=ids, use_cache=False).last_hidden_state))
    want = gradients(turbo(input_ids=ids, use_cache=False).logits)
    assert own.keys() == want.keys() and all(own[f"depth.turboconn.s{s}_d{d}.up.weight"].abs().max() > 0 for s, d in BRIDGES)
    for name, g in want.items():
        assert (own[name] - g).norm() <= (1e-10 if g.dtype == torch.float64 else 1e-5) * g.norm() + 1e-9, name
    turbo.zero_grad()


def test_a_cache_serves_both_doors(models):
    _, turbo = models
    decoder, batch = decoder_of(turbo), zoo.batch(LENGTHS)
    ids, mask, pieces, cache = batch["input_ids"], batch["attention_mask"], [], dp.DepthCache(turbo)
    with torch.no_grad():
        for start, end in ((0, 4), (4, 5), (5, 8)):
            call = {"input_ids": ids[:, start:end], "attention_mask": mask[:, :end], zoo.CACHE: cache}
            pieces.append(turbo(**call).logits if start == 4 else head(turbo, decoder(**call).last_hidden_state))
        want, real = turbo(**batch).logits, mask.bool()
    torch.testing.assert_close(torch.cat(pieces, 1)[real], want[real], rtol=1e-4, atol=1e-4)


def test_embeddings_as_input():
    turbo = turbo_of(stock_of("llama"))
    batch = zoo.batch(LENGTHS)
    embeds, mask = turbo.get_input_embeddings()(batch["input_ids"]), batch["attention_mask"]
    a = turbo.model(attention_mask=mask, inputs_embeds=embeds).last_hidden_state
    b = turbo.model(**batch).last_hidden_state
    assert torch.equal(a[mask.bool()], b[mask.bool()])


def test_the_decoder_of_an_adapted_model():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], modules_to_save=["depth"], task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(turbo_of(stock_of("llama")), config)
    enliven(tuned, std=0.2)
    batch = zoo.batch(LENGTHS)
    real = batch["attention_mask"].bool()
    inner = tuned.get_base_model()
    hidden = inner.model(**batch).last_hidden_state
    torch.testing.assert_close(inner.lm_head(hidden)[real], tuned(**batch).logits[real])
    tuned.train()
    inner.lm_head(inner.model(**batch).last_hidden_state).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for n, p in tuned.named_parameters() if "lora_B" in n)
    assert all(p.grad is not None for n, p in tuned.named_parameters() if n.endswith("up.weight") and p.requires_grad)
    with tuned.disable_adapter():
        torch.testing.assert_close(
            inner.lm_head(inner.model(**batch).last_hidden_state)[real], tuned(**batch).logits[real]
        )


def test_a_head_of_another_kind_reads_the_program():
    torch.manual_seed(0)
    turbo = turbo_of(enliven(AutoModelForSequenceClassification.from_config(zoo.config("llama", 3, num_labels=3)).eval()))
    batch = zoo.batch(LENGTHS)
    actual = turbo.score(turbo.model(**batch).last_hidden_state)[:, -1]
    torch.testing.assert_close(actual, turbo(**batch).logits)


def test_copies_and_pickles_have_decoders_of_their_own():
    turbo = turbo_of(stock_of("gpt2"))
    batch = zoo.batch(LENGTHS)
    real = batch["attention_mask"].bool()
    want = turbo.transformer(**batch).last_hidden_state[real]
    for copied in (copy.deepcopy(turbo), pickle.loads(pickle.dumps(turbo))):
        assert torch.equal(copied.transformer(**batch).last_hidden_state[real], want)
        assert copied.transformer.depth_model is copied
        with torch.no_grad():
            enliven(copied.depth, seed=9, least=1)
        assert not torch.equal(copied.transformer(**batch).last_hidden_state[real], want)
    lone = copy.deepcopy(turbo.transformer)  # takes what it needs along
    assert torch.equal(lone(**batch).last_hidden_state[real], want) and lone.depth_model is not turbo
    assert torch.equal(turbo.transformer(**batch).last_hidden_state[real], want)


def test_restore_gives_the_stock_decoder_back(tmp_path):
    stock, turbo = stock_of("llama"), None
    turbo = turbo_of(stock)
    back, ids = dp.restore(turbo), zoo.batch([6])["input_ids"]
    assert type(back.model) is type(stock.model) and "_depth_door" not in back.model.__dict__
    assert torch.equal(back.model(input_ids=ids).last_hidden_state, stock.model(input_ids=ids).last_hidden_state)
    for act in (dp.restore, lambda m: dp.transform(m, spec())):
        with pytest.raises(dp.SpecError, match=r"restore|already transformed"):
            act(turbo.model)
    with pytest.raises(dp.SpecError, match=r"the decoder of a transformed LlamaForCausalLM, .* Save the whole model"):
        turbo.model.save_pretrained(tmp_path)
    turbo.save_pretrained(tmp_path)
    loaded = dp.from_pretrained(tmp_path)
    assert torch.equal(loaded.model(input_ids=ids).last_hidden_state, turbo.model(input_ids=ids).last_hidden_state)


def test_a_decoder_outlives_the_model_it_came_from():
    import gc

    stock = stock_of("llama")
    want, ids = turbo_of(stock)(input_ids=zoo.batch([6])["input_ids"]).logits, zoo.batch([6])["input_ids"]
    decoder = turbo_of(stock).model
    gc.collect()
    torch.testing.assert_close(stock.lm_head(decoder(input_ids=ids).last_hidden_state), want)


def test_bad_arguments_of_a_decoder():
    turbo = pair("llama")[1]
    ids = zoo.batch([5])["input_ids"]
    for arguments, message in (
        ({"input_ids": ids, "attention_masks": ids}, "attention_masks: .* LlamaModel .*Did you mean 'attention_mask'"),
        ({"input_ids": ids, "output_attentions": True}, "output_attentions: not available"),
        ({}, "expected exactly one of input_ids and inputs_embeds"),
        ({"input_ids": ids, "attention_mask": torch.ones(1, 1, 5, 5)}, "expected a 2-D mask"),
    ):
        with pytest.raises(dp.InputError, match=message):
            turbo.model(**arguments)
    other = dp.DepthCache(turbo_of(pair("llama")[0]))
    with pytest.raises(dp.CacheError, match="belongs to another model"):
        turbo.model(input_ids=ids, past_key_values=other)


def test_the_program_runs_once_per_call(monkeypatch):
    import depthpass_lowering.executors.eager as eager

    runs, real = [], eager.run
    monkeypatch.setattr(eager, "run", lambda *a, **k: runs.append(1) or real(*a, **k))
    for name in ("llama", "opt"):
        turbo, ids = pair(name)[1], zoo.batch([5])["input_ids"]
        for door in (turbo, turbo.base_model, decoder_of(turbo)):
            runs.clear()
            door(input_ids=ids)
            assert len(runs) == 1


def test_pads_and_taps_through_both_doors():
    stock = stock_of("llama")
    turbo = dp.transform(stock, [spec(), dp.Taps(at=[1], scope="a"), dp.Taps(at=[0], head=True, scope="b"), dp.Pad(2, token=5)])
    enliven(turbo.depth, seed=1, least=1)
    ids = zoo.batch([6, 6])["input_ids"]
    whole, inner = turbo(input_ids=ids), turbo.model(input_ids=ids)
    assert torch.equal(turbo.lm_head(inner.last_hidden_state), whole.logits)
    assert whole.taps.keys() == inner.taps.keys() == {"a.v1", "b.v0"}
    assert all(torch.equal(whole.taps[k], inner.taps[k]) for k in whole.taps)
    told = turbo.model(input_ids=ids, prompt_length=4).last_hidden_state
    assert torch.equal(turbo.lm_head(told), turbo(input_ids=ids, prompt_length=4).logits)
    labels = ids.clone()
    labels[:, :4] = -100
    assert torch.equal(turbo(input_ids=ids, labels=labels).logits, turbo(input_ids=ids, prompt_length=4).logits)


def test_losses_of_routers_when_only_the_decoder_is_called():
    turbo = dp.transform(stock_of("llama"), dp.MixtureOfRecursions(recursions=2, start=1, end=2, router="expert"))
    enliven(turbo.depth, seed=1, least=1)
    ids = zoo.batch([8, 8])["input_ids"]
    turbo.train()
    whole = turbo(input_ids=ids, labels=ids)
    with pytest.warns(UserWarning, match="was called by itself, so its losses .* are in no loss. Add outputs.losses_total"):
        inner = turbo.model(input_ids=ids)
    assert inner.losses.keys() == whole.losses.keys() and inner.losses
    alone = torch.nn.functional.cross_entropy(turbo.lm_head(inner.last_hidden_state)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(alone + inner.losses_total, whole.loss)


@pytest.mark.parametrize(("auto", "targets", "count"), [
    (AutoModelForCausalLM, {"labels": zoo.batch([8, 8])["input_ids"]}, 14),
    (AutoModelForCausalLM, {"labels": zoo.batch([8, 8])["input_ids"],
                            "shift_labels": torch.tensor([[3, 4, -100, 5, -100, -100, 6, 7], [-100] * 8])}, 5),
    (AutoModelForSequenceClassification, {"labels": torch.tensor([1, 2])}, 2),
    (AutoModelForQuestionAnswering, {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])}, 2),
], ids=["language", "shifted", "classes", "answers"])
def test_losses_of_routers_weigh_as_much_as_the_calls_labels(auto, targets, count):
    stock = auto.from_config(zoo.config("llama", 3, num_labels=3)).double()
    turbo = dp.transform(stock, dp.MixtureOfRecursions(recursions=2, start=1, end=2, aux=0.5))
    call = {"input_ids": zoo.batch([8, 8])["input_ids"], "num_items_in_batch": 4 * count}
    got, plain = turbo.train()(**call, **targets), turbo.eval()(**call, **targets)
    torch.testing.assert_close(got.loss - plain.loss, (got.losses_total / 4).to(plain.loss))
    with pytest.warns(UserWarning, match="called without labels .* losses .mor.aux. are in no loss. Add outputs.losses_total"):
        turbo.train()(**call)  # Trainer with label smoothing


def test_generation_and_sweeps_go_through_the_decoder():
    turbo = turbo_of(stock_of("llama"))
    swept = dp.transform(dp.restore(turbo), spec(), schedule="fixed_point", tol=0.0)
    swept.depth.load_state_dict(turbo.depth.state_dict())
    ids = zoo.batch([9, 9])["input_ids"]
    with torch.no_grad():
        inner = swept.model(input_ids=ids, use_cache=False)
        torch.testing.assert_close(inner.last_hidden_state, turbo.model(input_ids=ids).last_hidden_state, rtol=1e-4, atol=1e-4)
        assert inner.sweeps and swept(input_ids=ids, use_cache=False).sweeps
        tokens = turbo.generate(input_ids=ids, max_new_tokens=GROUP + 2, do_sample=False, eos_token_id=None)
        step = turbo.lm_head(turbo.model(input_ids=tokens[:, :-1]).last_hidden_state[:, 8:]).argmax(-1)
    assert torch.equal(step, tokens[:, 9:])


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma3_text", "gpt_oss"])
def test_hidden_states_are_those_of_the_stock_model_and_of_every_visit(name):
    stock = stock_of(name, dtype=torch.float64)
    turbo = turbo_of(stock)
    same, batch = dp.transform(stock, dp.Identity()), zoo.batch(LENGTHS)
    real = batch["attention_mask"].bool()
    limit = {"rtol": 1e-12, "atol": 1e-12} if next(stock.parameters()).dtype == torch.float64 else {}
    with torch.no_grad():
        want = stock(**batch, output_hidden_states=True).hidden_states
        for door in (same, decoder_of(same)):
            actual = door(**batch, output_hidden_states=True).hidden_states
            assert len(actual) == len(want) == 4
            for a, b in zip(actual, want):
                torch.testing.assert_close(a[real], b[real], **limit)
        whole = turbo(**batch, output_hidden_states=True, use_cache=False)
        assert torch.equal(whole.hidden_states[-1][real], decoder_of(turbo)(**batch, use_cache=False).last_hidden_state[real])
        assert turbo(**batch).hidden_states is None and not hasattr(whole, "taps")


def test_hidden_states_of_loops_caches_and_pads():
    stock = stock_of("llama")
    looped = dp.transform(stock, [dp.Loop(start=1, end=2, times=3), dp.Taps(at=[1], scope="mine")])
    ids = zoo.batch([8, 8])["input_ids"]
    with torch.no_grad():
        out = looped(input_ids=ids, output_hidden_states=True)
        assert len(out.hidden_states) == 6 and out.taps.keys() == {"mine.v1"}
        assert torch.equal(out.hidden_states[2], out.taps["mine.v1"])
        alone = dp.transform(stock, dp.LayerProgram([0, 1, 1, 1, 2]))(input_ids=ids, output_hidden_states=True).hidden_states
        assert all(torch.equal(a, b) for a, b in zip(out.hidden_states, alone))
        cache = dp.DepthCache(looped)
        parts = [looped(input_ids=ids[:, a:b], past_key_values=cache, output_hidden_states=h).hidden_states
                 for a, b, h in ((0, 3, True), (3, 5, False), (5, 8, True))]
        assert parts[1] is None
        torch.testing.assert_close(parts[2][3], out.hidden_states[3][:, 5:], rtol=1e-4, atol=1e-4)
        padded = dp.transform(stock, [spec(), dp.Pad(2, token=5)])(input_ids=ids, output_hidden_states=True)
        assert all(h.shape == (2, 8, 32) for h in padded.hidden_states)
        tokens = looped.generate(ids, max_new_tokens=2, output_hidden_states=True, return_dict_in_generate=True,
                                 eos_token_id=None)
        assert [len(h) for h in tokens.hidden_states] == [6, 6] and tokens.hidden_states[1][0].shape == (2, 1, 32)
    routed = dp.transform(stock, dp.MixtureOfRecursions(recursions=2, start=1, end=2))
    with pytest.raises(dp.InputError, match=r"output_hidden_states: the visit .* runs on the tokens of a route only"):
        routed(input_ids=ids, output_hidden_states=True)
