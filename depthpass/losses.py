"""Losses on taps: RELAY's iteration-wise supervision (arXiv 2502.08482), Ouro's losses of an exit gate, of both stages
(arXiv 2510.25741)."""

from __future__ import annotations

import functools
import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from depthpass.annotations import checked
from depthpass.errors import InputError
from depthpass.limits import INTEGER, shown

Rounds = Sequence[Sequence[Sequence[int] | Tensor]]


@checked("aligned_targets")
def aligned_targets(
    rounds: Rounds, columns: int, *, pad: int = 0, attention_mask: Tensor | None = None, iterations: int | None = None
) -> tuple[Tensor, Tensor]:
    """Targets of every iteration: round t of a row, right-aligned to the row's real tokens and padded on the left.

    The mask keeps the real tokens of a round and the last pad before them (the model has to learn where a round begins).
    Iterations that a row has no round for are masked out.

    Args:
        rounds: per row its rounds in order, each a list of token ids.
        columns: columns of the batch.
        pad: id that fills a round up.
        attention_mask: ``[rows, columns]``; None = no padding in the inputs.
        iterations: T; None = as many as the row with most rounds.

    Returns:
        targets and mask, ``[T, rows, columns]`` each.

    Raises:
        InputError: more rounds than iterations, an empty round, or one longer than its row.
    """
    for name, value in (("columns", columns), ("iterations", 1 if iterations is None else iterations)):
        if not 1 <= value <= INTEGER:
            raise InputError(f"aligned_targets: {name}: expected an integer from 1 to {INTEGER}, got {value}.")
    if not 0 <= pad < 1 << 63:
        raise InputError(f"aligned_targets: pad: expected a token, got {shown(pad)}.")
    most = max((len(r) for r in rounds), default=0)
    times = most if iterations is None else iterations
    if most == 0 or most > times:
        raise InputError(f"rounds: expected 1 to {times} rounds per row, got {most}. A row needs at most as many rounds as the "
                         "model has iterations.")
    if attention_mask is not None and tuple(attention_mask.shape) != (len(rounds), columns):
        raise InputError(f"attention_mask: expected shape {(len(rounds), columns)}, got {tuple(attention_mask.shape)}.")
    device = None if attention_mask is None else attention_mask.device
    targets = torch.full((times, len(rounds), columns), pad, dtype=torch.long, device=device)
    mask = torch.zeros_like(targets, dtype=torch.bool)
    for row, listed in enumerate(rounds):
        real = torch.arange(columns) if attention_mask is None else attention_mask[row].nonzero().flatten().cpu()
        for t, given in enumerate(listed):
            tokens = torch.as_tensor(given, dtype=torch.long)
            if not 0 < len(tokens) <= len(real):
                raise InputError(f"rounds[{row}][{t}]: expected 1 to {len(real)} tokens (the row's real tokens), got "
                                 f"{len(tokens)}. Pad the input, or split the round.")
            at = real[len(real) - len(tokens) :]
            targets[t, row, at.to(targets.device)] = tokens.to(targets.device)
            mask[t, row, real[max(0, len(real) - len(tokens) - 1) :].to(mask.device)] = True
    return targets, mask


@checked("relay_loss", but=("weight",))
def relay_loss(
    taps: Mapping[str, Tensor] | Any,
    targets: Tensor,
    mask: Tensor,
    *,
    weight: float | Tensor = 1.0,
    head: Callable[[Tensor], Tensor] | None = None,
    scope: str | None = None,
    reduction: Literal["sum", "mean"] = "sum",
) -> Tensor:
    """RELAY's auxiliary loss: weight / T * sum over iterations t of CE(tap t, targets[t]) on the mask.

    Position i of tap t predicts ``targets[t, row, i]``: nothing is shifted. Add the answer's own loss to it::

        out = model(input_ids=ids, labels=answers)
        targets, mask = dp.aligned_targets(rounds, ids.shape[1], iterations=dp.loops_of(model))
        (out.loss + dp.relay_loss(out, targets, mask, weight=0.1)).backward()

    Args:
        taps: a model's output, or its ``taps``: one per iteration, in order.
        targets, mask: from :func:`aligned_targets`, ``[T, rows, columns]``.
        weight: lambda.
        head: a head of its own for the rounds, applied to every tap; None = the taps are logits.
        scope: first part of the names of the taps to use (``loop`` for ``loop.t1``, ``loop.t2``, ...); None = all taps.
        reduction: ``sum`` over the masked positions as published, or their ``mean``.

    Raises:
        InputError: no taps, another number of them than targets, or shapes that do not fit.
    """
    named = getattr(taps, "taps", taps)
    if not isinstance(named, Mapping) or not named or hasattr(named, "to_tuple"):
        raise InputError("relay_loss: expected taps, got an output without them. Use Loop(..., taps=True), or the pass taps.")
    chosen = [(k, x) for k, x in named.items() if scope is None or re.fullmatch(rf"{re.escape(scope)}\.\w+", k)]
    if len(chosen) != len(targets) or targets.shape != mask.shape:
        raise InputError(f"relay_loss: expected targets and mask for {len(chosen)} taps ({', '.join(k for k, _ in chosen)}), "
                         f"got shapes {tuple(targets.shape)} and {tuple(mask.shape)}. Pass iterations= to aligned_targets, or "
                         "scope= to choose taps.")
    _check_numbers("relay_loss", weight=weight)
    if reduction not in ("sum", "mean"):
        raise InputError(f"relay_loss: reduction: expected 'sum' or 'mean', got {reduction!r}.")
    total = None
    for (name, x), want, keep in zip(chosen, targets, mask):
        logits = x if head is None else head(x)
        if logits.shape[:2] != want.shape:
            raise InputError(f"relay_loss: tap {name} has {tuple(logits.shape[:2])} rows and columns, its targets "
                             f"{tuple(want.shape)}.")
        if not bool(keep.any()):
            continue
        # float32 as in the stock losses, more if the logits have more.
        precise = logits[keep].to(torch.promote_types(logits.dtype, torch.float32))
        loss = F.cross_entropy(precise, want[keep].to(logits.device), reduction=reduction)
        total = loss if total is None else total + loss
    if total is None:
        raise InputError("relay_loss: expected a mask with a token in it, got an empty one.")
    return weight / len(targets) * total


@checked("exit_loss", but=("beta",))
def exit_loss(
    taps: Mapping[str, Tensor] | Any,
    labels: Tensor,
    *,
    form: Literal["mixture", "expected"] = "mixture",
    beta: float | Tensor = 0.0,
    scope: str = "loop",
    num_items_in_batch: int | Tensor | None = None,
) -> Tensor:
    """Ouro's loss of a looped model with an exit gate: trains core and gate together.

    With the probabilities lambda_t that the gate gives, a token ends after iteration t with p_t = lambda_t prod_(u<t)
    (1 - lambda_u); the last iteration takes the rest. With z_t the logits after iteration t:

        mixture    CE(sum_t p_t z_t, label)              the public code
        expected   sum_t p_t CE(z_t, label)              the paper's first stage

    plus beta KL(p || uniform), over the tokens whose *next* token has a label, as in the stock loss::

        model = dp.transform(stock, dp.Loop(times=4, normalize="loop", exit=0.9, skip=False, taps=True))
        dp.exit_loss(model(input_ids=ids), labels, beta=0.1).backward()

    Args:
        taps: a model's output, or its ``taps``: ``{scope}.t{t}`` and ``{scope}.t{t}.exit`` for every t.
        labels: ``[batch, tokens]``, -100 where no loss is taken; shifted here.
        form: whose cross-entropy.
        beta: weight of the entropy term; the paper lowers it from 0.1 to 0.05.
        scope: scope of the loop.
        num_items_in_batch: divide by this instead of the labels that count, as a Trainer does when it accumulates.

    Returns:
        the loss, in float32 or the logits' precision where that is higher.

    Raises:
        InputError: taps or gates are missing, labels of another shape or without any to learn from, an unknown form.
    """
    if form not in ("mixture", "expected"):
        raise InputError(f"exit_loss: form: expected 'mixture' or 'expected', got {form!r}.")
    _check_numbers("exit_loss", beta=beta)
    logits, gates = _exits(getattr(taps, "taps", taps), scope)
    want, keep = _wanted("exit_loss", logits, labels)
    precise = [_precise(z[:, :-1][keep]) for z in logits]
    p = _exit_probabilities([g[:, :-1, 0][keep].to(precise[0].dtype) for g in gates])
    if form == "mixture":
        each = F.cross_entropy(_sum(w[:, None] * z for w, z in zip(p, precise)), want[keep], reduction="none")
    else:
        each = _sum(w * F.cross_entropy(z, want[keep], reduction="none") for w, z in zip(p, precise))
    if beta:
        each = each + beta * _sum(torch.special.xlogy(w, w * len(p)) for w in p)
    return each.sum() / (len(each) if num_items_in_batch is None else num_items_in_batch)


def _sum(terms: Iterable[Tensor]) -> Tensor:
    return functools.reduce(operator.add, terms)


@checked("gate_loss", but=("slope", "threshold"))
def gate_loss(
    taps: Mapping[str, Tensor] | Any,
    labels: Tensor,
    *,
    slope: float | Tensor = 50.0,
    threshold: float | Tensor = 0.005,
    scope: str = "loop",
    num_items_in_batch: int | Tensor | None = None,
) -> Tensor:
    """Ouro's second stage: trains the exit gate alone, on what another iteration is worth.

    With L_t the cross-entropy of a token after iteration t (no gradient flows into it) and lambda_t the gate's exit
    probability, the gate is to go on, 1 - lambda_t = w_t, where the iteration has lowered the loss:

        w_t = sigmoid(slope (max(0, L_(t-1) - L_t) - threshold))
        loss = 1/T sum_(t=2..T) mean BCE(1 - lambda_t, w_t)

    over the tokens whose *next* token has a label. Only gates get a gradient where the rest is frozen::

        dp.only_gates(model)
        dp.gate_loss(model(input_ids=ids), labels).backward()

    Args:
        taps, labels, scope, num_items_in_batch: as for :func:`exit_loss`.
        slope, threshold: k and gamma.

    Raises:
        InputError: as :func:`exit_loss`, or a loop of one iteration.
    """
    _check_numbers("gate_loss", slope=slope, threshold=threshold)
    logits, gates = _exits(getattr(taps, "taps", taps), scope, "gate_loss")
    want, keep = _wanted("gate_loss", logits, labels)
    if len(logits) < 2:
        raise InputError("gate_loss: expected at least 2 iterations to compare, got 1.")
    with torch.no_grad():
        losses = [F.cross_entropy(_precise(z[:, :-1][keep]), want[keep], reduction="none") for z in logits]
    total = torch.zeros((), device=losses[0].device, dtype=losses[0].dtype)
    for t in range(1, len(losses)):
        go_on = torch.sigmoid(slope * ((losses[t - 1] - losses[t]).clamp_min(0) - threshold))
        stay = 1 - gates[t][:, :-1, 0][keep].to(go_on.dtype)
        total = total + F.binary_cross_entropy(stay, go_on, reduction="sum")
    return total / len(losses) / (int(keep.sum()) if num_items_in_batch is None else num_items_in_batch)


def _check_numbers(who: str, **options: float | Tensor) -> None:
    for name, value in options.items():
        if isinstance(value, bool) or not isinstance(value, Real | Tensor) or not math.isfinite(value):
            raise InputError(f"{who}: {name}: expected a finite number, got {value!r}.")


def _wanted(who: str, logits: Sequence[Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
    """The labels of next tokens, and which of them count."""
    if labels.shape != logits[0].shape[:2]:
        raise InputError(f"{who}: labels: expected shape {tuple(logits[0].shape[:2])}, got {tuple(labels.shape)}.")
    want = labels[:, 1:].to(logits[0].device)
    keep = want != -100
    if not bool(keep.any()):
        raise InputError(f"{who}: expected labels with a token to learn from, got -100 everywhere behind the first column.")
    return want, keep


def _precise(logits: Tensor) -> Tensor:
    """float32 as in the stock losses, more where the logits have more."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _exits(taps: Any, scope: str, who: str = "exit_loss") -> tuple[list[Tensor], list[Tensor]]:
    """Logits and gates by iteration."""
    states = taps if isinstance(taps, Mapping) and not hasattr(taps, "to_tuple") else {}
    times = 0
    while f"{scope}.t{times + 1}" in states:
        times += 1
    names = [f"{scope}.t{t}" for t in range(1, times + 1)]
    missing = [n for n in [*names, *(f"{n}.exit" for n in names)] if n not in states]
    if missing or not names:
        lacking = f"without {', '.join(missing)}" if names else f"without {scope}.t1"
        raise InputError(f"{who}: expected logits and gates of every iteration, got taps {lacking}. Use "
                         "Loop(..., exit=q, skip=False, taps=True), and scope= for a loop of another scope.")
    return [states[n] for n in names], [states[f"{n}.exit"] for n in names]


def _exit_probabilities(gates: Sequence[Tensor]) -> list[Tensor]:
    """p_1 .. p_T of exit probabilities lambda_1 .. lambda_T; the last one takes what is left."""
    left, probabilities = torch.ones_like(gates[0]), []
    for gate in gates[:-1]:
        probabilities.append(left * gate)
        left = left * (1 - gate)
    return [*probabilities, left]
