"""Huginn and Ouro as recipes: specs, losses of both stages written out from the formulas, exits chosen at decode."""

import math

import pytest
import torch
import zoo
from turbos import enliven

import depthpass as dp

TIMES = 3


def ouro(**options):
    stock = enliven(zoo.model("llama", 2, dtype=torch.float64), std=0.3)
    model = dp.recipes.ouro(times=TIMES, exit=0.6, **options).transform(stock)
    enliven(model.depth, seed=1, std=0.5, least=1)
    return stock, model


def test_the_second_stage_trains_gates_alone():
    stock, model = ouro(stage=2)
    gate = model.depth.loop.exit
    assert {id(p) for p in dp.only_gates(model)} == {id(gate.weight), id(gate.bias)}
    ids = zoo.batch([7, 7])["input_ids"]
    labels = ids.clone()
    labels[0, :3] = -100
    loss = dp.gate_loss(model(ids), labels)
    loss.backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {"depth.loop.exit.weight", "depth.loop.exit.bias"}
    got = [gate.weight.grad.clone(), gate.bias.grad.clone()]
    gate.zero_grad()
    # The stack (which ends in the norm) and the gate, by hand, token by token.
    state, logits, lambdas = stock.model.embed_tokens(ids), [], []
    for _ in range(TIMES):
        state = stock.model(inputs_embeds=state, use_cache=False).last_hidden_state.detach()
        logits.append(stock.lm_head(state).detach())
        lambdas.append(torch.sigmoid(state @ gate.weight[0] + gate.bias[0]))
    total, count = 0.0, 0
    for r in range(2):
        for i in range(6):
            y = int(labels[r, i + 1])
            if y < 0:
                continue
            losses = [float(z[r, i].logsumexp(0) - z[r, i, y]) for z in logits]
            for t in range(1, TIMES):
                w = 1 / (1 + math.exp(-50.0 * (max(0.0, losses[t - 1] - losses[t]) - 0.005)))
                total = total - w * (1 - lambdas[t][r, i]).log() - (1 - w) * lambdas[t][r, i].log()
            count += 1
    want = total / TIMES / count
    torch.testing.assert_close(loss, want, rtol=1e-8, atol=1e-8)
    want.backward()
    for mine, theirs in zip(got, (gate.weight.grad, gate.bias.grad), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(dp.gate_loss(model(ids), labels, num_items_in_batch=2 * count), want / 2)
    with pytest.raises(dp.InputError, match=r"gate_loss: expected logits and gates"):
        dp.gate_loss(dp.set_exit(model, 0.9, skip=True)(ids), labels)


def test_the_exit_is_chosen_at_decode():
    stock, model = ouro(stage=1)
    ids = zoo.batch([6, 6])["input_ids"]
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    trained = model.depth.state_dict()
    for q in (0.3, 0.9):
        dp.set_exit(model, q, skip=True)
        fresh = dp.recipes.ouro(times=TIMES, exit=q, stage=0).transform(stock)
        fresh.depth.load_state_dict(trained)
        out = model(ids)
        assert torch.equal(out.logits, fresh(ids).logits) and not hasattr(out, "taps")
        cached = model.generate(ids, **options)
        assert torch.equal(cached, model.generate(ids, **options, use_cache=False))
    assert torch.equal(dp.set_exit(model, 0.9, skip=True, kv="latest").generate(ids, **options),
                       model.generate(ids, **options, use_cache=False))
    dp.set_exit(model, 0.4, skip=False, kv="own")
    with pytest.raises(dp.SpecError, match=r"loop\.exit: expected a probability"):
        dp.set_exit(model, 1.5)
    plain = dp.transform(stock, dp.Loop(times=2))
    for call in (lambda: dp.set_exit(plain, 0.5), lambda: dp.only_gates(plain)):
        with pytest.raises(dp.SpecError, match="expected a loop with an exit"):
            call()


def test_huginn_on_a_stock_model():
    stock = enliven(zoo.model("llama", 6), std=0.2)
    recipe = dp.recipes.huginn(stock, prelude=1, core=2, coda=1, mean=3, most=6)
    model = recipe.transform(stock)
    assert [o["index"] for o in model.depth_program.visits] == [0, *[3, 4] * 3, 5]
    assert dp.recipes.huginn(6, prelude=1, core=2, coda=1, keep="early").spec[0].layers == (0, 1, 2, 5)
    ids = zoo.batch([6, 6])["input_ids"]
    model.train()
    counts = set()
    for _ in range(8):
        model(input_ids=ids, labels=ids).loss.backward()
        counts.add((len(model.depth_ran[0][0].visits) - 2) // 2)
    assert len(counts) > 1 and max(counts) <= 6
    model.eval()
    by_hand = dp.transform(stock, [dp.LayerProgram([0, 3, 4, 5]), dp.Loop(
        1, 3, times=3, inject="concat", state="noise", noise_std=math.sqrt(2 / 5), noise_cut=3.0, out_norm=True)])
    by_hand.depth.load_state_dict(model.depth.state_dict())
    assert torch.equal(model(ids).logits, by_hand(ids).logits)
    callback = recipe.callback()
    assert callback.fixed == 3 and callback.mean_at(0, 100) == 0 and callback.mean_at(25, 100) == 3
    exits = dp.recipes.huginn(stock, prelude=1, core=2, coda=1, times=6, mean=None, exit=2, criterion="argmax", kv="latest")
    decoding = dp.switch(model, list(exits.spec))
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    assert torch.equal(decoding.generate(ids, **options), decoding.generate(ids, **options, use_cache=False))
    assert "blocks [0, 3, 4, 5] of 6" in str(recipe)


def test_bad_input():
    with pytest.raises(dp.SpecError, match="expected at most the model's 4 blocks"):
        dp.recipes.huginn(4, prelude=2, core=4, coda=2)
    with pytest.raises(dp.SpecError, match=r"huginn\.keep: expected 'late' or 'early'"):
        dp.recipes.huginn(8, keep="all")
    with pytest.raises(dp.SpecError, match=r"ouro\.stage"):
        dp.recipes.ouro(stage=3)
    with pytest.raises(dp.SpecError, match=r"recipes\.huginn: mean: expected a number or null, got nan"):
        dp.recipes.huginn(8, mean=float("nan"))
    for recipe in (lambda **o: dp.recipes.huginn(8, **o), dp.recipes.ouro):
        with pytest.raises(dp.SpecError, match=r"unknown option 'criteron'\. Did you mean 'criterion'"):
            recipe(criteron="kl")
    with pytest.raises(dp.SpecError, match="expected a model, a config or a number"):
        dp.recipes.huginn("llama")
    with pytest.raises(dp.SpecError, match="with a curriculum"):
        dp.recipes.ouro().callback()
