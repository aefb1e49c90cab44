"""TurboConn against a token-by-token oracle on the stock model: float64, random bridges, outputs and all gradients."""

import oracle
import pytest
import torch
import zoo

import depthpass as dp

BRIDGES = [(4, 1), (3, 0), (4, 3)]
GROUP, RANK, ALPHA = 3, 5, 40.0
LENGTHS = [11, 7, 10]


def both(name: str, side: str):
    stock = zoo.model(name, layers=5, dtype=torch.float64)
    turbo = dp.transform(stock, dp.TurboConn(bridges=BRIDGES, group=GROUP, rank=RANK, alpha=ALPHA))
    values = oracle.random_bridges(stock.config.hidden_size, BRIDGES, RANK)
    turbo.depth.load_state_dict({k: v.detach() for k, v in values.items()})
    return stock, turbo, values, zoo.batch(LENGTHS, side)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "name", ["llama", "qwen3", "gemma3_text", "gpt2", "gpt_neox", "mixtral", "gpt_oss", "phi3", "olmo2", "cohere"]
)
def test_outputs_and_gradients_equal_the_oracle(name, side):
    stock, turbo, values, batch = both(name, side)
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    columns = torch.arange(ids.shape[1])
    got = turbo(**batch).logits
    weight = torch.randn(got.shape, generator=torch.Generator().manual_seed(5), dtype=got.dtype)
    (got * weight)[mask].sum().backward()
    mine = {n: p.grad.clone() for n, p in turbo.named_parameters() if p.grad is not None}
    stock.zero_grad()
    loss = 0.0
    for row in range(len(ids)):
        real = mask[row]
        want = oracle.turboconn_row(
            stock, ids[row, real], columns[real], BRIDGES, GROUP, 0.01 * ALPHA, values
        )
        torch.testing.assert_close(got[row, real], want, rtol=1e-9, atol=1e-9)
        loss = loss + (want * weight[row, real]).sum()
    loss.backward()
    theirs = {n: p.grad for n, p in stock.named_parameters() if p.grad is not None}
    theirs |= {f"depth.{n}": p.grad for n, p in values.items()}
    assert mine.keys() == theirs.keys()
    for n, g in theirs.items():
        scale = g.abs().max().clamp_min(1e-12)
        # Gemma and Cohere multiply by their norm weights in float32 whatever the model's dtype, so their gradients are float32
        # sums over tokens: no order of summation is exact to more than that.
        limit = 1e-6 if name in ("gemma3_text", "cohere") and "norm" in n else 1e-8
        assert ((mine[n] - g).abs().max() / scale) < limit, n
