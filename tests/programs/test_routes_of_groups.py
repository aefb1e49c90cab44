"""Routed passes behind a loop whose count follows the row: rows of unequal length run in groups, losses are of all of them."""

import pytest
import torch
import torch.nn.functional as F
import zoo
from turbos import enliven

import depthpass as dp

LENGTHS = [9, 3, 5, 8]
TIMES = {9: 4, 3: 2, 5: 3, 8: 3}
LOG = "ceil(log2(n))"
MOR = {"start": 2, "recursions": 2, "taps": True}


@pytest.fixture(scope="module")
def stock():
    return enliven(zoo.model("llama", 4, dtype=torch.float64), std=0.2)


def transformed(stock, loop, router, values=None):
    model = dp.transform(stock, [loop, router])
    if values is None:
        enliven(model.depth, seed=1, std=0.6, least=1)
    else:
        model.depth.load_state_dict(values)
    return model.train()


def from_taps(taps, valid):
    """Every loss from the scores and choices that were handed out, as a mean over all rows."""
    if "mor.p" in taps:
        p = taps["mor.p"][valid]
        share = F.one_hot(p.argmax(-1), p.shape[-1]).double().mean(0)
        return {"mor.balance": p.shape[-1] * (share * p.mean(0)).sum()}
    aux, z, among = 0.0, 0.0, valid
    for r in (1, 2):
        score, taken = taps[f"mor.r{r}"][..., 0], taps.get(f"mor.r{r}.taken", valid)
        aux = aux + F.binary_cross_entropy_with_logits(score[among], taken[among].double())
        z = z + score[among].square().mean()
        among = taken
    return {"mor.aux": aux, "mor.z": z}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("router", [
    dp.MixtureOfRecursions(**MOR, aux=0.5, z=0.25), dp.MixtureOfRecursions(**MOR, router="token", balance=0.3, z=0.0),
    dp.MixtureOfRecursions(**MOR, mode="threshold", z=0.25),
], ids=["expert", "token", "threshold"])
def test_streams_losses_and_gradients(stock, router, side):
    model = transformed(stock, dp.Loop(0, 1, times=LOG), router)
    batch = zoo.batch(LENGTHS, side)
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    labels = torch.where(mask, ids, -100)
    out = model(**batch, labels=labels)
    assert len(model.depth_ran) == 3
    for r, n in enumerate(LENGTHS):
        alone = transformed(stock, dp.Loop(0, 1, times=TIMES[n]), router, model.depth.state_dict())
        columns = torch.arange(ids.shape[1])[mask[r]][None]
        got = alone(input_ids=ids[r : r + 1, mask[r]], position_ids=columns)
        torch.testing.assert_close(out.logits[r, mask[r]], got.logits[0], rtol=1e-9, atol=1e-9)
        for name, tap in got.taps.items():
            torch.testing.assert_close(out.taps[name][r, mask[r]], tap[0], rtol=1e-9, atol=1e-9)
    want = from_taps(out.taps, mask)
    assert out.losses and out.losses.keys() <= want.keys()
    routers = [p for n, p in model.depth.named_parameters() if "router" in n]
    blocks = list(model.model.layers[0].mlp.parameters())
    for name, loss in out.losses.items():
        torch.testing.assert_close(loss, want[name])
        mine, theirs = (
            torch.autograd.grad(x, [*routers, *blocks], retain_graph=True, allow_unused=True) for x in (loss, want[name])
        )
        assert any(g is not None and g.abs().max() > 0 for g in mine)
        for a, b in zip(mine, theirs):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    coefficients = {o["name"]: o["coefficient"] for o in model.depth_program.losses}
    scored = model.eval()(**batch, labels=labels)
    assert scored.losses.keys() == out.losses.keys()
    total = scored.loss + sum(coefficients[k] * v for k, v in out.losses.items()).float()
    torch.testing.assert_close(out.loss, total)


def test_a_balancing_bias_moves_once_for_all_rows(stock):
    router = dp.MixtureOfRecursions(**MOR, router="token", balancing="loss_free", rate=0.25)
    model = transformed(stock, dp.Loop(0, 1, times=LOG), router)
    bias = model.depth.mor.balance.bias
    bias.copy_(torch.tensor([-0.1, 0.1]))
    batch = zoo.batch(LENGTHS)
    before = bias.clone()
    p = model(**batch).taps["mor.p"][batch["attention_mask"].bool()]
    load = F.one_hot((p + before).argmax(-1), 2).double().sum(0)
    assert load[0] != load[1]
    torch.testing.assert_close(bias - before, 0.25 * torch.sign(load.mean() - load))


def test_other_routed_passes_train(stock):
    for router in (dp.MixtureOfDepths(capacity=0.5), dp.InnerThinking(steps=3, blocks=[1])):
        model = transformed(stock, dp.Loop(0, 1, times=LOG), router)
        batch = zoo.batch(LENGTHS)
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        assert loss.isfinite()
