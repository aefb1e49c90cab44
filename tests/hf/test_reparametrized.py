"""Weights that are computed from others (pruning, weight norm, parametrizations), in blocks, heads and new modules."""

import pytest
import torch
import zoo
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from turbos import stock_of, turbo_of

IDS = zoo.batch([9, 9], seed=5)["input_ids"]
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")


class Scaled(nn.Module):
    def forward(self, weight):
        return weight * 1.5


def parametrized(module):
    parametrize.register_parametrization(module, "weight", Scaled())


def pruned(module):
    prune.l1_unstructured(module, "weight", amount=0.5)


def normed(module, wrap):
    wrap(module)
    with torch.no_grad():
        for n, p in module.named_parameters():
            if n.endswith(("_g", "original0")):
                p.mul_(1.5)


KINDS = {
    "parametrized": parametrized, "pruned": pruned,
    "weight norm": lambda m: normed(m, parametrizations.weight_norm),
    "weight norm by a hook": lambda m: normed(m, nn.utils.weight_norm),
}
PLACES = {"block": lambda m: m.model.layers[1].mlp.up_proj, "head": lambda m: m.lm_head,
          "bridge": lambda m: next(b for b in m.depth.modules() if isinstance(b, nn.Linear))}


def loss_of(model):
    return model(input_ids=IDS, labels=IDS, use_cache=False).loss


@pytest.mark.usefixtures("one_capture")
@pytest.mark.parametrize("kind", KINDS)
def test_computed_weights_are_what_runs_and_learns(kind):
    change = KINDS[kind]
    for place, find in PLACES.items():
        for when in ("before", "first", "later") if place == "block" else ("later",):
            stock, plain = stock_of("llama", 3), turbo_of(stock_of("llama", 3)).train()
            if when == "before":
                change(find(stock))
            transformed = turbo_of(stock).train()
            if when == "later":
                loss_of(transformed)
            if when != "before":
                change(find(transformed))
            leaves = list(find(transformed).parameters())
            out = loss_of(transformed)
            got = torch.autograd.grad(out, leaves)
            # The oracle: the weight as it is now, in a model without any of this, and torch's own way back to its leaves.
            weight, same = find(transformed).weight, find(plain)
            with torch.no_grad():
                same.weight.copy_(weight)
            wanted = loss_of(plain)
            torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-6)
            (at_weight,) = torch.autograd.grad(wanted, same.weight)
            if find(transformed)._forward_pre_hooks:  # that compute the weight anew at each call
                find(transformed)(torch.zeros(1, weight.shape[1]))
            want = torch.autograd.grad(find(transformed).weight, leaves, at_weight, allow_unused=True)
            for a, b in zip(got, want, strict=True):
                if b is not None:  # a bias is no part of the weight
                    assert a.abs().sum() > 0
                    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=lambda t, w=(place, when): f"{w}: {t}")
