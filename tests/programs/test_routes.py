"""Routed recurrence on stock models against a token-by-token oracle: float64, outputs and all gradients."""

import oracle_program as oracle
import pytest
import torch
import zoo
from depthpass_lowering.visits.routes import Route, choose
from turbos import enliven

import depthpass as dp
from depthpass.ir.program import op

LENGTHS = [8, 5]


def transformed(name, spec, layers=3):
    stock = enliven(zoo.model(name, layers, dtype=torch.float64), std=0.2)
    model = dp.transform(stock, spec)
    enliven(model.depth, seed=1, std=0.4, least=1)
    return stock, model


MIXTURES = {
    "topk": {"recursions": 3},
    "capacity": {"recursions": 2, "capacity": (0.8, 0.3)},
    "threshold": {"recursions": 3, "mode": "threshold"},
    "shared": {"recursions": 2, "mode": "threshold", "kv": "shared"},
    "delta": {"recursions": 3, "combine": "delta"},
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [("llama", k) for k in MIXTURES] + [(n, k) for n in ("qwen3", "gpt2", "mixtral") for k in ("topk", "threshold")],
)
def test_mixture_of_recursions(name, kind):
    options = MIXTURES[kind]
    stock, model = transformed(name, dp.MixtureOfRecursions(start=1, **options))
    depths = []

    def want(row, p):
        n = options["recursions"]
        stream, taken = oracle.mixture(
            row, 1, 2, n, [p.get(f"mor.r{r}.router.weight") for r in range(1, n + 1)],
            strength=[p.get(f"mor.r{r}.strength.weight") for r in range(1, n + 1)],
            **{k: v for k, v in options.items() if k != "recursions"},
        )
        depths.append(sum(len(t) for t in taken))
        return stream

    oracle.compare(stock, model, zoo.batch(LENGTHS), want)
    # Some tokens were taken and some left.
    assert 0 < sum(depths) < options["recursions"] * sum(LENGTHS)


THINKING = {
    "topk": {"steps": 3, "ratios": (0.5, 0.5)},
    "threshold": {"steps": 3, "mode": "threshold"},
    "literal": {"steps": 2, "bypass": "literal", "ratios": (0.4,), "alpha": 0.5},
}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", THINKING)
def test_inner_thinking(name, kind):
    options = THINKING[kind]
    stock, model = transformed(name, dp.InnerThinking(blocks=(0, 2), **options))

    def want(row, p):
        steps = range(1, options["steps"])
        return oracle.inner_thinking(
            row, (0, 2), options["steps"],
            {(b, t): p[f"itt.v{b}.router{t}.weight"] for b in (0, 2) for t in steps},
            {(b, t): p[f"itt.v{b}.phi{t}.weight"] for b in (0, 2) for t in (0, *steps)},
            mode=options.get("mode", "topk"), ratio=options.get("ratios", (0.7,))[0], alpha=options.get("alpha", 1.0),
            bypass=options.get("bypass", "none"),
        )

    oracle.compare(stock, model, zoo.batch(LENGTHS), want)


def test_identity_settings_equal_stock():
    stock = enliven(zoo.model("llama", 3, dtype=torch.float64))
    batch = zoo.batch(LENGTHS)
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        want = stock(**batch).logits[real]
        for spec in (
            dp.MixtureOfRecursions(start=1, recursions=1, combine="delta"), dp.MixtureOfRecursions(start=1, combine="delta"),
            dp.InnerThinking(steps=3), dp.InnerThinking(steps=3, mode="threshold"), dp.InnerThinking(steps=1),
        ):
            got = dp.transform(stock, spec)(**batch).logits[real]
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_parameters_stay_shared_after_save_and_load(tmp_path):
    stock, model = transformed("llama", dp.MixtureOfRecursions(start=1, recursions=3, mode="threshold"))
    assert model.model.layers[1].mlp.up_proj.weight is stock.model.layers[1].mlp.up_proj.weight
    model.save_pretrained(tmp_path)
    loaded = dp.from_pretrained(tmp_path)
    assert {n: p.shape for n, p in loaded.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    batch = zoo.batch(LENGTHS)
    with torch.no_grad():
        real = batch["attention_mask"].bool()
        torch.testing.assert_close(loaded.double()(**batch).logits[real], model(**batch).logits[real])


@pytest.mark.filterwarnings("ignore:hooks on or in block")  # one call per visit is what is counted here
def test_slots_of_a_recursion_hold_its_own_tokens_only():
    _, model = transformed("llama", dp.MixtureOfRecursions(start=1, recursions=3, mode="threshold", taps=True))
    cache = dp.DepthCache(model)
    ids = zoo.batch([9, 9, 9])["input_ids"]
    taken = [0, 0, 0]
    ran = []
    handle = model.model.layers[1].register_forward_hook(lambda m, args, out: ran.append(out.shape[:2]))
    active = torch.ones(3, 9, dtype=torch.bool)
    per_row = torch.zeros(3, 3, dtype=torch.long)
    with torch.no_grad():
        for i in range(9):
            out = model(input_ids=ids[:, i : i + 1], past_key_values=cache)
            active = torch.ones(3, dtype=torch.bool)
            for r in range(3):
                active &= torch.sigmoid(out.taps[f"mor.r{r + 1}"][:, 0, 0]) >= 0.5
                per_row[r] += active
                taken[r] += int(active.sum())
    handle.remove()
    for r in range(3):
        slot = cache.state.slots[1 + r]
        assert torch.equal(slot.valid.sum(-1), per_row[r])
        assert slot.keys[0].shape[2] == per_row[r].max()
    # Rows that stopped do no work: the shared block ran for exactly the tokens that were routed to it.
    assert sum(b * t for b, t in ran) == sum(taken) < 3 * 27


@pytest.mark.parametrize(
    ("rule", "score", "valid", "want"),
    [
        ({"rule": "topk", "capacity": 0.5}, [1.0, 3.0, 3.0, 2.0, 3.0], None, [0, 1, 1, 0, 0]),
        ({"rule": "topk", "capacity": 0.5, "rounding": "ceil"}, [1.0, 3.0, 3.0, 2.0, 3.0], None, [0, 1, 1, 0, 1]),
        ({"rule": "topk", "capacity": 0.5}, [9.0, 9.0, 3.0, 2.0, 3.0], [0, 0, 1, 1, 1], [0, 0, 1, 0, 0]),
        ({"rule": "topk", "capacity": 0.1}, [1.0, 0.0, 0.0], None, [1, 0, 0]),
        ({"rule": "threshold", "threshold": 0.5}, [0.5, 0.4, 0.9, 0.6], [1, 1, 1, 0], [1, 0, 1, 0]),
    ],
)
def test_who_is_chosen(rule, score, valid, want):
    o = op("route", "0", name="1", **rule)
    valid = None if valid is None else torch.tensor([valid], dtype=torch.bool)
    route = choose(o, torch.tensor(score)[None, :, None], None, valid, 0)
    assert route.chosen.tolist() == [[bool(w) for w in want]]


def test_choice_is_the_largest_score_and_nests():
    o = op("route", "0", name="1", rule="choice", depth=2)
    score = torch.tensor([[[3.0, 1.0], [0.0, 2.0], [1.0, 5.0]]])
    outer = Route.of(torch.tensor([[True, True, False]]))
    assert choose(o, score, outer, None, 0).chosen.tolist() == [[False, True, False]]


def test_ragged_rows_are_put_back_where_they_came_from():
    chosen = torch.tensor([[1, 0, 1, 1], [0, 0, 1, 0], [0, 0, 0, 0]], dtype=torch.bool)
    route, x = Route.of(chosen), torch.arange(12.0).reshape(3, 4, 1).requires_grad_()
    assert route.count == 3 and route.rows.tolist() == [0, 1]
    moved = route.scatter(x, 10 * route.gather(x), "replace")
    assert torch.equal(moved, torch.where(chosen[..., None], 10 * x, x))
    added = route.scatter(x, route.gather(x), "add")
    assert torch.equal(added, torch.where(chosen[..., None], 2 * x, x))
    moved.sum().backward()
    assert torch.equal(x.grad, torch.where(chosen[..., None], 10.0, 1.0))
    parts = route.split([1, 3])
    assert torch.equal(torch.cat([p.chosen for p in parts], 1), chosen)


def test_routes_inside_a_token_loop():
    """A feedback edge around a routed stack: the routed visit runs chunk by chunk, and decodes as it scores."""
    spec = [dp.MixtureOfRecursions(start=1, recursions=2, mode="threshold"), dp.TurboConn(bridges=[(3, 0)], group=2, rank=4)]
    _, model = transformed("llama", spec)
    assert any(o.kind == "route" for r in model.depth_schedule.serial_regions for o in r.ops)
    batch = zoo.batch(LENGTHS)
    real = batch["attention_mask"].bool()
    want = model(**batch).logits
    (want * real[..., None]).square().sum().backward()
    grads = [p.grad.clone() for p in model.depth.parameters()]
    assert all(g.abs().max() > 0 for g in grads)
    with torch.no_grad():
        cache = dp.DepthCache(model)
        steps = [
            model(input_ids=batch["input_ids"][:, i : i + 1], attention_mask=batch["attention_mask"][:, : i + 1],
                  past_key_values=cache).logits for i in range(8)
        ]
    torch.testing.assert_close(torch.cat(steps, 1)[real], want[real].detach(), rtol=1e-8, atol=1e-8)
