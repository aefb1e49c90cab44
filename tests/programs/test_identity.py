"""Identity settings and fresh parameters against the stock model: bit for bit, and where not, why."""

import pytest
import torch
import zoo
from turbos import enliven

import depthpass as dp

BITWISE = {
    "nothing": dp.Identity(),
    "loop once": dp.Loop(1, 3, times=1),
    "loop once, damped": dp.Loop(1, 3, times=1, damped=True, inject="add"),
    "list of all layers": dp.LayerProgram([0, 1, 2, 3]),
    "every layer once": dp.IntraLayerRecurrence([1, 1, 1, 1]),
    "no pads": dp.Pad(0),
    "one parallel loop": dp.ParallelLoop(loops=1),
    "one thinking step": dp.InnerThinking(blocks=[1], steps=1),
    "taps": dp.Taps(at=[0, 1]),
    "fresh thinking": dp.InnerThinking(blocks=[1], steps=3),
    "fresh thinking by threshold": dp.InnerThinking(blocks=[1], steps=3, mode="threshold"),
    "fresh recursions": dp.MixtureOfRecursions(start=1, end=3, combine="delta"),
    "fresh recursions by threshold": dp.MixtureOfRecursions(start=1, end=3, combine="delta", mode="threshold"),
    "fresh LoRA": dp.Loop(1, 3, times=1, lora_rank=2),
    "fresh scales": dp.Loop(1, 3, times=1, scales=True),
    "fresh time encoding": dp.Loop(1, 3, times=3, timestep=True),
    "fresh adapter": dp.Loop(1, 3, times=3, inject="concat"),
}
TURBO = {"bridges": [(3, 0), (2, 1)], "rank": 3}
LENGTHS = [11, 7]


def logits(model, batch):
    """Of the real tokens: without gradients and with them."""
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        scored = model(**batch).logits[real]
    return scored, model(**batch).logits[real].detach()


@pytest.fixture(scope="module")
def stocks():
    return {name: enliven(zoo.model(name, 4), std=0.2) for name in ("llama", "gpt2")}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("case", BITWISE)
def test_the_stock_numbers_bit_for_bit_in_float32(case, name, stocks):
    stock, batch = stocks[name], zoo.batch(LENGTHS, "left")
    model = dp.transform(stock, BITWISE[case]).eval()
    for mine, theirs in zip(logits(model, batch), logits(stock, batch), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_fresh_bridges_add_nothing_but_their_chunks_round(name, stocks):
    """One chunk for the row: the stock numbers. Several chunks: products of smaller matrices, rounded otherwise."""
    stock, batch = stocks[name], zoo.batch(LENGTHS, "left")
    whole = dp.transform(stock, dp.TurboConn(group=11, **TURBO)).eval()
    for mine, theirs in zip(logits(whole, batch), logits(stock, batch), strict=True):
        assert torch.equal(mine, theirs)
    chunked = dp.transform(stock, dp.TurboConn(group=2, **TURBO)).eval()
    for mine, theirs in zip(logits(chunked, batch), logits(stock, batch), strict=True):
        assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    precise, exact = dp.transform(stock, dp.TurboConn(group=2, **TURBO)).eval().double(), stock.double()
    try:
        with torch.no_grad():
            difference = (precise(**batch).logits - exact(**batch).logits)[batch["attention_mask"].bool()].abs().max()
    finally:
        stock.float()
    # What is left in float64 shows that it is rounding: an addition would not shrink with the precision.
    assert difference <= 1e-12 * theirs.abs().max()
