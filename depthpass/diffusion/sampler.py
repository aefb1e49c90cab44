"""Sampling from masked diffusion: fill in masks over several passes, in any order, block by block with kept keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from depthpass.annotations import checked
from depthpass.diffusion.inputs import checked_prompts, new_cache, places, predictions, settings
from depthpass.diffusion.orders import Planner, check_draws, highest, planned, scores
from depthpass.errors import InputError
from depthpass.limits import shown
from depthpass.passes.masked_diffusion import ORDERS, MaskedDiffusion, Order
from depthpass.prompt import at_prompt


@at_prompt
@dataclass(frozen=True)
class Denoised:
    """What a sampler did.

    Attributes:
        ids: ``[batch, prompt + new]``.
        written: ``[batch, prompt + new]``: the step, from 1, that wrote each token last; 0 = given.
        calls: passes of the model, and the tokens that they ran in all.
        tokens_run: see ``calls``.
    """

    ids: Tensor
    written: Tensor
    calls: int
    tokens_run: int


@checked("denoise")
@torch.no_grad()
def denoise(
    model: Any, input_ids: Tensor, attention_mask: Tensor | None = None, *, new_tokens: int, steps: int | None = None,
    unmask: Order | None = None, planner: Planner | None = None, temperature: float = 0.0, reuse: bool = True,
    eos_token: int | None = None, generator: torch.Generator | None = None, details: bool = False,
) -> Tensor | Denoised:
    """Append masks to prompts and fill them in.

    Each step predicts every masked position and writes as many of them as leaves the same number for each later step.

    Args:
        model: transformed with :class:`depthpass.MaskedDiffusion`; runs in evaluation mode.
        input_ids: prompts ``[batch, tokens]``, padded on the left.
        attention_mask: ``[batch, tokens]``.
        new_tokens: masks per row.
        steps: T instead of the spec's; with ``block`` for every block.
        unmask: order instead of the spec's.
        planner: for the order ``planner``: see :data:`depthpass.diffusion.orders.Planner`.
        temperature: of the tokens that are written; 0 = the likeliest.
        reuse: with ``block``, keep keys and values of finished blocks; False runs the whole row at every step, to the same
            effect.
        eos_token: with ``block``, stop after a block with which every row has it.
        generator: of all draws.
        details: return what was done, too.

    Returns:
        ids ``[batch, prompt + new]``, or :class:`Denoised`.

    Raises:
        SpecError: the model has no masked diffusion.
        InputError: a number out of range, more steps than masks, pads that are not on the left, a prompt with masks, a planner
            that leaves masks.
    """
    diffusion = settings(model, "denoise")
    steps, order = diffusion.steps if steps is None else steps, diffusion.unmask if unmask is None else unmask
    if eos_token is not None and not 0 <= eos_token < 1 << 31:
        raise InputError(f"denoise: eos_token: expected a token, got {shown(eos_token)}.")
    valid = checked_prompts(input_ids, attention_mask, diffusion.mask_token, "denoise", new_tokens, steps)
    _check(diffusion, new_tokens, steps, order, planner, temperature)
    canvas = torch.cat((input_ids, input_ids.new_full((len(input_ids), new_tokens), diffusion.mask_token)), 1)
    seen = None if valid is None else torch.cat((valid, valid.new_ones(len(valid), new_tokens)), 1)
    open_ = torch.arange(canvas.shape[1], device=canvas.device)[None] >= input_ids.shape[1]
    run = _Run(model, diffusion, steps, order, planner, temperature, generator, canvas, seen, open_.expand_as(canvas), reuse)
    training = model.training
    model.eval()
    try:
        if diffusion.block is None:
            run.fill(0, canvas.shape[1], run.whole)
        else:
            run.blocks(input_ids.shape[1], eos_token)
    finally:
        model.train(training)
    return Denoised(run.canvas, run.written, run.calls, run.tokens_run) if details else run.canvas


def _check(given: MaskedDiffusion, new: int, steps: int, order: str, planner, temperature: float) -> None:
    most = min(new, given.block or new)
    if given.block is None and steps > most:
        raise InputError(f"denoise: steps: expected at most one for each of {most} new tokens, got {steps}.")
    if given.block is not None and steps > given.block:
        raise InputError(f"denoise: steps: expected at most one per token of a block of {given.block}, got {steps}.")
    check_draws("denoise", order, temperature, ORDERS, "unmask")
    if (order == "planner") != (planner is not None):
        raise InputError("denoise: planner: expected a function together with unmask='planner', and only then.")


class _Run:
    """One sampling: the canvas, and who wrote what when."""

    def __init__(self, model, given, steps, order, planner, temperature, generator, canvas, seen, open_, reuse):
        self.model, self.given, self.steps, self.order, self.planner = model, given, steps, order, planner
        self.temperature, self.generator, self.reuse = temperature, generator, reuse
        self.canvas, self.seen, self.open = canvas, seen, open_
        self.pads = sum(o["tokens"] for o in model.depth_program if o.kind == "pad")
        self.written = torch.zeros_like(canvas)
        self.calls = self.tokens_run = self.step = 0

    def whole(self, start: int, end: int) -> Tensor:
        """Logits of columns ``start .. end-1``, from a pass over the whole row so far."""
        return self._call(self.canvas[:, :end], end)[:, start:end]

    def _call(self, ids: Tensor, end: int, **cache: Any) -> Tensor:
        self.calls, self.tokens_run = self.calls + 1, self.tokens_run + ids.numel()
        seen = None if self.seen is None else self.seen[:, :end]
        if self.pads and not cache:  # they stand behind the prompt; a call that starts a cache ends with it
            cache = {"prompt_length": self._real(int((~self.open[0]).sum()))}
        at = {name: x[:, end - ids.shape[1] :] for name, x in places(self.model, seen).items()}
        return predictions(self.model(input_ids=ids, attention_mask=seen, **at, **cache).logits, self.given)

    def _real(self, columns: int) -> list[int]:
        """Real tokens of every row among so many columns."""
        return [columns] * len(self.canvas) if self.seen is None else self.seen[:, :columns].sum(-1).tolist()

    def blocks(self, prompt: int, eos: int | None) -> None:
        """Block after block; blocks are counted from each row's first real token, so rows that differ run apart."""
        size = self.given.block
        real = self._real(prompt)
        groups = {r % size: [i for i, n in enumerate(real) if n % size == r % size] for r in real}
        if len(groups) == 1:
            return self._blocks(prompt - real[0] % size, eos)
        for rest, rows in groups.items():
            index = torch.tensor(rows, device=self.canvas.device)
            part = _Run(self.model, self.given, self.steps, self.order, self.planner, self.temperature, self.generator,
                        self.canvas[index], None if self.seen is None else self.seen[index], self.open[index], self.reuse)
            part._blocks(prompt - rest, eos)
            if part.canvas.shape[1] < self.canvas.shape[1]:  # stopped early: the masks that are left say so
                part.canvas = torch.cat((part.canvas, self.canvas[index, part.canvas.shape[1] :]), 1)
                part.written = torch.cat((part.written, self.written[index, part.written.shape[1] :]), 1)
            self.canvas[index], self.written[index] = part.canvas, part.written
            self.calls, self.tokens_run = self.calls + part.calls, self.tokens_run + part.tokens_run

    def _blocks(self, start: int, eos: int | None) -> None:
        cache, size, total = new_cache(self.model), self.given.block, self.canvas.shape[1]
        prompt = int((~self.open[0]).sum())
        # Pads end the prompt: keys can be kept only where both fill whole blocks.
        reuse = self.reuse and not (self.pads and (start != prompt or self.pads % size))
        if reuse and start:
            self._call(self.canvas[:, :start], start, past_key_values=cache, use_cache=True)
        while start < total:
            end = min(start + size, total)

            def behind(first: int, last: int) -> Tensor:
                return self._call(self.canvas[:, first:last], last, past_key_values=cache, use_cache=False)

            self.fill(start, end, behind if reuse else self.whole)
            if eos is not None and bool((self.canvas[:, prompt:end] == eos).any(-1).all()):
                self.canvas, self.written = self.canvas[:, :end], self.written[:, :end]
                return
            if reuse and end < total:
                self._call(self.canvas[:, start:end], end, past_key_values=cache, use_cache=True)
            start = end

    def fill(self, start: int, end: int, predict: Callable[[int, int], Tensor]) -> None:
        """Fill in the masks of columns ``start .. end-1``."""
        part = self.canvas[:, start:end]
        todo = self.open[:, start:end] & (part == self.given.mask_token)
        steps = min(self.steps, int(todo.sum(-1).max()))
        for step in range(steps):
            self.step += 1
            logits = predict(start, end)
            chosen = self._tokens(logits)
            write = self._choose(logits, chosen, start, end, todo, steps - step, step)
            self.canvas[:, start:end] = torch.where(write, chosen, self.canvas[:, start:end])
            self.written[:, start:end].masked_fill_(write, self.step)
            todo = todo & ~write
        if bool(todo.any()):
            raise InputError(f"denoise: planner: expected every position to be written in {steps} steps, got "
                             f"{int(todo.sum())} masks that are left.")

    def _tokens(self, logits: Tensor) -> Tensor:
        if self.temperature == 0:
            return logits.argmax(-1)
        p = (logits / self.temperature).softmax(-1)
        return torch.multinomial(p.flatten(0, 1), 1, generator=self.generator).view(logits.shape[:2])

    def _choose(self, logits, chosen, start: int, end: int, todo: Tensor, left: int, step: int) -> Tensor:
        """Where this step writes, ``left`` steps being left with it."""
        if self.order == "ancestral":
            draw = torch.rand(todo.shape, generator=self.generator, device=todo.device)
            return todo & (draw < 1 / left)
        if self.planner is not None:
            score = planned(self.planner, logits, self.canvas[:, start:end], todo, step)
            if score.dtype == torch.bool:
                return score & self.open[:, start:end]
        else:
            score = scores(self.order, logits, chosen, self.generator)
        return highest(score, todo, -(-todo.sum(-1) // left))
