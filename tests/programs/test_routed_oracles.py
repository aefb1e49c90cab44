"""Token choice, shared stacks, training losses, Mixture-of-Depths and readings of Inner Thinking against naive oracles."""

import itertools
import math

import numpy as np
import oracle_program as oracle
import pytest
import torch
import torch.nn.functional as F
import zoo
from turbos import enliven

import depthpass as dp
from depthpass.ir import plain
from depthpass.passes import Context, apply_spec

LENGTHS = [8, 5]
FOUR = ("llama", "qwen3", "gpt2", "mixtral")


def transformed(name, spec, layers=3):
    stock = enliven(zoo.model(name, layers, dtype=torch.float64), std=0.2)
    for module in stock.modules():
        if isinstance(module, torch.nn.Dropout):  # GPT-2's: oracles of training losses have none
            module.p = 0.0
    model = dp.transform(stock, spec)
    enliven(model.depth, seed=1, std=0.4, least=1)
    return stock, model


def token_choice(row, before, stack, after, recursions, router, *, kv="recursion", bias=None):
    """The oracle; returns the stream and every token's depth."""
    run = {b: oracle.Keys() for b in (*before, *after)}
    streams = list(row.embed)
    for b in before:
        streams = [row.block(b, x, i, oracle.own(run[b])) for i, x in enumerate(streams)]
    p = [torch.softmax(router @ x, -1) for x in streams]
    depth = [int((q if bias is None else q + bias).argmax()) + 1 for q in p]
    cur, slots = list(streams), {}
    for r in range(1, recursions + 1):
        for i in (i for i, d in enumerate(depth) if d >= r):
            y = cur[i]
            for b in stack:
                keys = slots.setdefault((r, b), oracle.Keys())
                first = slots.get((1, b))
                reads = oracle.own(keys)
                if kv != "recursion" and r > 1:
                    reads = oracle.shared(first) if kv == "shared" else oracle.updated(first, keys)
                y = row.block(b, y, i, reads)
            cur[i] = y
    streams = [x + q[d - 1] * y for x, q, d, y in zip(streams, p, depth, cur)]
    for b in after:
        streams = [row.block(b, x, i, oracle.own(run[b])) for i, x in enumerate(streams)]
    return torch.stack(streams), depth, torch.stack(p)


@pytest.mark.parametrize(("name", "kv"), [
    *((n, "recursion") for n in FOUR), ("llama", "shared"), ("gpt2", "updated"), ("mistral", "updated"),
])
def test_token_choice(name, kv):
    stock, model = transformed(name, dp.MixtureOfRecursions(start=1, router="token", kv=kv))
    seen = []

    def want(row, p):
        stream, depth, _ = token_choice(row, [0], [1], [2], 3, p["mor.router.weight"], kv=kv)
        seen.extend(depth)
        return stream

    batch = zoo.batch(LENGTHS, "left")
    oracle.compare(stock, model.eval(), batch, want)
    assert len(set(seen)) > 1
    if kv == "updated":
        assert "attend 1" in str(model.depth_lowered) and " update true  reads slot 1, slot 2" in str(model.depth_lowered)
        ids, mask, cache = batch["input_ids"], batch["attention_mask"], dp.DepthCache(model)
        with torch.no_grad():
            whole = model(**batch, use_cache=False).logits
            for first, last in ((0, 3), (3, 4), (4, 5), (5, ids.shape[1])):
                step = model(input_ids=ids[:, first:last], attention_mask=mask[:, :last], past_key_values=cache).logits
                real = mask[:, first:last].bool()
                torch.testing.assert_close(step[real], whole[:, first:last][real], rtol=1e-9, atol=1e-9)


def test_a_balancing_bias_moves_choices_and_not_weights():
    stock, model = transformed("llama", dp.MixtureOfRecursions(start=1, router="token", balancing="loss_free", rate=0.25))
    batch = zoo.batch(LENGTHS)
    bias = model.depth.mor.balance.bias
    bias.copy_(torch.tensor([-0.3, 0.2, 0.1]))
    before = bias.clone()
    model.eval()
    oracle.compare(stock, model, batch, lambda row, p: token_choice(
        row, [0], [1], [2], 3, p["mor.router.weight"], bias=before)[0])
    assert torch.equal(bias, before), "only training moves the bias"
    load = torch.zeros(3)
    with oracle.oracle_attention(stock), torch.no_grad():
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"].bool()):
            row = oracle.Row(stock, ids[mask], torch.arange(8)[mask])
            for d in token_choice(row, [0], [1], [2], 3, model.depth.mor.router.weight, bias=before)[1]:
                load[d - 1] += 1
    model.train()(**batch)
    torch.testing.assert_close(bias - before, 0.25 * torch.sign(load.mean() - load).double())


def test_positions_of_the_shared_layers_are_those_of_the_public_code():
    """``round(linspace(first, last, b))`` over positions in the whole stack, for every count up to 40 layers."""
    for layers, recursions, sharing in itertools.product(range(3, 41), range(1, 20), ("middle_cycle", "cycle")):
        edge = int(sharing == "middle_cycle")
        if (shared := layers - 2 * edge) < 1 or shared % recursions:
            continue
        program = plain("LlamaForCausalLM", layers, 8)
        spec = dp.MixtureOfRecursions(sharing=sharing, recursions=recursions)
        rewritten = apply_spec(program, [spec], Context.of(program))
        retired = {o["index"] for o in rewritten if o.kind == "retire"}
        want = {round(float(x)) for x in np.linspace(edge, layers - 1 - edge, shared // recursions)}
        assert set(range(edge, layers - edge)) - retired == want, (layers, recursions, sharing)


def bce(logit, taken):
    return F.softplus(-logit if taken else logit)


@pytest.mark.parametrize("name", FOUR)
def test_losses_of_expert_choice_and_their_gradients(name):
    stock, model = transformed(name, dp.MixtureOfRecursions(start=1, recursions=3, aux=0.5, z=0.25))
    batch = zoo.batch(LENGTHS, "left")
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    labels = torch.where(mask, ids, -100)
    out = model.train()(**batch, labels=labels)
    weight = torch.randn(out.logits.shape, generator=torch.Generator().manual_seed(3), dtype=out.logits.dtype)
    ((out.logits * weight)[mask].sum() + 0.5 * out.losses["mor.aux"] + 0.25 * out.losses["mor.z"]).backward()
    mine = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    plain = model.eval()(**batch, labels=labels)
    model.zero_grad()
    values = {n: p.detach().clone().requires_grad_() for n, p in model.depth.named_parameters()}
    routers = [values[f"mor.r{r}.router.weight"] for r in (1, 2, 3)]
    terms, scores, want = {r: [] for r in range(3)}, {r: [] for r in range(3)}, 0.0
    with oracle.oracle_attention(stock):
        for r in range(len(ids)):
            row = oracle.Row(stock, ids[r, mask[r]], torch.arange(8)[mask[r]])
            logits = row.logits(_scored(row, routers, terms, scores))
            want = want + (logits * weight[r, mask[r]]).sum()
        aux = sum(torch.stack(t).mean() for t in terms.values())
        z = sum(torch.stack(s).square().mean() for s in scores.values())
        (want + 0.5 * aux + 0.25 * z).backward()
    torch.testing.assert_close(out.losses["mor.aux"], aux)
    torch.testing.assert_close(out.losses["mor.z"], z)
    # The stock loss is computed in float32.
    torch.testing.assert_close(out.loss, (plain.loss + 0.5 * aux + 0.25 * z).float())
    theirs = {n: p.grad for n, p in stock.named_parameters() if p.grad is not None}
    theirs |= {f"depth.{n}": v.grad for n, v in values.items()}
    for n, g in theirs.items():
        assert (mine[n] - g).abs().max() <= 1e-8 * g.abs().max().clamp_min(1e-12), n


def _scored(row, routers, terms, scores):
    """The mixture over block 1 of three, with the cross-entropy terms and scores of every router."""
    slots = [oracle.Keys() for _ in range(2)]
    streams = [row.block(0, x, i, oracle.own(slots[0])) for i, x in enumerate(row.embed)]
    active = list(range(row.tokens))
    for r, router in enumerate(routers):
        s = [router.flatten() @ x for x in streams]
        scores[r] += [s[i] for i in active]
        taken = oracle.best([torch.sigmoid(v).item() for v in s], active, max(1, (3 - r) * row.tokens // 3))
        terms[r] += [bce(s[i], i in taken) for i in active]
        keys, new = oracle.Keys(), list(streams)
        for i in taken:
            new[i] = streams[i] + 0.1 * torch.sigmoid(s[i]) * row.block(1, streams[i], i, oracle.own(keys))
        streams, active = new, taken
    return torch.stack([row.block(2, x, i, oracle.own(slots[1])) for i, x in enumerate(streams)])


def test_losses_of_token_choice():
    stock, model = transformed("llama", dp.MixtureOfRecursions(start=1, router="token", balance=0.3, z=0.2))
    batch = zoo.batch(LENGTHS, "left")
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    labels = torch.where(mask, ids, -100)
    out = model.train()(**batch, labels=labels)
    router = model.depth.mor.router.weight
    p, s = [], []
    with oracle.oracle_attention(stock):
        for r in range(2):
            row = oracle.Row(stock, ids[r, mask[r]], torch.arange(8)[mask[r]])
            x = [row.block(0, e, i, v) for v in [oracle.own(oracle.Keys())] for i, e in enumerate(row.embed)]
            s += [router @ v for v in x]
    p = torch.softmax(torch.stack(s), -1)
    share = torch.tensor([float((p.argmax(-1) == j).double().mean()) for j in range(3)], dtype=torch.float64)
    balance, z = 3 * (share * p.mean(0)).sum(), torch.stack(s).logsumexp(-1).square().mean()
    torch.testing.assert_close(out.losses["mor.balance"], balance)
    torch.testing.assert_close(out.losses["mor.z"], z)
    rest = model.eval()(**batch, labels=labels).loss
    torch.testing.assert_close(out.loss, (rest + 0.3 * balance + 0.2 * z).float())
    mine = torch.autograd.grad(out.losses["mor.balance"], router, retain_graph=True)[0]
    torch.testing.assert_close(mine, torch.autograd.grad(balance, router)[0], rtol=1e-8, atol=1e-10)


def test_losses_are_scaled_like_the_summed_loss_of_a_trainer():
    _, model = transformed("llama", dp.MixtureOfRecursions(start=1, aux=0.5))
    batch = zoo.batch([6, 6])
    model.train()
    whole = model(**batch, labels=batch["input_ids"])
    half = model(**batch, labels=batch["input_ids"], num_items_in_batch=torch.tensor(20))
    torch.testing.assert_close(half.loss, whole.loss / 2)


SHARINGS = {
    ("middle_cycle", 3): (8, [0], [[1, 6]], [7]), ("cycle", 3): (6, [], [[0, 5]], []),
    ("middle_sequence", 3): (8, [0], [[1], [6]], [7]), ("sequence", 3): (6, [], [[0], [5]], []),
    # A tie: the public code rounds 3.5 of the whole stack, not 2.5 of its shared part.
    ("middle_cycle", 2): (8, [0], [[1, 4, 6]], [7]), ("middle_sequence", 2): (8, [0], [[1], [4], [6]], [7]),
}


@pytest.mark.parametrize(("sharing", "recursions"), SHARINGS)
def test_a_stack_becomes_a_shared_one(sharing, recursions):
    layers, before, stacks, after = SHARINGS[sharing, recursions]
    spec = dp.MixtureOfRecursions(sharing=sharing, recursions=recursions, aux=0.0)
    stock, model = transformed("llama", spec, layers)

    def want(row, p):
        streams = list(row.embed)
        for b in before:
            keys = oracle.Keys()
            streams = [row.block(b, x, i, oracle.own(keys)) for i, x in enumerate(streams)]
        for j, stack in enumerate(stacks):
            prefix = f"mor.s{j}" if "sequence" in sharing else "mor"
            active = list(range(row.tokens))
            for r in range(1, recursions + 1):
                chance = [torch.sigmoid(p[f"{prefix}.r{r}.router.weight"].flatten() @ x) for x in streams]
                share = max(1, (recursions + 1 - r) * row.tokens // recursions)
                active = oracle.best([c.item() for c in chance], active, share)
                y = {i: streams[i] for i in active}
                for b in stack:
                    keys = oracle.Keys()
                    y = {i: row.block(b, v, i, oracle.own(keys)) for i, v in y.items()}
                streams = [x + 0.1 * chance[i] * y[i] if i in y else x for i, x in enumerate(streams)]
        for b in after:
            keys = oracle.Keys()
            streams = [row.block(b, x, i, oracle.own(keys)) for i, x in enumerate(streams)]
        return torch.stack(streams)

    used = {*before, *after, *(b for s in stacks for b in s)}
    for i, block in enumerate(model.model.layers):
        assert all(p.requires_grad == (i in used) for p in block.parameters())
    oracle.compare(stock, model, zoo.batch(LENGTHS), want)


def test_averaged_blocks_are_new_tensors_and_one_each(tmp_path):
    stock = zoo.model("llama", 8, dtype=torch.float64)
    held = {n: p.clone() for n, p in stock.named_parameters()}
    model = dp.transform(stock, dp.MixtureOfRecursions(init="average", mode="threshold"))
    for block, tied in ((1, (1, 3, 5)), (2, (2, 4, 6))):
        for n, p in model.model.layers[block].named_parameters():
            want = torch.stack([held[f"model.layers.{i}.{n}"] for i in tied]).mean(0)
            torch.testing.assert_close(p.data, want)
    assert all(p.requires_grad and torch.equal(p, held[n]) for n, p in stock.named_parameters())
    assert {v["index"] for v in model.depth_program.visits} == {0, 1, 2, 7}
    batch = zoo.batch(LENGTHS)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    model.save_pretrained(tmp_path)
    loaded = dp.from_pretrained(tmp_path).double()
    assert [n for n, p in loaded.named_parameters() if not p.requires_grad] == [
        n for n, p in model.named_parameters() if not p.requires_grad
    ]
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, model.eval()(**batch).logits)
    assert all(p.requires_grad for p in dp.restore(model).parameters())


def test_blocks_that_differ_are_not_averaged():
    stock = zoo.model("llama", 8)
    stock.model.layers[3].mlp.up_proj = torch.nn.Linear(16, 3, bias=False)
    with pytest.raises(dp.UnsupportedModelError, match=r"blocks 1 and 3 cannot be averaged: mlp\.up_proj\.weight"):
        dp.transform(stock, dp.MixtureOfRecursions(init="average"))


DEPTHS = {
    "topk": {"capacity": 0.5}, "delta": {"capacity": 0.3, "combine": "delta", "weight": "sigmoid"},
    "threshold": {"mode": "threshold"},
}


@pytest.mark.parametrize(("name", "kind"), [("llama", k) for k in DEPTHS] + [(n, "topk") for n in FOUR[1:]])
def test_mixture_of_depths(name, kind):
    options = DEPTHS[kind]
    stock, model = transformed(name, dp.MixtureOfDepths(**options))

    def want(row, p):
        streams = list(row.embed)
        for b in range(3):
            keys = oracle.Keys()
            if b != 1:
                streams = [row.block(b, x, i, oracle.own(keys)) for i, x in enumerate(streams)]
                continue
            r = [p["mod.v1.router.weight"].flatten() @ x for x in streams]
            w = [torch.sigmoid(v) if options.get("weight") == "sigmoid" else v for v in r]
            taken = [i for i, v in enumerate(r) if v >= 0]
            if kind != "threshold":
                taken = oracle.best([v.item() for v in r], range(row.tokens), max(1, int(options["capacity"] * row.tokens)))
            new = list(streams)
            for i in taken:
                y = row.block(b, streams[i], i, oracle.own(keys))
                new[i] = streams[i] + w[i] * (y - streams[i] if options.get("combine") == "delta" else y)
            streams = new
        return torch.stack(streams)

    oracle.compare(stock, model, zoo.batch(LENGTHS, "left"), want)


READINGS = {
    "tanh": {"weight": "tanh", "alpha": (0.5, 2.0)}, "symmetric": {"weight": "symmetric"},
    "symmetric threshold": {"weight": "symmetric", "mode": "threshold"}, "routed keys": {"keys": "routed"},
    "routed keys, threshold": {"keys": "routed", "mode": "threshold"},
}


@pytest.mark.parametrize(("name", "kind"), [("llama", k) for k in READINGS] + [(n, "tanh") for n in FOUR[1:]])
def test_readings_of_inner_thinking(name, kind):
    options = READINGS[kind]
    stock, model = transformed(name, dp.InnerThinking(
        blocks=[1], steps=3, **options, **({} if "mode" in options else {"ratios": (0.6, 0.3)})
    ))
    weight = {"tanh": torch.tanh, "symmetric": lambda s: 2 * torch.sigmoid(s) - 1}.get(
        options.get("weight"), torch.sigmoid
    )

    def want(row, p):
        streams = list(row.embed)
        for b in range(3):
            keys = oracle.Keys()
            streams = [row.block(b, x, i, oracle.own(keys)) for i, x in enumerate(streams)]
            if b != 1:
                continue
            phi = [p[f"itt.v1.phi{t}.weight"] for t in range(3)]
            acc, cur = [phi[0] * y for y in streams], streams
            for t in (1, 2):
                s = [p[f"itt.v1.router{t}.weight"].flatten() @ x for x in cur]
                chosen = [i for i, v in enumerate(s) if v >= 0]
                if "mode" not in options:
                    chosen = oracle.best([v.item() for v in s], range(row.tokens), math.ceil((0.6, 0.3)[t - 1] * row.tokens))
                asks = chosen if options.get("keys") == "routed" else range(row.tokens)
                keys = oracle.Keys()
                z = {i: row.block(b, cur[i], i, oracle.own(keys)) for i in asks}
                alpha = options.get("alpha", (1.0, 1.0))[t - 1]
                acc = [a + phi[t] * alpha * weight(s[i]) * z[i] if i in chosen else a for i, a in enumerate(acc)]
                cur = acc
            streams = cur
        return torch.stack(streams)

    oracle.compare(stock, model, zoo.batch(LENGTHS, "left"), want)
