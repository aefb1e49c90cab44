"""Hooks inside blocks, on embeddings and norms: they see, and change, what the stock modules compute."""

import copy
import warnings
from collections import Counter

import pytest
import torch
import zoo
from transformers import Trainer, TrainingArguments
from turbos import GROUP, enliven, spec, stock_of, turbo_of

import depthpass as dp

BATCH = zoo.batch([8, 5, 7])
REAL = BATCH["attention_mask"].bool()
pytestmark = [pytest.mark.usefixtures("one_capture"), pytest.mark.filterwarnings("ignore:hooks on or in block")]
NAMES = ["llama", "gpt2", "gemma3_text", "opt", "gpt_oss", "mixtral", "llama4_text", "gpt_neox", "cohere2"]


def logits(model, **more):
    with torch.no_grad():
        return model(**BATCH, **more).logits[REAL]


def close(got, want, limit=1e-4):
    torch.testing.assert_close(got, want, rtol=limit, atol=limit)


def watched(model):
    """Hooks on every stock module; how often each ran, by name."""
    seen = Counter()

    def note(name):
        return lambda *args: seen.update([name])

    handles = [m.register_forward_hook(note(n)) for n, m in model.named_modules() if n and not n.startswith("depth")]
    return seen, handles


@pytest.mark.parametrize("name", NAMES)
def test_hooks_everywhere_change_nothing_and_run_like_the_stock_models(name):
    stock = stock_of(name)
    turbo = turbo_of(stock)
    want, same = logits(turbo), dp.transform(stock, dp.Identity())
    theirs, others = watched(stock)
    mine, _ = watched(same)
    logits(stock), logits(same)
    assert mine == theirs
    [h.remove() for h in others]
    seen, handles = watched(turbo)
    close(logits(turbo), want)
    # Every chunk of the looped blocks is a call; what stands around them is called once.
    assert seen.keys() == mine.keys() and {seen[n] / mine[n] for n in mine} == {1, -(-8 // GROUP)}
    ids, mask, cache = BATCH["input_ids"], BATCH["attention_mask"], dp.DepthCache(turbo)
    with torch.no_grad():
        parts = [turbo(input_ids=ids[:, i:j], attention_mask=mask[:, :j], past_key_values=cache).logits
                 for i, j in ((0, 5), (5, 6), (6, 8))]
    close(torch.cat(parts, 1)[REAL], want)
    [h.remove() for h in handles]
    assert torch.equal(logits(turbo), want)


def doubled(module):
    return module.register_forward_hook(lambda module, args, out: out * 2)


SPECS = {
    "turboconn": spec(), "loop": dp.Loop(start=1, end=2, times=3, inject="add"), "lora": dp.Loop(0, 3, times=2, lora_rank=2),
    "parallel": dp.ParallelLoop(loops=2, window=4), "routed": dp.MixtureOfRecursions(recursions=2, start=1, end=2),
    "depths": dp.MixtureOfDepths(blocks=[1]),
    "pads": [spec(), dp.Pad(2, token=5)],
    "exit": dp.Loop(start=1, end=2, times=3, exit=0.6),
    "scales": dp.Loop(0, 3, times=2, scales=True),
}


@pytest.mark.parametrize("name", SPECS)
def test_a_hook_inside_a_block_changes_what_weights_would(name):
    stock = stock_of("llama", dtype=torch.float64)
    other = copy.deepcopy(stock)
    with torch.no_grad():
        for layer in other.model.layers:
            layer.mlp.down_proj.weight.mul_(2)
            layer.self_attn.o_proj.weight.mul_(2)
    transformed = [dp.transform(m, SPECS[name]) for m in (stock, other)]
    for m in transformed:
        enliven(m.depth, seed=1, least=1)
    turbo, twice = transformed
    before = logits(turbo)
    for layer in turbo.model.layers:
        doubled(layer.mlp.down_proj)
        doubled(layer.self_attn.o_proj)
    labels = BATCH["input_ids"].masked_fill(~REAL, -100)
    if name == "lora":  # the hook doubles what the update adds, too
        with torch.no_grad():
            [p.mul_(2) for n, p in twice.named_parameters() if n.startswith("depth") and n.endswith(("down_proj.b", "o_proj.b"))]
    more = {"prompt_length": 3} if name == "pads" else {}
    turbo.zero_grad(), twice.zero_grad()
    actual, want = (m(**BATCH, labels=labels, **more) for m in transformed)
    assert (actual.logits[REAL] - before).abs().max() > 1e-3
    close(actual.logits[REAL], want.logits[REAL], 1e-5)
    actual.loss.backward()
    want.loss.backward()
    theirs = dict(twice.named_parameters())
    for n, p in turbo.named_parameters():
        if p.grad is not None:
            scale = 2 if n.endswith(("down_proj.weight", "o_proj.weight", "down_proj.b", "o_proj.b")) else 1  # d(2 W x) / dW
            assert (p.grad - scale * theirs[n].grad).norm() <= 1e-4 * theirs[n].grad.norm() + 1e-9, n
    if name in ("routed", "depths", "pads"):  # choices by scores of later tokens; a prompt of its own
        return
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(turbo.generate(**BATCH, **options), twice.generate(**BATCH, **options))


@pytest.mark.parametrize("name", ["phi", "gpt2", "mixtral", "granite", "olmo2", "llama4_text"])
def test_factors_of_a_visit_stand_where_modules_begin_and_end(name):
    turbo = dp.transform(stock_of(name), dp.Loop(1, 3, times=2, scales=True))
    enliven(turbo.depth, seed=1, least=1)
    want, (seen, _) = logits(turbo), watched(turbo)
    close(logits(turbo), want)
    block = [n for n in seen if n.rpartition(".")[2] == "1"]
    assert [seen[n] for n in block] == [2]


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_hooks_on_rotary_tables_reach_every_block(name):
    stock = stock_of(name)
    before = logits(stock)
    for model in (stock, turbo := dp.transform(stock, spec())):  # new bridges add nothing yet
        model.model.rotary_emb.register_forward_hook(lambda module, args, out: tuple(1.5 * x for x in out))
    want = logits(stock)
    close(logits(turbo), want)
    assert (want - before).abs().max() > 1e-3


def test_hooks_on_the_embedding_and_the_final_norm():
    for name, embedding, norm in (("llama", "model.embed_tokens", "model.norm"), ("gpt2", "transformer.wpe", "transformer.ln_f")):
        stock = stock_of(name, tie_word_embeddings=False)
        other = copy.deepcopy(stock)
        with torch.no_grad():
            other.get_submodule(embedding).weight.mul_(2)
            for p in other.get_submodule(norm).parameters():
                p.mul_(2)
        turbo, twice, calls = turbo_of(stock), turbo_of(other), []
        doubled(turbo.get_submodule(embedding))
        doubled(turbo.get_submodule(norm))
        turbo.get_submodule(embedding).register_forward_pre_hook(lambda module, args, calls=calls: calls.append(1))
        close(logits(turbo), logits(twice))
        assert len(calls) == 1
        inner = {"llama": "model", "gpt2": "transformer"}[name]
        hidden = turbo.get_submodule(inner)(**BATCH).last_hidden_state
        close(turbo.lm_head(hidden)[REAL], logits(twice))
        assert len(calls) == 2


def test_backward_hooks_inside_blocks_see_gradients():
    stock = stock_of("llama", dtype=torch.float64)
    turbo, seen = turbo_of(stock), []
    turbo.model.layers[1].mlp.register_full_backward_hook(lambda module, given, got: seen.append(got[0]))
    turbo(**BATCH, use_cache=False).logits[REAL].square().sum().backward()
    assert [tuple(g.shape) for g in seen] == [(3, 2, 32), (3, 3, 32), (3, 3, 32)]
    actual = {n: p.grad for n, p in turbo.named_parameters()}
    plain = turbo_of(stock)
    plain.zero_grad()
    plain(**BATCH, use_cache=False).logits[REAL].square().sum().backward()
    for n, p in plain.named_parameters():
        assert (actual[n] - p.grad).norm() <= 1e-6 * p.grad.norm() + 1e-12, n


def test_checkpoints_and_hooks_inside_blocks():
    turbo = turbo_of(stock_of("llama", dtype=torch.float64)).train()
    plain = torch.autograd.grad(turbo(**BATCH, use_cache=False).logits[REAL].square().sum(), dp.new_parameters(turbo))
    turbo.gradient_checkpointing_enable()
    seen = []
    turbo.model.layers[1].self_attn.register_forward_hook(lambda *a: seen.append(1))
    grads = torch.autograd.grad(turbo(**BATCH, use_cache=False).logits[REAL].square().sum(), dp.new_parameters(turbo))
    for a, b in zip(grads, plain):
        assert (a - b).norm() <= 1e-6 * b.norm() + 1e-12
    assert len(seen) == 2 * 3  # once more in the backward pass


def test_adapters_and_hooks_on_them():
    peft = pytest.importorskip("peft")
    tuned = peft.get_peft_model(turbo_of(stock_of("llama")), peft.LoraConfig(
        r=4, target_modules=["q_proj", "down_proj"], modules_to_save=["depth"], task_type="CAUSAL_LM"))
    enliven(tuned, std=0.2)
    want, seen = logits(tuned), []
    for n, m in tuned.named_modules():
        if n.endswith("lora_A.default"):
            m.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    close(logits(tuned), want)
    assert sum(seen) == 8 * 2 * 3  # tokens, places, blocks


@pytest.mark.compile
def test_what_cannot_be_run_as_a_module_is_said():
    turbo = dp.transform(stock_of("llama"), dp.SameLayerState())
    handle = turbo.model.layers[1].mlp.register_forward_hook(lambda *a: None)
    with pytest.raises(dp.UnsupportedModelError, match=r"block 1 has hooks on modules inside it, and a visit with one part"):
        logits(turbo)
    handle.remove()
    logits(turbo)
    compiled = dp.transform(stock_of("llama"), spec(), lowering="inductor")
    compiled.model.norm.register_forward_hook(lambda *a: None)
    with torch.no_grad(), pytest.raises(dp.LoweringError, match=r"cannot compile a decoded token: .* final norm have hooks"):
        cache = dp.DepthCache(compiled)
        compiled(input_ids=BATCH["input_ids"][:, :2], past_key_values=cache)
        compiled(input_ids=BATCH["input_ids"][:, 2:3], past_key_values=cache)


def test_hooks_on_new_modules_run_on_every_level():
    turbo, seen = turbo_of(stock_of("llama")), []
    want = logits(turbo)
    turbo.depth.turboconn.s2_d0.up.register_forward_hook(lambda module, args, out: seen.append(1) or out * 0)
    assert (logits(turbo) - want).abs().max() > 1e-3 and len(seen) >= 2


def test_noise_on_embeddings_as_the_trainer_adds_it(tmp_path):
    turbo = turbo_of(stock_of("llama"))
    rows = [{"input_ids": torch.randint(3, 97, (9,))} for _ in range(4)]

    def collate(batch):
        ids = torch.stack([row["input_ids"] for row in batch])
        return {"input_ids": ids, "labels": ids}

    losses = []
    for alpha in (None, 40.0):
        arguments = TrainingArguments(
            str(tmp_path), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, neftune_noise_alpha=alpha, seed=1,
            learning_rate=0.0, save_strategy="no",
        )
        losses.append(Trainer(model=turbo, args=arguments, train_dataset=rows, data_collator=collate).train().training_loss)
    assert abs(losses[0] - losses[1]) > 1e-3


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchinfo_sees_every_module():
    torchinfo = pytest.importorskip("torchinfo")
    stock = stock_of("llama")
    turbo = turbo_of(stock)
    want = logits(turbo)
    for warm in range(2):
        actual, plain = (torchinfo.summary(m, input_data=dict(BATCH), verbose=0, depth=5) for m in (turbo, stock))
        names = {(i.class_name, i.depth) for i in plain.summary_list}
        assert names <= {(i.class_name, i.depth) for i in actual.summary_list}, warm
        mine = next(i for i in actual.summary_list if i.class_name == "LlamaMLP")
        assert mine.output_size[-1] == 32 and not mine.is_recursive
    assert torch.equal(logits(turbo), want)


@pytest.mark.parametrize("warm", [False, True])
def test_nnsight_reads_and_edits_what_runs(warm, monkeypatch):
    # Its import puts a Tensor.backward in place that parses the caller's file; pages of the docs, in later tests, are no Python.
    monkeypatch.setattr(torch.Tensor, "backward", torch.Tensor.backward)
    nnsight = pytest.importorskip("nnsight")
    stock = stock_of("llama")
    same, turbo, ids = dp.transform(stock, dp.Identity()), turbo_of(stock), zoo.batch([8, 8])["input_ids"]
    with torch.no_grad():
        plain = turbo_of(stock)(input_ids=ids).logits
        if warm:
            turbo(input_ids=ids), same(input_ids=ids)
        edited = []
        for model in (same, copy.deepcopy(stock)):
            traced = nnsight.NNsight(model)
            with traced.trace(input_ids=ids):
                traced.model.layers[1].mlp.output[:] = 0
                inner = traced.model.layers[2].self_attn.o_proj.output.save()
                norm = traced.model.norm.output.save()
                actual = traced.lm_head.output.save()
            edited.append((inner, norm, actual))
        assert all(torch.equal(a, b) for a, b in zip(*edited))
        traced = nnsight.NNsight(turbo)
        with traced.trace(input_ids=ids):
            inside = traced.model.layers[1].mlp.output.save()
            actual = traced.lm_head.output.save()
        assert inside.shape == (2, GROUP, 32)  # the first chunk: a warning has said so
        close(actual, plain)


@pytest.mark.filterwarnings("ignore:materialize|hooks on")
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_hooks_that_change_what_goes_into_a_block(name):
    """As steering vectors do; and gradients of it, as stock blocks hand them out. The oracle is a stock model of the visits."""
    ids = zoo.batch([7, 7])["input_ids"]
    stock = enliven(zoo.model(name, 3))
    twin = dp.materialize(dp.transform(stock, dp.Loop(1, 2, 2)))
    turbo = dp.transform(stock, dp.Loop(1, 2, 2))

    def blocks(model):
        return model.model.layers if name == "llama" else model.transformer.h

    plain = turbo(input_ids=ids, use_cache=False).logits
    seen = []
    for model, visits in ((twin, (1, 2)), (turbo, (1,))):
        for block in (blocks(model)[i] for i in visits):
            block.register_forward_pre_hook(lambda module, inputs: (inputs[0] * torch.linspace(0.5, 2, inputs[0].shape[-1]),))
            block.register_full_backward_hook(lambda module, into, out: (into[0] * 0.5,))
        out = model(input_ids=ids, labels=ids, use_cache=False)
        seen.append((out.logits, *torch.autograd.grad(out.loss, model.get_input_embeddings().weight)))
    assert (seen[0][0] - plain).abs().max() > 1e-2
    for got, want in zip(seen[1], seen[0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
