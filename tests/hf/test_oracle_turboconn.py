"""TurboConn against a token-by-token oracle on the stock model: float64, random bridges, outputs and all gradients."""

import oracle
import pytest
import torch
import zoo
from transformers import DynamicCache

import depthpass as dp

pytestmark = pytest.mark.usefixtures("one_capture")

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


LISTED = [(3, 0), (4, 3), (4, 1), (5, 0), (5, 2)]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_wiring_of_the_public_code(name):
    """Bridge k of any source reads the last bridge's source through that source's k-th Down; chunk by chunk, as published.

    The oracle keeps one chunk's connections and hands token j of a chunk what token j of the chunk before left, so the
    delay is the chunk's size without being written anywhere.
    """
    stock = zoo.model(name, layers=6, dtype=torch.float64)
    turbo = dp.transform(stock, dp.TurboConn(bridges=LISTED, group=GROUP, rank=RANK, alpha=ALPHA, wiring="code"))
    ups = oracle.random_bridges(stock.config.hidden_size, LISTED, RANK)
    used = {k: v for k, v in ups.items() if ".up." in k or "s5_" in k}
    turbo.depth.load_state_dict({k: v.detach() for k, v in used.items()})
    numbered = {(3, 0): 0, (4, 3): 0, (4, 1): 1, (5, 0): 0, (5, 2): 1}
    downs = ["turboconn.s5_d0.down", "turboconn.s5_d2.down"]
    ids, positions = zoo.batch([11, 11])["input_ids"][0], torch.arange(11)
    connections = {}

    def hook(block):
        def run(module, args, output):
            h = output[0] if isinstance(output, tuple) else output
            for s, d in LISTED:
                if d == block and (s, d) in connections:
                    up = f"turboconn.s{s}_d{d}.up"
                    given = 0.01 * ALPHA * connections[s, d][:, : h.shape[1]]
                    h = h + given @ used[f"{up}.weight"].T + used[f"{up}.bias"]
            if block == LISTED[-1][0]:
                for b in LISTED:
                    down = downs[numbered[b]]
                    connections[b] = h @ used[f"{down}.weight"].T + used[f"{down}.bias"]
            return (h, *output[1:]) if isinstance(output, tuple) else h

        return run

    got = turbo(input_ids=ids[None], use_cache=False).logits[0]
    weight = torch.randn(got.shape, generator=torch.Generator().manual_seed(5), dtype=got.dtype)
    (got * weight).sum().backward()
    mine = {n: p.grad.clone() for n, p in turbo.named_parameters() if p.grad is not None}
    stock.zero_grad()
    with oracle.hooked(stock, hook):
        cache, logits = DynamicCache(config=stock.config), []
        for part in ids.split(GROUP):
            start = sum(x.shape[0] for x in logits)
            where = positions[None, start : start + len(part)]
            logits.append(stock(input_ids=part[None], position_ids=where, **{zoo.CACHE: cache}, use_cache=True).logits[0])
        want = torch.cat(logits)
        (want * weight).sum().backward()
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    theirs = {n: p.grad for n, p in stock.named_parameters() if p.grad is not None}
    theirs |= {f"depth.{n}": p.grad for n, p in used.items()}
    assert mine.keys() == theirs.keys()
    for n, g in theirs.items():
        assert (mine[n] - g).abs().max() <= 1e-8 * g.abs().max().clamp_min(1e-12), n
    paper = dp.transform(stock, dp.TurboConn(bridges=LISTED, group=GROUP, rank=RANK, alpha=ALPHA))
    paper.depth.load_state_dict({k: v.detach() for k, v in ups.items()})
    assert (paper(input_ids=ids[None], use_cache=False).logits[0] - want).abs().max() > 1e-3
