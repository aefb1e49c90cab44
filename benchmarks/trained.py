"""A looped model trained from scratch in a minute, so that what its first iteration is right about has been learned."""

from __future__ import annotations

import torch
from torch import Tensor
from workloads import build

import depthpass as dp

SIGNS = 61


def language(rows: int, length: int, seed: int) -> Tensor:
    """Rows in which every token follows from the one before, by one order of 61 signs: ``[rows, length]``."""
    after = torch.randperm(SIGNS, generator=torch.Generator().manual_seed(0))
    row = [torch.randint(SIGNS, (rows,), generator=torch.Generator().manual_seed(seed))]
    for _ in range(length - 1):
        row.append(after[row[-1]])
    return torch.stack(row, 1) + 3


def trained(width: int, blocks: int, times: int, steps: int, rate: float):
    """A stock model and its loop, trained on the language with loop counts drawn from 1 .. times as Huginn's are, and fixed."""
    stock = build(width, blocks)
    model = dp.transform(stock, dp.Loop(times=(1, times), eval_times=times) if times > 1 else dp.Loop(times=1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95))
    model.train()
    for step in range(steps):
        ids = language(4, 24, step + 1)
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 10)
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    dp.set_loops(model.eval(), times)
    return stock.eval(), model
