"""Bridges that land on a block's input: whoever reads the stream after the block before it reads it without them."""

import oracle_program as oracle
import pytest
import torch
import zoo
from turbos import enliven

import depthpass as dp


def written(row, p, passes, tap=None):
    """TurboConn token by token; ``passes`` are (scope, bridges, group, write). Returns output and the stream after ``tap``."""
    slots = [oracle.Keys() for _ in row.blocks]
    after: list[list[torch.Tensor]] = []
    out = []
    for i in range(row.tokens):
        def arriving(place, write, i=i):
            total = 0.0
            for scope, bridges, group, where in passes:
                for s, d in bridges:
                    if where == write and d == place and i >= group:
                        name = f"{scope}.s{s}_d{d}"
                        low = p[f"{name}.down.weight"] @ after[i - group][s] + p[f"{name}.down.bias"]
                        total = total + p[f"{name}.up.weight"] @ low + p[f"{name}.up.bias"]
            return total

        x, here = row.embed[i], []
        for b in range(len(row.blocks)):
            x = row.block(b, x + arriving(b, "input"), i, oracle.own(slots[b])) + arriving(b, "output")
            here.append(x)
        after.append(here)
        out.append(x)
    stream = torch.stack(out)
    return stream if tap is None else (stream, torch.stack([here[tap] for here in after]))


CASES = {
    "next to a source": [("turboconn", [(1, 0), (3, 2)], 2, "input")],
    "source below a source": [("turboconn", [(1, 0), (2, 1), (3, 2), (4, 3)], 3, "input")],
    "input, then output": [("turboconn", [(3, 2)], 2, "input"), ("two", [(1, 0), (2, 1)], 3, "output")],
    "output, then input": [("turboconn", [(1, 0), (4, 1)], 3, "output"), ("two", [(3, 2), (4, 2)], 2, "input")],
    "input twice": [("turboconn", [(3, 2)], 2, "input"), ("two", [(1, 0), (4, 2)], 2, "input")],
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("lowering", ["eager", "auto"])
def test_against_token_by_token(case, lowering):
    stock = enliven(zoo.model("llama", 5, dtype=torch.float64), std=0.2)
    passes = CASES[case]
    spec = [dp.TurboConn(bridges=b, group=g, rank=3, write=w, scope=s, alpha=100.0) for s, b, g, w in passes]
    model = dp.transform(stock, [*spec, dp.Taps(at=[1])], lowering=lowering)
    enliven(model.depth, seed=1, std=0.3, least=1)
    batch = zoo.batch([9, 5])
    oracle.compare(stock, model, batch, lambda row, p: written(row, p, passes))
    values = dict(model.depth.named_parameters())
    with torch.no_grad(), oracle.oracle_attention(stock):
        ids, real = batch["input_ids"], batch["attention_mask"].bool()
        for r in range(2):
            row = oracle.Row(stock, ids[r, real[r]], torch.arange(9)[real[r]])
            want = written(row, values, passes, tap=1)[1]
            torch.testing.assert_close(model(**batch).taps["taps.v1"][r, real[r]], want, rtol=1e-9, atol=1e-9)
