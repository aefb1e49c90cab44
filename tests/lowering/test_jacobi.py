"""Training by a fixed number of sweeps from the plain pass, gradients through the last ones: against whole stock forwards."""

import oracle
import pytest
import torch
import zoo
from turbos import enliven

import depthpass as dp
from depthpass.errors import SpecError

T2MLR = dp.T2MLR(start=1, end=2, init=0.3)
TURBO = dp.TurboConn(bridges=[(2, 0), (2, 1)], group=2, rank=5)


def shifted(x, tokens):
    return torch.cat((torch.zeros_like(x[:, :tokens]), x[:, :-tokens]), 1)


def mixed(x, last, p):
    """T2MLR's gates; the first token of the row stays as it is."""
    both = torch.cat((x, last), -1)

    def gate(name, start):
        score = both @ p[f"t2mlr.{name}.weight"].T + p[f"t2mlr.{name}.bias"]
        return torch.sigmoid(score + torch.logit(torch.tensor(start, dtype=x.dtype)))

    y = (1 - gate("forget", 1 - T2MLR.input)) * x + gate("recurrent", T2MLR.recurrent) * last
    return torch.cat((x[:, :1], y[:, 1:]), 1)


def bridged(x, last, p, d):
    y = shifted(last[2, d], 2) @ p[f"turboconn.s2_d{d}.up.weight"].T + p[f"turboconn.s2_d{d}.up.bias"]
    return torch.cat((x[:, :2], x[:, 2:] + y[:, 2:]), 1)


def jacobi(stock, row, p, spec, sweeps, backward):
    """Whole stock forwards: the first as it is, each later one reads what the one before has made of earlier tokens."""
    kept, blocks = None, oracle.blocks_of(stock)
    for number in range(sweeps):
        if kept is not None and number == sweeps - backward:
            kept = {k: v.detach() for k, v in kept.items()}
        seen, hooks = {}, []

        def into(module, args, last=kept):
            return args if last is None else (mixed(args[0], shifted(last["R"], 1), p), *args[1:])

        def after(module, args, output, b, last=kept, seen=seen):
            x = output[0] if isinstance(output, tuple) else output
            if spec is T2MLR:
                seen["R"] = x
                return None
            if b < 2 and last is not None:
                x = bridged(x, last, p, b)
            if b == 2:
                for d in (0, 1):
                    seen[2, d] = x @ p[f"turboconn.s2_d{d}.down.weight"].T + p[f"turboconn.s2_d{d}.down.bias"]
            return (x, *output[1:]) if isinstance(output, tuple) else x

        for b, block in enumerate(blocks):
            if spec is T2MLR and b == spec.start:
                hooks.append(block.register_forward_pre_hook(into))
            if (b == spec.end) if spec is T2MLR else b < 3:
                hooks.append(block.register_forward_hook(lambda m, a, o, b=b: after(m, a, o, b)))
        logits = stock(**row, use_cache=False).logits
        for h in hooks:
            h.remove()
        kept = seen
    return logits


@pytest.mark.parametrize(("spec", "name", "sweeps", "backward"), [
    (T2MLR, "llama", 4, 2), (T2MLR, "gpt2", 3, 3), (T2MLR, "mistral", 1, 1), (TURBO, "gpt2", 3, 2),
], ids=lambda c: getattr(c, "name", c))
def test_sweeps_from_the_plain_pass_and_their_truncated_gradients(spec, name, sweeps, backward):
    stock = enliven(zoo.model(name, 4, dtype=torch.float64), std=0.2)
    policy = dp.FixedPoint(max_sweeps=sweeps, exact=False, start="plain", backward=backward)
    model = dp.transform(stock, spec, schedule=policy)
    enliven(model.depth, seed=4, std=0.3, least=1)
    batch = zoo.batch([9, 6])
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    out = model(**batch, use_cache=False)
    weight = torch.randn(out.logits.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    model.zero_grad()
    (out.logits * weight)[mask].sum().backward()
    got = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    values = {n: p.detach().clone().requires_grad_() for n, p in model.depth.named_parameters()}
    loss = 0.0
    for r in range(2):
        row = {"input_ids": ids[r : r + 1, mask[r]], "position_ids": torch.arange(9)[None, mask[r]]}
        logits = jacobi(stock, row, values, spec, sweeps, backward)
        torch.testing.assert_close(out.logits[r, mask[r]], logits[0], rtol=1e-9, atol=1e-9)
        loss = loss + (logits[0] * weight[r, mask[r]]).sum()
    loss.backward()
    want = {n: p.grad for n, p in stock.named_parameters() if p.grad is not None}
    want |= {f"depth.{n}": v.grad for n, v in values.items() if v.grad is not None}
    for n, g in want.items():
        # Stock RMS norms compute in float32 whatever the model's dtype.
        assert (got.get(n, torch.zeros_like(g)) - g).abs().max() <= 1e-6 * g.abs().max().clamp_min(1e-12), n
    assert {n for n, g in got.items() if g.abs().max() > 0} <= want.keys()
    assert out.sweeps[0].sweeps == sweeps
    with torch.no_grad():
        torch.testing.assert_close(model(**batch, use_cache=False).logits[mask], out.logits[mask], rtol=1e-9, atol=1e-9)


def test_a_plain_start_finds_the_exact_numbers_too_and_contradictions_are_refused(tmp_path):
    stock = enliven(zoo.model("llama", 4, dtype=torch.float64), std=0.2)
    models = [dp.transform(stock, T2MLR, schedule=s) for s in ("sequential", dp.FixedPoint(max_sweeps=9, start="plain"))]
    for m in models:
        enliven(m.depth, seed=4, std=0.3, least=1)
    batch = zoo.batch([9, 6])
    with torch.no_grad():
        want, got = (m(**batch, use_cache=False).logits[batch["attention_mask"].bool()] for m in models)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    cut = dp.FixedPoint(max_sweeps=4, exact=False, start="plain", backward=2)
    dp.transform(stock, T2MLR, schedule=cut).save_pretrained(tmp_path)
    assert dp.from_pretrained(tmp_path)._depth.fixed_point == cut
    for options, message in (
        ({"start": "stock"}, "expected 'zero' or 'plain'"), ({"start": "plain", "window": 2}, "expected no window"),
        ({"backward": 2}, "expected exact=False and max_sweeps"), ({"backward": 0}, "at least 1"),
        ({"backward": 3, "max_sweeps": 2, "exact": False}, "at most the 2 sweeps"),
    ):
        with pytest.raises(SpecError, match=message):
            dp.FixedPoint(**options)
