"""Feedback between tokens against token-by-token oracles: outputs, every gradient, caches, every level that runs it."""

import oracle_program as oracle
import pytest
import torch
import zoo
from turbos import enliven

import depthpass as dp
from depthpass.analysis.depth import depth
from depthpass.errors import PassError, SpecError


def taken(keys):
    """A visit that keeps the keys of what it is given and computes nothing else."""
    def visit(q, k, v, scale, window, column):
        keys.append((k, v, column))
        return torch.zeros(q.shape[0], v.shape[1], dtype=v.dtype)

    return visit


def feedback(row, depth, start, end):
    """m_t = sum softmax(w) h_l; keys of the visits from start to end at t are those of m_{t-1}, zeros at first."""
    shares = torch.softmax(depth["feedback.weights.weight"], 0)
    memory, out = torch.zeros_like(row.embed[0]), []
    slots = [oracle.Keys() for _ in row.blocks]
    for i in range(row.tokens):
        x, states = row.embed[i], []
        for b in range(len(row.blocks)):
            if b == start:
                states.append(x)
            if start <= b < end:
                row.block(b, memory, i, taken(slots[b]))
                x = row.block(b, x, i, oracle.shared(slots[b]))
                states.append(x)
            else:
                x = row.block(b, x, i, oracle.own(slots[b]))
        memory = sum(s * h for s, h in zip(shares, states, strict=True))
        out.append(x)
    return torch.stack(out)


def t2mlr(row, depth, spec):
    """The paper's recurrence, gates as the public code has them: x <- i x + r R, the first token as it is."""
    slots, out, last = [oracle.Keys() for _ in row.blocks], [], None

    def gate(name, start, x):
        bias = torch.logit(torch.tensor(start, dtype=torch.float64))
        return torch.sigmoid(depth[f"t2mlr.{name}.weight"] @ torch.cat((x, last)) + depth[f"t2mlr.{name}.bias"] + bias)

    for i in range(row.tokens):
        x = row.embed[i]
        for b in range(len(row.blocks)):
            if b == spec.start and last is not None:
                if spec.gate == "constant":
                    x = spec.input * x + spec.recurrent * last
                else:
                    x = (1 - gate("forget", 1 - spec.input, x)) * x + gate("recurrent", spec.recurrent, x) * last
            x = row.block(b, x, i, oracle.own(slots[b]))
            if b == spec.end:
                kept = x if last is None else x + spec.residual * last
        if spec.rescaled:
            rms = (kept.detach().square().mean() + 1e-6).sqrt()
            kept = kept * torch.clamp(1 / rms, 1 / spec.limit, spec.limit)
        last = kept
        out.append(x)
    return torch.stack(out)


FEEDBACK, MIDDLE = dp.FeedbackTransformer(), dp.FeedbackTransformer(start=1, end=3)
LEARNED = dp.T2MLR(start=1, end=2, init=0.3)
CONSTANT = dp.T2MLR(start=0, end=1, gate="constant", recurrent=0.7, input=0.4, residual=0.5, rescaled=True, limit=1.5)
WANT = {
    FEEDBACK: lambda row, depth: feedback(row, depth, 0, 3), MIDDLE: lambda row, depth: feedback(row, depth, 1, 3),
    LEARNED: lambda row, depth: t2mlr(row, depth, LEARNED), CONSTANT: lambda row, depth: t2mlr(row, depth, CONSTANT),
}
CASES = [(FEEDBACK, "mistral", "eager"), (FEEDBACK, "gpt2", "scheduled"), (MIDDLE, "mistral", "scheduled"),
         (LEARNED, "llama", "eager"), (LEARNED, "mistral", "scheduled"), (CONSTANT, "llama", "scheduled")]


def _alive(stock, spec, options):
    model = dp.transform(stock, spec, **options)
    enliven(model.depth, seed=4, std=0.3, least=1)
    return model


@pytest.mark.parametrize(("spec", "name", "level"), CASES, ids=lambda c: getattr(c, "name", c))
def test_outputs_gradients_and_caches(spec, name, level):
    stock = enliven(zoo.model(name, 3, dtype=torch.float64), std=0.2)
    model = _alive(stock, spec, {"lowering": level})
    batch = zoo.batch([9, 6])
    oracle.compare(stock, model, batch | {"use_cache": False}, WANT[spec])
    assert {r.level for r in model.depth_lowered} == {level}
    ids, mask, cache = batch["input_ids"], batch["attention_mask"], dp.DepthCache(model)
    with torch.no_grad():
        whole = model(**batch, use_cache=False).logits
        for first, last in ((0, 4), (4, 5), (5, 6), (6, 9)):
            step = model(input_ids=ids[:, first:last], attention_mask=mask[:, :last], past_key_values=cache).logits
            real = mask[:, first:last].bool()
            torch.testing.assert_close(step[real], whole[:, first:last][real], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("spec", [FEEDBACK, LEARNED], ids=lambda s: s.name)
def test_sweeps_find_the_same_numbers(spec):
    stock = enliven(zoo.model("llama", 3, dtype=torch.float64), std=0.2)
    model, swept = (_alive(stock, spec, o) for o in ({"lowering": "eager"}, {"schedule": dp.FixedPoint(max_sweeps=9)}))
    batch = zoo.batch([9, 6])
    found = []
    for m in (model, swept):
        m.zero_grad()
        logits = m(**batch, use_cache=False).logits[batch["attention_mask"].bool()]
        logits.square().sum().backward()
        found.append((logits.detach(), {n: p.grad.clone() for n, p in m.named_parameters()}))
    (want, grads), (got, swept_grads) = found
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    for name, g in grads.items():
        assert (g - swept_grads[name]).abs().max() <= 1e-7 * g.abs().max().clamp_min(1e-9), name


def test_depth_is_that_of_the_literature():
    """Feedback: n L. T2MLR: L + (n - 1) (end - start + 1)."""
    from depthpass.ir import plain
    from depthpass.passes import Context, apply_spec

    stock = plain("M", 4, 16)
    for spec, want in ((FEEDBACK, 4 * 7), (dp.T2MLR(start=1, end=2), 4 + 6 * 2)):
        assert depth(apply_spec(stock, spec, Context.of(stock))).at(7) == want


def test_identity_and_what_does_not_fit():
    from depthpass.ir import plain
    from depthpass.passes import Context, apply_spec

    stock = plain("M", 3, 16)
    same = dp.T2MLR(start=0, end=2, gate="constant", recurrent=0.0, input=1.0)
    assert apply_spec(stock, same, Context.of(stock)) == stock
    for make, message in (
        (lambda: dp.T2MLR(start=2, end=1), "start <= end"), (lambda: dp.T2MLR(start=0, end=1, input=1.0), r"in \(0, 1\)"),
        (lambda: dp.FeedbackTransformer(start=2, end=2), "above 2"),
    ):
        with pytest.raises(SpecError, match=message):
            make()
    for spec in (dp.T2MLR(start=0, end=3), dp.FeedbackTransformer(end=4), dp.FeedbackTransformer(start=3)):
        with pytest.raises(PassError, match="expected"):
            apply_spec(stock, spec, Context.of(stock))
