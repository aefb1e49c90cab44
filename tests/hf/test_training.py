"""Training through the recurrence: checkpointing, number formats, and how often a model is captured."""

import pytest
import torch
import zoo
from turbos import pair, spec, stock_of, turbo_of

import depthpass as dp
from depthpass.errors import InputError

BATCH = zoo.batch([9, 6])
LABELS = BATCH["input_ids"].masked_fill(BATCH["attention_mask"] == 0, -100)


def gradients(model, **more):
    """Loss and every gradient of one step, with a fixed seed for dropout."""
    model.zero_grad()
    torch.manual_seed(0)
    loss = model(**BATCH, labels=LABELS, **more).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.usefixtures("one_capture")
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_gradient_checkpointing_gives_the_same_gradients(name):
    turbo = turbo_of(stock_of(name)).train()
    loss, want = gradients(turbo)
    turbo.gradient_checkpointing_enable()
    assert turbo.is_gradient_checkpointing
    runs = []
    for layer in turbo.get_submodule(turbo._depth.layers):
        real = layer._gradient_checkpointing_func
        layer._gradient_checkpointing_func = lambda *a, real=real, **k: (runs.append(1), real(*a, **k))[1]
    again, got = gradients(turbo)
    # The token loop of blocks 1 and 2 computes its chunks again by itself. GPT-2 has attention dropout, which the scheduled
    # level leaves to the eager one: there each block is checkpointed in each chunk of 3 of the 9 tokens.
    assert len(runs) == (7 if name == "gpt2" else 1)
    assert torch.equal(again, loss)
    assert got.keys() == want.keys() and len(want) == len(list(turbo.parameters()))
    for n, g in want.items():
        torch.testing.assert_close(got[n], g, rtol=1e-5, atol=1e-6)
    turbo.gradient_checkpointing_disable()
    runs.clear()
    assert torch.equal(gradients(turbo)[0], loss) and not runs


def test_reentrant_checkpointing_is_refused():
    turbo = turbo_of(stock_of("llama"))
    with pytest.raises(InputError, match=r"use_reentrant=True would lose .* Use \{'use_reentrant': False\}"):
        turbo.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    assert not turbo.is_gradient_checkpointing
    # The same rule for checkpoints that the stock model has been given.
    stock = stock_of("llama").train()
    stock.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(InputError, match="use_reentrant"):
        dp.transform(stock, spec())


def test_checkpointing_enabled_before_the_first_call():
    _, want = gradients(turbo_of(stock_of("llama")).train())
    stock = stock_of("llama").train()
    stock.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"preserve_rng_state": False, "use_reentrant": False})
    early = turbo_of(stock)
    late = turbo_of(stock_of("llama")).train()
    enable = getattr(late, "activation_checkpointing_enable", late.gradient_checkpointing_enable)
    enable(every_n_layers=2)
    assert [layer.gradient_checkpointing for layer in late.model.layers] == [True, False, True]
    for turbo in (early, late):
        for n, g in gradients(turbo)[1].items():
            torch.testing.assert_close(g, want[n], rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("one_capture")
@pytest.mark.parametrize(("name", "dtype"), [
    ("llama", torch.bfloat16), ("llama", torch.float16), ("gpt2", torch.float16), ("gemma3_text", torch.bfloat16),
    ("mixtral", torch.bfloat16),
], ids=str)
def test_half_precision(name, dtype):
    stock, turbo = pair(name)
    half = dp.transform(stock_of(name).to(dtype), spec())
    half.depth.load_state_dict(turbo.depth.state_dict())
    assert {p.dtype for p in half.parameters()} == {dtype}
    real = BATCH["attention_mask"].bool()
    with torch.no_grad():
        got, want = half(**BATCH).logits, turbo(**BATCH).logits
        low = stock_of(name).to(dtype)(**BATCH).logits.float() - stock(**BATCH).logits
    assert got.dtype == dtype
    # The recurrence may not lose much more than the stock model does in this format.
    error, usual = (got.float() - want)[real].pow(2).mean().sqrt(), low[real].pow(2).mean().sqrt()
    assert error < 4 * usual + 1e-3
    _, actual = gradients(half)
    assert len(actual) == len(list(half.parameters())) and all(g.isfinite().all() for g in actual.values())
    assert all(actual[f"depth.{n}"].abs().sum() > 0 for n, _ in half.depth.named_parameters())
    tokens = half.generate(**BATCH, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert tokens.shape == (2, 14)


@pytest.mark.usefixtures("one_capture")
@pytest.mark.parametrize("name", ["qwen3", "gpt2", "mixtral"])
def test_autocast(name):
    stock, turbo = stock_of(name), None
    same, turbo = dp.transform(stock, dp.Identity()), turbo_of(stock)
    real = BATCH["attention_mask"].bool()
    long = zoo.batch([120, 120])  # angles of far positions need every bit
    with torch.no_grad():
        exact, exact_turbo = stock(**BATCH).logits, turbo(**BATCH).logits
        exact_long = stock(**long).logits
        with torch.autocast("cpu", torch.bfloat16):
            want, got, moved = stock(**BATCH), same(**BATCH), turbo(**BATCH)
            far = (same(**long).logits - exact_long).float().pow(2).mean()
            assert 0 < far < 4 * (stock(**long).logits - exact_long).float().pow(2).mean()
    assert got.logits.dtype == want.logits.dtype == moved.logits.dtype
    usual = (want.logits - exact)[real].float().pow(2).mean().sqrt()
    for a, b in ((got.logits, exact), (moved.logits, exact_turbo)):
        assert 0 < (a - b)[real].float().pow(2).mean().sqrt() < 3 * usual
    with torch.autocast("cpu", torch.bfloat16):
        loss = turbo(**BATCH, labels=LABELS).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype and p.grad.isfinite().all() for p in turbo.parameters())


def test_captures_once_per_kind_of_call(captures):
    turbo = turbo_of(stock_of("gpt2"))

    def call(rows, lengths, **more):
        batch = zoo.batch(lengths * rows)
        with torch.no_grad():
            turbo(**batch, **more)

    call(1, [1])
    for rows, lengths in ((1, [9]), (3, [4]), (2, [5, 3]), (1, [17])):
        call(rows, lengths)
        call(rows, lengths, use_cache=False, logits_to_keep=1)
    turbo(input_ids=zoo.batch([6])["input_ids"])
    turbo(**zoo.batch([6]), position_ids=torch.arange(6)[None])
    turbo.generate(**zoo.batch([6, 4]), max_new_tokens=4)
    assert len(captures) == 1
    for n in (3, 5):
        for items in (None, 7, torch.tensor(9)):
            labels = zoo.batch([n, n])["input_ids"]
            turbo(input_ids=labels, labels=labels, num_items_in_batch=items)
    assert len(captures) == 1  # the head and the loss are stock code
    for _ in range(2):
        turbo.train()
        call(2, [5])
        turbo.eval()
        call(2, [5])
    assert len(captures) == 2
    turbo.double()
    call(2, [5])
    turbo.float()
    call(2, [5])
    assert len(captures) == 3  # as before in float32


def test_a_changed_dropout_is_captured_again(captures):
    turbo = turbo_of(stock_of("gpt2", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)).train()
    labels = zoo.batch([6, 6])["input_ids"]
    first, second = (turbo(input_ids=labels).logits for _ in range(2))
    assert torch.equal(first, second) and len(captures) == 1
    for module in turbo.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    first, second = (turbo(input_ids=labels).logits for _ in range(2))
    assert not torch.equal(first, second) and len(captures) == 2


@pytest.mark.usefixtures("one_capture")
def test_frozen_parameters_get_no_gradient():
    turbo = turbo_of(stock_of("llama"))
    for n, p in turbo.named_parameters():
        p.requires_grad_(n.startswith("depth.") or "layers.1" in n)
    _, actual = gradients(turbo)
    assert actual.keys() == {n for n, p in turbo.named_parameters() if p.requires_grad}
    whole = turbo_of(stock_of("llama"))
    _, want = gradients(whole)
    for n, g in actual.items():
        torch.testing.assert_close(g, want[n], rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("one_capture")
def test_gradients_flow_through_a_cache():
    turbo = turbo_of(stock_of("llama"))
    ids = zoo.batch([9, 9])["input_ids"]
    turbo(input_ids=ids).logits[:, 6:].square().sum().backward()
    want = {n: p.grad.clone() for n, p in turbo.named_parameters()}
    turbo.zero_grad()
    cache = dp.DepthCache(turbo)
    turbo(input_ids=ids[:, :4], past_key_values=cache)
    turbo(input_ids=ids[:, 4:6], past_key_values=cache)
    turbo(input_ids=ids[:, 6:], past_key_values=cache).logits.square().sum().backward()
    for n, g in want.items():
        torch.testing.assert_close(dict(turbo.named_parameters())[n].grad, g, rtol=1e-3, atol=1e-4 * float(g.abs().max()))
