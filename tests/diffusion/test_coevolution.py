"""Coevolutionary diffusion against a hand-written loop on the stock model, in float64."""

import math

import diffusion_oracle as oracle
import pytest
import torch
import torch.nn.functional as F
import zoo

import depthpass as dp
from depthpass.diffusion.noise import moved
from depthpass.errors import InputError

MASK, LATENT, W = 96, 5, 32


@pytest.fixture(scope="module")
def stock():
    return zoo.model("llama", layers=2, dtype=torch.float64)


@pytest.fixture(scope="module")
def table():
    return torch.randn(zoo.VOCABULARY, LATENT, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.fixture(scope="module")
def coevolving(stock, table):
    model = dp.CoevolutionaryDiffusion(stock, lambda ids, mask: table[ids], steps=4, mask_token=MASK, latent=LATENT,
                                       weight="min_snr", cont_weight=0.7, disc_weight=1.3)
    g = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for part in (model.enter, model.time, model.leave):
            for p in part.parameters():
                p.copy_(torch.randn(p.shape, generator=g, dtype=p.dtype) * 0.3)
    return model


def by_hand(stock, coevolving, ids, state, time, seen):
    """Logits and clean state, from the stock model's parts and the new weights."""
    angles = 1000 * time[:, None].float() * torch.exp(-math.log(10_000) * torch.arange(128) / 128)
    clock = torch.cat((angles.cos(), angles.sin()), -1).double()
    first, _, last = coevolving.time
    clock = F.linear(F.silu(F.linear(clock, first.weight, first.bias)), last.weight, last.bias)
    x = stock.model.embed_tokens.weight[ids] + state @ coevolving.enter.weight.T + clock[:, None]
    kept = []
    handle = stock.model.layers[-1].register_forward_hook(lambda m, a, out: kept.append(out if torch.is_tensor(out) else out[0]))
    out = oracle.logits(stock, seen, inputs_embeds=x).clone()
    handle.remove()
    out[..., MASK] = float("-inf")
    norm, leave = coevolving.leave
    return out, F.linear(F.layer_norm(kept[0], (W,), norm.weight, norm.bias), leave.weight, leave.bias)


def clean_of(table, ids):
    z = table[ids]
    return (z - z.mean(-1, keepdim=True)) / (z.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()


def test_one_pass_and_its_gradients(stock, table, coevolving):
    ids, seen = zoo.batch([9, 6])["input_ids"] % MASK, zoo.batch([9, 6])["attention_mask"].bool()
    state, time = torch.randn(2, 9, LATENT, dtype=torch.float64), torch.tensor([0.3, 0.8])
    a, b = torch.randn(2, 9, zoo.VOCABULARY, dtype=torch.float64), torch.randn(2, 9, LATENT, dtype=torch.float64)
    keep = torch.arange(zoo.VOCABULARY) != MASK
    collected = {}
    both = ("program", coevolving(ids, state, time, seen)), ("hand", by_hand(stock, coevolving, ids, state, time, seen))
    for name, (logits, z) in both:
        coevolving.zero_grad()
        stock.zero_grad()
        ((logits * a)[seen][:, keep].sum() + (z * b)[seen].sum()).backward()
        parameters = [p for m in (stock, coevolving.enter, coevolving.time, coevolving.leave) for p in m.parameters()]
        collected[name] = logits[seen].detach(), z[seen].detach(), [p.grad.clone() for p in parameters]
    for x, y in zip(collected["program"][:2], collected["hand"][:2]):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)
    for x, y in zip(collected["program"][2], collected["hand"][2]):
        torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-9)


def test_the_loss_of_both(stock, table, coevolving):
    ids = zoo.batch([8, 8])["input_ids"] % MASK
    labels = ids.clone()
    labels[0, :2] = -100
    g = torch.Generator().manual_seed(6)
    time, masked = torch.tensor([0.4, 0.7]), torch.rand(2, 8, generator=g) < 0.5
    noise = torch.randn(2, 8, LATENT, generator=g, dtype=torch.float64)
    may, seen = labels != -100, torch.ones(2, 8, dtype=torch.bool)
    state = torch.sqrt(1 - time)[:, None, None].double() * clean_of(table, ids) + torch.sqrt(time)[:, None, None].double() * noise
    logits, z = by_hand(stock, coevolving, ids.masked_fill(masked & may, MASK), state, time, seen)
    each = F.cross_entropy(logits.transpose(1, 2), ids, reduction="none")
    snr = ((1 - time) / time).clamp(max=5)
    want = (1.3 * (torch.where(masked & may, each, 0.0) / time[:, None]).sum()
            + 0.7 * (((z - clean_of(table, ids)) ** 2).mean(-1) * snr[:, None])[may].sum()) / may.sum()
    got = coevolving.loss(ids, labels=labels, time=time, masked=masked, noise=noise)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    seeded = [coevolving.loss(ids, generator=torch.Generator().manual_seed(s)).item() for s in (1, 1, 2)]
    assert seeded[0] == seeded[1] != seeded[2]


@pytest.mark.parametrize("schedule", ["vp", "flow"])
def test_samplers_keep_the_distribution(schedule):
    """From z_t of the right mean and variance each sampler makes z_s of the right mean and variance."""
    n, z0, now, then = 200_000, 1.7, 0.8, 0.3
    alpha, sigma = ((1 - now) ** 0.5, now**0.5) if schedule == "vp" else (1 - now, now)
    want = ((1 - then) ** 0.5, then**0.5) if schedule == "vp" else (1 - then, then)
    g = torch.Generator().manual_seed(0)
    state, clean = alpha * z0 + sigma * torch.randn(n, generator=g), torch.full((n,), z0)
    for sampler in ("ode", "sde", "renoise"):
        z = moved(state, clean, now, then, schedule, sampler, g)
        assert z.mean().item() == pytest.approx(want[0] * z0, abs=0.01) and z.std().item() == pytest.approx(want[1], abs=0.01)
        end = moved(state, clean, now, 0.0, schedule, sampler, g)
        torch.testing.assert_close(end, clean, rtol=0, atol=1e-6)
    # The posterior by Bayes: q(z_s | z_t, z0) is proportional to q(z_t | z_s) q(z_s | z0).
    one = torch.full((n,), 0.4)
    z = moved(one, clean, now, then, schedule, "sde", g)
    ratio = alpha / want[0]
    step = sigma**2 - ratio**2 * want[1] ** 2
    precision = ratio**2 / step + 1 / want[1] ** 2
    mean = (ratio / step * 0.4 + want[0] * z0 / want[1] ** 2) / precision
    assert z.mean().item() == pytest.approx(mean, abs=0.01) and z.std().item() == pytest.approx(precision**-0.5, abs=0.01)


def test_sampling_is_the_loop_of_the_paper(stock, table, coevolving):
    """Greedy tokens, deterministic state, guidance: step by step, both read both."""
    prompt = zoo.batch([4])["input_ids"] % MASK
    g = torch.Generator().manual_seed(8)
    ids, state = coevolving.sample(prompt, new_tokens=6, steps=3, order="left", temperature=0, guidance=1.5, generator=g)
    x = torch.cat((prompt, torch.full((1, 6), MASK)), 1)
    noise = torch.randn(1, 10, LATENT, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    z, known, seen = noise, clean_of(table, prompt), torch.ones(1, 10, dtype=torch.bool)
    with torch.no_grad():
        for i in range(3):
            now, then = 1 - i / 3, 1 - (i + 1) / 3
            z = torch.cat(((1 - now) ** 0.5 * known + now**0.5 * noise[:, :4], z[:, 4:]), 1)
            with_z, z0 = by_hand(stock, coevolving, x, z, torch.tensor([now]), seen)
            without, _ = by_hand(stock, coevolving, x, torch.zeros_like(z), torch.tensor([now]), seen)
            best = (1.5 * with_z - 0.5 * without)[..., :MASK].argmax(-1)
            z = (1 - then) ** 0.5 * z0 + (then / now) ** 0.5 * (z - (1 - now) ** 0.5 * z0)
            for place in range(4 + 2 * i, 6 + 2 * i):
                x[0, place] = best[0, place]
    assert torch.equal(ids, x)
    torch.testing.assert_close(state, z, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sampler", ["ode", "sde", "renoise"])
def test_every_sampler_fills_every_mask(coevolving, sampler):
    batch = zoo.batch([5, 3])
    for order in ("ancestral", "confidence"):
        a, b = (coevolving.sample(batch["input_ids"] % MASK, batch["attention_mask"], new_tokens=5, sampler=sampler, order=order,
                            generator=torch.Generator().manual_seed(1)) for _ in range(2))
        assert MASK not in a[0] and torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and a[1].shape == (2, 10, LATENT)


def test_a_new_model_starts_as_masked_diffusion_and_comes_back(stock, table, coevolving, tmp_path):
    def encoder(ids, mask):
        return table[ids]

    fresh = dp.CoevolutionaryDiffusion(stock, encoder, steps=4, mask_token=MASK, latent=LATENT)
    ids = zoo.batch([7])["input_ids"] % MASK
    plain = dp.transform(stock, dp.MaskedDiffusion(steps=4, mask_token=MASK))
    logits, _ = fresh(ids, torch.randn(1, 7, LATENT, dtype=torch.float64), torch.tensor([0.5]))
    keep = torch.arange(zoo.VOCABULARY) != MASK
    assert torch.equal(logits[..., keep], plain(input_ids=ids).logits[..., keep])
    coevolving.save_pretrained(tmp_path)
    again = dp.CoevolutionaryDiffusion.from_pretrained(tmp_path, encoder)
    again.double()
    state, time = torch.randn(1, 7, LATENT, dtype=torch.float64), torch.tensor([0.5])
    torch.testing.assert_close(again(ids, state, time), coevolving(ids, state, time), rtol=1e-6, atol=1e-6)
    assert again.settings == coevolving.settings
    report = dp.report(coevolving.model, seq_len=9, cost=False).to_text()
    assert "continuous state beside them" in report and "diffusion" not in report.split("What is proven")[1]


@pytest.mark.parametrize(("make", "message"), [
    (lambda s, t: dp.CoevolutionaryDiffusion(s, len, latent=LATENT), "mask_token"),
    (lambda s, t: dp.CoevolutionaryDiffusion(s, len, mask_token=3, latent=0), "latent"),
    (lambda s, t: dp.CoevolutionaryDiffusion(s, len, mask_token=3, latent=2, schedule="flaw"), "Did you mean 'flow'"),
    (lambda s, t: dp.CoevolutionaryDiffusion(s, len, mask_token=3, latent=2, wieght="snr"), "Known: latent"),
    (lambda s, t: t.loss(torch.ones(1, 3, dtype=torch.long), time=torch.tensor([1.0])), r"values in \(0, 1\)"),
    (lambda s, t: t.loss(torch.ones(1, 3, dtype=torch.long), time=torch.tensor([0.5, 0.5])), r"time: expected shape \(1,\)"),
    (lambda s, t: t.loss(torch.ones(1, 3, dtype=torch.long), masked=torch.ones(1, 2)), r"masked: expected shape \(1, 3\)"),
    (lambda s, t: t.loss(torch.ones(1, 3, dtype=torch.long), noise=torch.ones(1, 3, 2)), r"noise: expected shape \(1, 3, 5\)"),
    (lambda s, t: t.loss(torch.ones(1, 3, dtype=torch.long), labels=torch.full((1, 3), -100)), "-100 alone"),
    (lambda s, t: t.loss(torch.full((1, 3), MASK)), "is the mask"),
    (lambda s, t: t.sample(torch.ones(1, 3, dtype=torch.long), new_tokens=0), "new_tokens"),
    (lambda s, t: t.sample(torch.ones(1, 3, dtype=torch.long), new_tokens=2, sampler="euler"), "sampler"),
    (lambda s, t: t.sample(torch.ones(1, 3, dtype=torch.long), new_tokens=2, order="confidnce"), "Did you mean 'confidence'"),
    (lambda s, t: t.sample(torch.full((1, 3), MASK), new_tokens=2), "prompts without the mask token 96, got 3"),
    (lambda s, t: t.sample(torch.ones(1, 3, dtype=torch.long), new_tokens=2, temperature=math.nan), "temperature"),
    (lambda s, t: t.sample(torch.ones(1, 2, dtype=torch.long), torch.tensor([[1, 0]]), new_tokens=2), "padded on the left"),
    (lambda s, t: dp.CoevolutionaryDiffusion(dp.transform(s, dp.MaskedDiffusion(steps=2, mask_token=3)), len, latent=2),
     "carry=2"),
    (lambda s, t: dp.CoevolutionaryDiffusion.from_pretrained(".", None), "expected a folder"),
])
def test_bad_input(stock, coevolving, make, message):
    with pytest.raises(InputError, match=message):
        make(stock, coevolving)


def test_an_encoder_of_another_width(stock, table):
    model = dp.CoevolutionaryDiffusion(stock, lambda ids, mask: table[ids][..., :3], steps=2, mask_token=MASK, latent=LATENT)
    with pytest.raises(InputError, match=r"encoder: expected states \(1, 4, 5\), got \(1, 4, 3\)"):
        model.loss(torch.tensor([[5, 6, 7, 8]]))


def test_rows_behind_pads_keep_their_places_in_a_table(table):
    stock = zoo.model("gpt2", layers=2, dtype=torch.float64)
    with torch.no_grad():
        stock.transformer.wpe.weight.mul_(50)
    model = dp.CoevolutionaryDiffusion(stock, lambda ids, mask: table[ids], steps=3, mask_token=MASK, latent=LATENT)
    assert not model.training and model.train().model.training and not model.eval().model.training
    batch = zoo.batch([6, 4])
    ids, state = batch["input_ids"], torch.zeros(2, 6, LATENT, dtype=torch.float64)
    logits, clean = model(ids, state, torch.tensor([0.5, 0.5]), batch["attention_mask"])
    alone, own = model(ids[1:, 2:], state[1:, 2:], torch.tensor([0.5]))
    torch.testing.assert_close(logits[1:, 2:], alone, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(clean[1:, 2:], own, rtol=1e-9, atol=1e-9)
    model.sample(ids, batch["attention_mask"], new_tokens=3, order="left")
    assert not any(m.training for m in model.modules())
