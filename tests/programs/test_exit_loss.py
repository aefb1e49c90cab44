"""Ouro's losses of an exit gate, against sums over tokens written out from the formulas: float64, values and gradients."""

import math

import pytest
import torch
import zoo
from turbos import enliven

import depthpass as dp

TIMES = 3


def transformed(name="llama"):
    stock = enliven(zoo.model(name, 2, dtype=torch.float64), std=0.3)
    model = dp.transform(stock, dp.Loop(times=TIMES, normalize="loop", exit=0.9, skip=False, taps=True))
    enliven(model.depth, seed=1, std=0.5, least=1)
    return stock, model


def written_out(stock, model, ids, labels, form, beta):
    """Stack (which ends in the norm) and gate run by hand; probabilities and losses token by token."""
    gate, stack = model.depth.loop.exit, stock.model
    state = stack.embed_tokens(ids)
    logits, lambdas = [], []
    for _ in range(TIMES):
        state = stack(inputs_embeds=state, use_cache=False).last_hidden_state
        logits.append(stock.lm_head(state))
        lambdas.append(torch.sigmoid(state @ gate.weight[0] + gate.bias[0]))
    total, count = 0.0, 0
    for r, i in [(r, i) for r in range(ids.shape[0]) for i in range(ids.shape[1] - 1)]:
        y = int(labels[r, i + 1])
        if y < 0:
            continue
        p, left = [], 1.0
        for t in range(TIMES - 1):
            p.append(left * lambdas[t][r, i])
            left = left - p[-1]
        p.append(left)
        z = [x[r, i] for x in logits]
        if form == "mixture":
            mixed = sum(w * x for w, x in zip(p, z))
            total = total + mixed.logsumexp(0) - mixed[y]
        else:
            total = total + sum(w * (x.logsumexp(0) - x[y]) for w, x in zip(p, z))
        total = total + beta * sum(w * (w.log() + math.log(TIMES)) for w in p)
        count += 1
    return total / count


@pytest.mark.parametrize(("form", "beta"), [("mixture", 0.0), ("mixture", 0.1), ("expected", 0.1)])
def test_losses_of_the_gate_are_the_written_out_ones(form, beta):
    stock, model = transformed()
    ids = zoo.batch([7, 7])["input_ids"]
    labels = ids.clone()
    labels[0, :3] = -100
    loss = dp.exit_loss(model(ids), labels, form=form, beta=beta)
    loss.backward()
    mine = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    want = written_out(stock, model, ids, labels, form, beta)
    want.backward()
    torch.testing.assert_close(loss, want, rtol=1e-10, atol=1e-10)
    gate = {f"depth.loop.exit.{k}": getattr(model.depth.loop.exit, k).grad for k in ("weight", "bias")}
    theirs = {n: p.grad for n, p in stock.named_parameters() if p.grad is not None} | gate
    assert mine.keys() == theirs.keys()
    for n, g in theirs.items():
        # Llama's norms compute in float32, and here they run once where the program runs them twice.
        assert (mine[n] - g).abs().max() <= 1e-6 * g.abs().max().clamp_min(1e-12), n


def test_forms_agree_where_the_gate_is_certain_and_items_set_the_scale():
    stock, model = transformed()
    ids = zoo.batch([6, 6])["input_ids"]
    with torch.no_grad():
        model.depth.loop.exit.weight.zero_()
        model.depth.loop.exit.bias.fill_(80.0)
        out = model(ids)
        both = [dp.exit_loss(out, ids, form=form) for form in ("mixture", "expected")]
        once = stock(ids, labels=ids)
    for loss in both:
        torch.testing.assert_close(loss.float(), once.loss.float())
    torch.testing.assert_close(dp.exit_loss(out, ids, num_items_in_batch=20), both[0] / 2)


@pytest.mark.parametrize(("options", "change", "message"), [
    ({"form": "mixed"}, {}, "form: expected 'mixture' or 'expected'"),
    ({"beta": float("nan")}, {}, "beta: expected a finite number, got nan"),
    ({"scope": "other"}, {}, r"got taps without other\.t1"),
    ({}, {"labels": torch.zeros(2, 5, dtype=torch.long)}, r"labels: expected shape \(2, 6\), got \(2, 5\)"),
    ({}, {"labels": torch.full((2, 6), -100)}, "a token to learn from"),
    ({}, {"drop": "loop.t2.exit"}, r"got taps without loop\.t2\.exit"),
])
def test_what_does_not_fit_is_refused(options, change, message):
    _, model = transformed()
    ids = zoo.batch([6, 6])["input_ids"]
    with torch.no_grad():
        taps = dict(model(ids).taps)
    taps.pop(change.get("drop"), None)
    with pytest.raises(dp.InputError, match=message):
        dp.exit_loss(taps, change.get("labels", ids), **options)
    with pytest.raises(dp.InputError, match=r"got taps without loop\.t1"):
        dp.exit_loss(dp.restore(model)(ids), ids)
