"""The training loop of all arms: AdamW, rows that grow with success, budgets in steps, FLOPs or seconds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import TrainerControl, TrainerState

import depthpass as dp
from examples.harness.problems import IGNORED, Problem
from examples.harness.settings import Settings

EVERY = 25


@dataclass
class Outcome:
    """What a training run took.

    Attributes:
        steps, seconds: optimizer steps; CPU seconds of the process (on a GPU: of the clock).
        flops: forward and backward, by the ledger; 0 where nothing was counted.
        length: longest rows that were reached.
        curve: (step, FLOPs so far, loss, accuracy, length) every 25 steps.
        step_ms: median milliseconds of a step at full length, CPU time as ``seconds``.
    """

    steps: int = 0
    seconds: float = 0.0
    flops: float = 0.0
    length: int = 0
    curve: list[tuple[int, float, float, float, int]] = field(default_factory=list)
    step_ms: float | None = None

    def flops_to(self, loss: float) -> float | None:
        """FLOPs after which a batch of the curve was first at a loss or below; None = never."""
        return next((flops for _, flops, at, _, _ in self.curve if at <= loss), None)


@dataclass
class Rows:
    """Length of the rows: fixed, or longer by ``step`` whenever ``patience`` batches in a row were right to ``at``."""

    longest: int
    now: int
    step: int = 0
    at: float = 1.0
    patience: int = 2
    good: int = 0

    @classmethod
    def of(cls, train: Settings) -> Rows:
        grow = train.get("grow")
        if not grow:
            return cls(train.length, train.length)
        return cls(train.length, min(grow.start, train.length), grow.step, grow.at, grow.patience)

    def see(self, right: float) -> None:
        self.good = self.good + 1 if right >= self.at else 0
        if self.good >= self.patience and self.now < self.longest:
            self.now, self.good = min(self.longest, self.now + self.step), 0


def clock(device: str) -> float:
    """CPU seconds of this process, which other processes do not stretch; seconds of the clock where a GPU works."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def rate(step: int, train: Settings) -> float:
    """Warm-up, then a cosine down to ``floor``."""
    floor = train.get("floor", 0.1)
    return min(1.0, (step + 1) / train.warmup) * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * step / train.steps)))


def judge(logits: Tensor, labels: Tensor) -> float:
    """Share of right labels."""
    asked = labels != IGNORED
    return ((logits.argmax(-1) == labels) & asked).sum().item() / max(1, asked.sum().item())


def _ledger(train: Settings, flops: float | None, count: bool) -> Any:
    """The callback that counts FLOPs, and with SHIFT also sets the loops; None = nothing is counted."""
    if train.get("shift"):
        if flops is not None:
            raise ValueError("train.shift: expected a number of steps, got a budget in FLOPs beside it. Leave one of them out.")
        return dp.ShiftSchedule(**train.shift)
    return dp.StopAtFlops(flops or 1e30) if count or flops else None


def train(
    model: nn.Module, problem: Problem, train: Settings, lr: float, seed: int, *, device: str = "cpu",
    flops: float | None = None, seconds: float | None = None, count: bool = True,
    tick: Callable[[float, int], Any] | None = None,
) -> Outcome:
    """Train until ``train.steps``, or a budget in FLOPs or seconds, or until ``train.enough`` is reached.

    Args:
        model: transformed or stock.
        problem: rows and labels.
        train: ``rows, length, steps, warmup`` and, optionally, ``grow`` (start, step, at, patience), ``enough`` (at, batches),
            ``shift`` (fields of :class:`depthpass.ShiftSchedule`), ``decay``, ``clip``, ``floor``.
        lr: highest learning rate.
        seed: of the data.
        flops, seconds: budgets in the place of ``train.steps``, over which the learning rate still falls.
        count: keep the ledger of FLOPs.
        tick: called after each step with loss and length.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=train.get("decay", 0.01), betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: rate(s, train))
    generator = torch.Generator().manual_seed(1_000_003 * (seed + 1))
    rows, done, times, enough = Rows.of(train), Outcome(), [], 0
    state, control = TrainerState(max_steps=train.steps), TrainerControl()
    ledger = _ledger(train, flops, count)
    if ledger is not None:
        ledger.on_train_begin(None, state, control, model=model)
    cast = nullcontext() if device == "cpu" else torch.autocast("cuda", torch.bfloat16)
    model.train()
    begun = clock(device)
    while not control.should_training_stop and (seconds is not None or flops is not None or done.steps < train.steps):
        start = clock(device)
        ids, labels = (t.to(device) for t in problem.draw(train.rows, rows.now, generator))
        with cast:
            output = model(input_ids=ids, use_cache=False)
        loss = cross_entropy(output.logits.flatten(0, 1).float(), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), train.get("clip", 1.0))
        optimizer.step()
        if done.steps + 1 < train.steps:
            schedule.step()
        done.steps = state.global_step = done.steps + 1
        if ledger is not None:
            ledger.on_step_end(None, state, control, model=model)
        if control.should_evaluate:  # as a Trainer does it
            control.should_evaluate = control.should_log = False
            held = measure(model, problem, train.length, train.rows, device=device, seed=9)["loss"]
            ledger.on_log(None, state, control, logs={"grad_norm": float(norm)})
            ledger.on_evaluate(None, state, control, metrics={"eval_loss": held}, model=model)
            model.train()
        right = judge(output.logits.detach(), labels)
        if rows.now == rows.longest:
            times.append(clock(device) - start)
        if done.steps % EVERY == 1:
            spent = 0.0 if ledger is None else ledger.ledger.flops
            done.curve.append((done.steps, spent, float(loss.detach()), right, rows.now))
        if train.get("enough"):
            enough = enough + 1 if rows.now == rows.longest and right >= train.enough.at else 0
            if enough >= train.enough.batches:
                break
        rows.see(right)
        if tick is not None:
            tick(float(loss.detach()), rows.now)
        if seconds is not None and clock(device) - begun >= seconds:
            break
    done.seconds, done.length = clock(device) - begun, rows.now
    done.step_ms = 1e3 * sorted(times)[len(times) // 2] if times else None
    if ledger is not None:
        done.flops = ledger.ledger.flops
        ledger.on_train_end(None, state, control)
    model.eval()
    return done


@torch.no_grad()
def measure(
    model: nn.Module, problem: Problem, length: int, rows: int, *, device: str = "cpu", seed: int = 7
) -> dict[str, float]:
    """Of rows that training never drew: shares of right labels over all tokens and at the last one, and the loss."""
    ids, labels = (t.to(device) for t in problem.draw(rows, length, torch.Generator().manual_seed(99_991 * seed + length)))
    model.eval()
    logits = torch.cat([model(input_ids=i, use_cache=False).logits.float() for i in ids.split(64)])
    return {
        "accuracy": judge(logits, labels), "last": judge(logits[:, -1], labels[:, -1]),
        "loss": cross_entropy(logits.flatten(0, 1), labels.flatten()).item(),
    }
