"""Gradient checkpointing in the token loop: chunks are run again in the backward pass, and nothing else changes."""

import pytest
import torch
import zoo
from levels import assert_same, gradients, pair

import depthpass as dp

SPEC = [dp.TurboConn(bridges=[(3, 1), (2, 0)], group=3, rank=5), dp.TurboConn(bridges=[(5, 4)], group=2, scope="other")]


def checkpointed(name: str, **options):
    """The same model with and without checkpoints, on the eager and the scheduled level."""
    eager, scheduled = pair(name, SPEC, layers=6, **options)
    scheduled.train().gradient_checkpointing_enable()
    return eager.train(), scheduled


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt_oss"])
def test_gradients_equal_the_eager_level(name, side):
    eager, scheduled = checkpointed(name)
    batch = zoo.batch([11, 7, 10], side)
    assert_same(gradients(eager, batch, steps=2), gradients(scheduled, batch, steps=2))


def test_a_loss_on_early_tokens_only():
    eager, scheduled = checkpointed("llama")
    batch = zoo.batch([11, 11])
    seen = []
    for model in (eager, scheduled):
        model.zero_grad()
        model(**batch, use_cache=False).logits[:, :5].square().sum().backward()
        seen.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for n, g in seen[0].items():
        torch.testing.assert_close(seen[1][n], g, rtol=1e-9, atol=1e-10)


def test_dropout_is_drawn_again():
    stock = zoo.model("gpt2", 4, dtype=torch.float64, resid_pdrop=0.4, attn_pdrop=0.0).train()
    seen = []
    for checkpoints in (False, True):
        turbo = dp.transform(stock, dp.TurboConn(bridges=[(3, 1), (2, 0)], group=3, rank=5), lowering="scheduled").train()
        torch.manual_seed(1)
        with torch.no_grad():
            for p in turbo.depth.parameters():
                p.copy_(0.3 * torch.randn(p.shape))
        if checkpoints:
            turbo.gradient_checkpointing_enable()
        turbo.zero_grad()
        torch.manual_seed(2)
        turbo(**zoo.batch([11, 7]), use_cache=False).logits.square().mean().backward()
        # The outer blocks' own checkpoints draw in the same order.
        seen.append(({n: p.grad.clone() for n, p in turbo.named_parameters() if p.grad is not None}, torch.rand(3)))
    assert torch.equal(seen[0][1], seen[1][1])
    for n, g in seen[0][0].items():
        torch.testing.assert_close(seen[1][0][n], g, rtol=1e-9, atol=1e-12)


def test_autocast_is_entered_again():
    eager, scheduled = checkpointed("llama", dtype=torch.float32)
    batch = zoo.batch([11, 8])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = [m(**batch, use_cache=False).logits for m in (eager, scheduled)]
    seen = []
    for model, out in zip((eager, scheduled), logits):
        model.zero_grad()
        out.float().square().mean().backward()
        seen.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for n, g in seen[0].items():
        assert (g - seen[1][n]).norm() <= 0.05 * g.norm() + 1e-6, n


def test_activations_are_not_kept():
    _, scheduled = checkpointed("llama")
    scheduled(**zoo.batch([12, 12]), use_cache=False)  # captures
    kept = []
    for checkpoints in (True, False):
        if not checkpoints:
            scheduled.gradient_checkpointing_disable()
        elements = 0

        def count(t):
            nonlocal elements
            elements += t.numel() if t.grad_fn is not None or not t.requires_grad else 0
            return t

        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            scheduled(**zoo.batch([12, 12]), use_cache=False).logits.sum()
        kept.append(elements)
    assert kept[0] < 0.5 * kept[1]
