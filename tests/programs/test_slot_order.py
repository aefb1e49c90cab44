"""A visit that writes a slot runs before those that read it, even where nothing reads its result."""

from dataclasses import dataclass
from typing import ClassVar

import oracle_program as oracle
import pytest
import torch
import zoo
from turbos import enliven

import depthpass as dp
from depthpass.ir import parse_program
from depthpass.ir.program import Program
from depthpass.passes import Pass, registry

GROUP = 2
BESIDE = f"""
%0 = embed
%8 = delay {GROUP} (%7)
%1 = add (%0, %8)
%2 = block 0 (%1) slot 0
%3 = block 1 (%2) slot 1
%4 = scale 0.5 (%2)
%5 = block 1 (%4) slot 1 keys 1
%6 = block 2 (%5) slot 2
%7 = scale 0.5 (%6)
%9 = norm (%6)
output %9"""
"""The writer %3 reads a stream of the cycle and its result goes nowhere; the reader %5 is on the cycle."""

AHEAD = BESIDE.replace("block 1 (%2) slot 1\n", "block 1 (%0) slot 1\n")
"""The same with a writer that needs nothing of the cycle."""

PLAIN = BESIDE.replace(f"%8 = delay {GROUP} (%7)\n%1 = add (%0, %8)", "%1 = scale 1.5 (%0)")
"""No cycle at all."""


@dataclass(frozen=True)
class Text(Pass):
    """The program of a text, whatever was there."""

    name: ClassVar[str] = "text"

    text: str

    def apply(self, program: Program, ctx) -> Program:
        return parse_program(f"program {program.model} blocks={program.blocks} width={program.width}\n{self.text}")


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setattr(registry, "_registered", {"text": Text})


@pytest.mark.parametrize("text", [BESIDE, AHEAD, PLAIN], ids=["beside", "ahead", "plain"])
@pytest.mark.parametrize("lowering", ["eager", "auto"])
def test_against_token_by_token(text, lowering):
    stock = enliven(zoo.model("mistral", 3, dtype=torch.float64), std=0.2)
    model = dp.transform(stock, Text(text), lowering=lowering)

    def want(row, _):
        slots, out = [oracle.Keys() for _ in range(3)], []
        for i in range(row.tokens):
            x = row.embed[i] if text != PLAIN else 1.5 * row.embed[i]
            if text != PLAIN and i >= GROUP:
                x = x + 0.5 * out[i - GROUP]
            h = row.block(0, x, i, oracle.own(slots[0]))
            row.block(1, row.embed[i] if text == AHEAD else h, i, oracle.own(slots[1]))
            y = row.block(1, 0.5 * h, i, oracle.shared(slots[1]))
            out.append(row.block(2, y, i, oracle.own(slots[2])))
        return torch.stack(out)

    batch = zoo.batch([9, 6])
    oracle.compare(stock, model, batch, want)
    ids, mask, cache = batch["input_ids"], batch["attention_mask"], dp.DepthCache(model)
    with torch.no_grad():
        whole = model(**batch, use_cache=False).logits
        for first, last in ((0, 4), (4, 5), (5, 6), (6, 9)):
            step = model(input_ids=ids[:, first:last], attention_mask=mask[:, :last], past_key_values=cache).logits
            real = mask[:, first:last].bool()
            torch.testing.assert_close(step[real], whole[:, first:last][real], rtol=1e-9, atol=1e-9)
