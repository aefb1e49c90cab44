"""Routed visits of programs that see later tokens, against stock blocks called by hand, in float64."""

import diffusion_oracle as oracle
import pytest
import torch
import zoo

import depthpass as dp


@pytest.fixture(scope="module")
def stock():
    return zoo.model("llama", layers=2, dtype=torch.float64)


def lively(stock, spec):
    transformed = dp.transform(stock, spec).eval()
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in transformed.depth.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=p.dtype) * 0.5)
    return transformed


def layer(stock, index, x, seen, columns=None):
    """Stock block on tokens at some columns of a row, ``seen`` being their mask among themselves."""
    at = torch.arange(x.shape[1])[None] if columns is None else columns[None]
    tables = stock.model.rotary_emb(x, at)
    out = stock.model.layers[index](x, attention_mask=oracle.bias(seen, x.dtype), position_embeddings=tables)
    return out if torch.is_tensor(out) else out[0]


def head(stock, x):
    return stock.lm_head(stock.model.norm(x))


@pytest.mark.parametrize("block", [None, 4])
def test_only_routed_tokens_are_seen_where_only_they_run(stock, block):
    """Mixture of depths, rows of other lengths: chosen tokens attend to chosen ones of the whole row, or of their block."""
    model = lively(stock, [dp.MixtureOfDepths(capacity=0.5), dp.Bidirectional(block=block)])
    batch = zoo.batch([9, 6])
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    got, router = model(input_ids=ids, attention_mask=mask).logits, model.depth.get_submodule("mod.v1.router").weight
    for row, n in enumerate((9, 6)):
        start = 9 - n
        whole = oracle.visible(torch.ones(1, n, dtype=torch.bool), block=block)
        columns = torch.arange(start, 9)
        x = layer(stock, 0, stock.model.embed_tokens(ids[row : row + 1, start:]), whole, columns)
        score = (x @ router.T)[0, :, 0]
        chosen = score.argsort(descending=True)[: n // 2].sort().values
        y = layer(stock, 1, x[:, chosen], whole[:, chosen][:, :, chosen], columns[chosen])
        x = x.clone()
        x[:, chosen] += y * score[chosen, None]
        torch.testing.assert_close(got[row, start:], head(stock, x)[0], rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("block", [None, 4])
def test_routed_queries_see_every_token(stock, block):
    """Inner thinking: chosen tokens ask, every token has keys."""
    model = lively(stock, [dp.InnerThinking(steps=2, blocks=(1,), ratios=(0.5,)), dp.Bidirectional(block=block)])
    batch = zoo.batch([9, 6])
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    got, p = model(input_ids=ids, attention_mask=mask).logits, dict(model.depth.named_parameters())
    for row, n in enumerate((9, 6)):
        start = 9 - n
        columns, whole = torch.arange(start, 9), oracle.visible(torch.ones(1, n, dtype=torch.bool), block=block)
        x = layer(stock, 0, stock.model.embed_tokens(ids[row : row + 1, start:]), whole, columns)
        y = layer(stock, 1, x, whole, columns)
        w = torch.sigmoid(y @ p["itt.v1.router1.weight"].T)[0]
        chosen = w[:, 0].argsort(descending=True)[: -(-n // 2)]
        z = layer(stock, 1, y, whole, columns)
        out = p["itt.v1.phi0.weight"] * y
        out[:, chosen] += p["itt.v1.phi1.weight"] * z[:, chosen] * w[chosen]
        torch.testing.assert_close(got[row, start:], head(stock, out)[0], rtol=1e-7, atol=1e-8)
