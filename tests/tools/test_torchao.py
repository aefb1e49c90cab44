"""Weight-only int8 of torchao, before and after the transform, against the same weights rounded by hand."""

import copy

import pytest
import torch
import zoo
from torch import nn
from turbos import enliven, stock_of

import depthpass as dp
from tests.tools.conftest import SPEC

quantization = pytest.importorskip("torchao.quantization", reason="needs the tools extra")
pytestmark = pytest.mark.filterwarnings("ignore")
BATCH = zoo.batch([8, 5])


def blocks_only(module, name):
    return isinstance(module, nn.Linear) and ".layers." in f".{name}"


def quantized(model):
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig(), blocks_only)
    return model


def turbo_of(stock):
    model = dp.transform(stock, SPEC).eval()
    enliven(model.depth, seed=1, least=1)
    return model


def logits(model):
    with torch.no_grad():
        return model(**BATCH).logits[BATCH["attention_mask"].bool()]


def by_hand(stock):
    """Every linear map of the blocks as int8 steps of a scale per row: what weight-only quantization means."""
    stock = copy.deepcopy(stock)
    with torch.no_grad():
        for name, m in stock.named_modules():
            if blocks_only(m, name):
                scale = m.weight.abs().amax(1, keepdim=True) / 127.5
                m.weight.copy_((m.weight / scale).round().clamp(-128, 127) * scale)
    return stock


@pytest.mark.parametrize("order", ["before", "after", "after a call"])
def test_int8_weights_run_the_program(order):
    stock = stock_of("llama")
    want, plain = logits(turbo_of(by_hand(stock))), logits(turbo_of(stock))
    if order == "before":
        model = turbo_of(quantized(copy.deepcopy(stock)))
    else:
        model = turbo_of(copy.deepcopy(stock))
        if order == "after a call":
            logits(model)
        model = quantized(model)
    got = logits(model)
    assert (want - plain).abs().max() > 1e-3  # rounding shows
    torch.testing.assert_close(got, want, rtol=1e-2, atol=3e-2 * float(want.abs().max()))
    assert (got - want).abs().max() < 0.5 * (want - plain).abs().max()
