"""Iteration-wise supervision and the logit lens: what taps are for."""

import pytest
import torch
import zoo
from turbos import enliven

import depthpass as dp

PAD = 0


def transformed(spec, layers=3, dtype=torch.float64):
    stock = enliven(zoo.model("llama", layers, dtype=dtype), std=0.2)
    return stock, dp.transform(stock, spec)


def test_targets_are_right_aligned_and_the_mask_keeps_one_pad():
    targets, mask = dp.aligned_targets([[[5, 6, 7], [8]], [[9, 9, 9, 9, 9]]], 5, pad=PAD)
    assert targets.tolist() == [[[0, 0, 5, 6, 7], [9, 9, 9, 9, 9]], [[0, 0, 0, 0, 8], [0, 0, 0, 0, 0]]]
    assert mask.int().tolist() == [[[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]], [[0, 0, 0, 1, 1], [0, 0, 0, 0, 0]]]
    # Against the paper's lines: z = left_pad(round, n); m = (z != PAD) | is_last_pad(z).
    for z, m in zip(targets.flatten(0, 1), mask.flatten(0, 1)):
        if m.any():
            first = int((z != PAD).nonzero()[0])
            assert m.tolist() == [i >= max(0, first - 1) for i in range(5)]
    # A real token may have the pad's id: the mask goes by place.
    assert dp.aligned_targets([[[0, 3]]], 4)[1].int().tolist() == [[[0, 1, 1, 1]]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_targets_of_padded_rows(side):
    attention = zoo.batch([5, 3], side)["attention_mask"]
    targets, mask = dp.aligned_targets([[[7, 8]], [[7, 8]]], 5, attention_mask=attention, iterations=2)
    assert targets.shape == (2, 2, 5) and not mask[1].any()
    end = 5 if side == "left" else 3
    assert targets[0, 1].tolist() == [7 if i == end - 2 else 8 if i == end - 1 else 0 for i in range(5)]
    assert mask[0, 1].tolist() == [end - 3 <= i < end for i in range(5)]
    assert not (mask[0] & ~attention.bool()).any()


def test_relay_loss_is_the_papers_sum_and_reaches_earlier_visits_only():
    stock, model = transformed(dp.Loop(1, 2, times=3, lora_rank=2, taps=True))
    enliven(model.depth, seed=1, std=0.3, least=1)
    ids = zoo.batch([6, 6])["input_ids"]
    rounds = [[[5, 6], [7, 8, 9], [10]], [[11], [12, 13, 14, 15, 16, 17]]]
    targets, mask = dp.aligned_targets(rounds, 6, iterations=dp.loops_of(model))
    out = model(ids)
    want = 0.0
    for t in range(3):
        alone = dp.set_loops(dp.transform(stock, dp.Loop(1, 2, times=3, lora_rank=2)), t + 1)
        alone.depth.load_state_dict(model.depth.state_dict())
        logp = alone(ids).logits.log_softmax(-1)
        for r in range(2):
            for i in range(6):
                if mask[t, r, i]:
                    want = want - 0.3 / 3 * logp[r, i, targets[t, r, i]]
    torch.testing.assert_close(dp.relay_loss(out, targets, mask, weight=0.3), want, rtol=1e-9, atol=1e-9)
    only = mask.clone()
    only[[0, 2]] = False
    dp.relay_loss(out.taps, targets, only, scope="loop").backward()
    names = {n.split(".")[1] for n, p in model.depth.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert names == {"t0", "t1"}
    mean = dp.relay_loss(model(ids), targets, mask, reduction="mean")
    assert 0 < mean < dp.relay_loss(model(ids), targets, mask)


def test_relay_with_a_head_of_its_own_trains():
    _, model = transformed([dp.Loop(0, 2, times=2), dp.Taps(at=[1, 3], scope="round")], layers=2, dtype=torch.float32)
    head = torch.nn.Linear(32, 20)
    optimizer = torch.optim.Adam([*model.parameters(), *head.parameters()], lr=1e-2)
    ids = zoo.batch([5, 5])["input_ids"]
    targets, mask = dp.aligned_targets([[[1, 2], [3, 4]], [[5], [6]]], 5)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        out = model(ids, labels=ids)
        loss = dp.relay_loss(out, targets, mask, head=head, scope="round")
        (out.loss + loss).backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_bad_relay_input():
    _, model = transformed(dp.Loop(1, 2, times=2, taps=True))
    ids = zoo.batch([5, 5])["input_ids"]
    targets, mask = dp.aligned_targets([[[3]], [[4]]], 5)
    with pytest.raises(dp.InputError, match=r"for 2 taps \(loop.t1, loop.t2\), got shapes \(1, 2, 5\)"):
        dp.relay_loss(model(ids), targets, mask)
    with pytest.raises(dp.InputError, match="expected taps, got an output without them"):
        dp.relay_loss(dp.restore(model)(ids), targets, mask)
    for rounds, word in (([[[1] * 6]], "1 to 5 tokens"), ([[[]]], "1 to 5 tokens"), ([[]], "got 0"), ([[[1], [2]]], "got 2")):
        with pytest.raises(dp.InputError, match=word):
            dp.aligned_targets(rounds, 5, iterations=1)
    with pytest.raises(dp.InputError, match="empty one"):
        dp.relay_loss(model(ids), targets.expand(2, -1, -1), torch.zeros(2, 2, 5, dtype=torch.bool))


def test_logit_lens_of_iterations_and_visits():
    stock, model = transformed(dp.Loop(1, 3, times=3, inject="add"), dtype=torch.float32)
    batch = zoo.batch([7, 4], "right")
    lens = dp.logit_lens(model, batch, top=3)
    assert lens.names == ("loop.t1", "loop.t2", "loop.t3", "output") and lens.last == (6, 3)
    for t in (1, 2, 3):
        logits = dp.transform(stock, dp.Loop(1, 3, times=t, inject="add"))(**batch).logits
        assert torch.equal(lens.tokens[t - 1, 0], logits[0].topk(3).indices)
    assert lens.kl[-1].abs().max() == 0 and lens.kl[-2].abs().max() < 1e-5 and (lens.kl[0, 0] > 1e-4).all()
    rows = lens.rows(row=1)
    assert [r["tap"] for r in rows] == list(lens.names) and rows[-1]["tokens"] == rows[-2]["tokens"]
    assert lens.settled_at() in lens.names and "loop.t2" in str(lens)
    assert model.depth_spec == dp.dump_spec(dp.Loop(1, 3, times=3, inject="add")) and not model.training
    visits = dp.logit_lens(dp.switch(model, dp.LayerProgram([0, 2, 2])).train(), batch["input_ids"], at="visits")
    assert visits.names == ("lens.v0", "lens.v1", "lens.v2", "output") and model.training
    with pytest.raises(dp.InputError, match=r"without\. Pass at='visits'"):
        dp.logit_lens(model, batch)

    class Words:
        def decode(self, ids):
            return f"w{ids[0]}"

    assert "'w" in str(dp.logit_lens(model, batch, at="visits", tokenizer=Words()))


@pytest.mark.parametrize("spec", [dp.IntraLayerRecurrence([2, 1, 3]), dp.Loop(0, 2, times=3, inject="add", kv="first")])
def test_gradients_of_visits_add_up(spec):
    _, model = transformed(spec)
    ids = zoo.batch([6, 6])["input_ids"]
    grads = dp.gradients(model, {"input_ids": ids, "labels": ids}, keep=True)
    model(ids, labels=ids).loss.backward()
    for index in range(3):
        visits = [o.name for o in model.depth_program.visits if o["index"] == index]
        for name in ("self_attn.q_proj.weight", "mlp.up_proj.weight"):
            parts = [grads.tensors[v, name] for v in visits]
            assert min(p.abs().max() for p in parts) > 1e-6 and len(parts) == len(set(visits))
            torch.testing.assert_close(sum(parts), model.model.layers[index].get_parameter(name).grad, rtol=1e-5, atol=1e-9)
