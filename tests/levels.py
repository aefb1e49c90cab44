"""One model on two levels: pairs with the same random bridges, their outputs and every gradient."""

import torch
import zoo

import depthpass as dp

SPEC = dp.TurboConn(bridges=[(3, 1), (2, 0), (3, 2)], group=3, rank=5)


def pair(name: str, spec=SPEC, dtype=torch.float64, layers: int = 4, level: str = "scheduled", sizes=None, **options):
    """The same model on the eager level and another, with the same random non-zero bridges."""
    stock = zoo.model(name, layers=layers, dtype=dtype, **(sizes or {}))
    eager, scheduled = (dp.transform(stock, spec, lowering=r, **options) for r in ("eager", level))
    generator = torch.Generator().manual_seed(3)
    values = {
        k: torch.randn(v.shape, generator=generator, dtype=dtype).mul_(0.3) for k, v in eager.depth.state_dict().items()
    }
    eager.depth.load_state_dict(values)
    scheduled.depth.load_state_dict(values)
    return eager, scheduled


def gradients(model, batch, steps: int = 1, use_cache: bool = False):
    mask = batch["attention_mask"].bool()
    model.zero_grad()
    for step in range(steps):
        logits = model(**batch, use_cache=use_cache).logits
        weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(step), dtype=logits.dtype)
        (logits * weight)[mask].sum().backward()
    return logits[mask].detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(one, other, limit: float = 1e-10):
    torch.testing.assert_close(one[0], other[0], rtol=1e-12, atol=1e-12)
    assert one[1].keys() == other[1].keys()
    for name, g in one[1].items():
        assert (g - other[1][name]).abs().max() <= limit * g.abs().max().clamp_min(1e-12), name
