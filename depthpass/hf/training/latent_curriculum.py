"""Coconut's curriculum: steps of a chain of thought are replaced by latents, stage by stage (arXiv 2412.06769)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from depthpass.analysis.cost.program import Trainable
from depthpass.annotations import checked
from depthpass.errors import InputError, SpecError
from depthpass.hf.switching.switch import loop_pass, loops_of
from depthpass.hf.training.callbacks import FlopsLedger
from depthpass.limits import INTEGER
from depthpass.passes.base import require
from depthpass.passes.coconut import check_mark
from depthpass.prompt import at_prompt


@at_prompt
class LatentCurriculum(FlopsLedger):
    """Trainer callback and collator of Coconut's training.

    Stage s begins at epoch s * ``every``. In it the first s steps of every chain of thought are left out and the model has
    s * ``per_step`` latents in their place; from stage ``stages`` + 1 on no step is left, and the latents stay as many::

        curriculum = dp.LatentCurriculum(per_step=2, stages=3, bot=bot, eot=eot)
        model = dp.transform(stock, dp.Coconut(latents=0, after=f"token:{bot}"))
        Trainer(model, args, train_dataset=data, data_collator=curriculum.collate, callbacks=[curriculum])

    with ``remove_unused_columns=False``. Items of the data have token ids: ``question``, ``steps`` (a list of lists),
    ``answer``. A row is question, bot, eot, the steps that are left, answer; labels begin behind eot. As published the
    optimizer starts anew with every stage (``reset_optimizer``): its state is emptied, its settings stay.

    Args:
        per_step: latents for every step that is left out.
        stages: steps that are replaced at most.
        every: epochs per stage.
        bot, eot: tokens around the latents; None = none. A ``bot`` is the token of the model's ``Coconut(after="token:..")``.
        pad: id of padding; its columns are masked.
        reset_optimizer: forget the optimizer's state when a stage begins.
        scope: which pass, when the spec has several loops; see :func:`depthpass.set_loops`.
        trainable: see :class:`FlopsLedger`.

    Attributes:
        stage: the one in force.
    """

    @checked("LatentCurriculum", SpecError)
    def __init__(
        self, per_step: int, stages: int, *, every: int = 1, bot: int | None = None, eot: int | None = None, pad: int = 0,
        reset_optimizer: bool = True, scope: str | int | None = "coconut", trainable: Trainable = "all",
    ):
        super().__init__(trainable)
        for name, value in (("per_step", per_step), ("stages", stages), ("every", every)):
            require(1 <= value <= INTEGER, f"LatentCurriculum.{name}", "an integer of at least 1", value)
        for name, value in (("bot", bot), ("eot", eot), ("pad", pad)):
            require(value is None or value >= 0, f"LatentCurriculum.{name}", "a token id", value)
        self.per_step, self.stages, self.every, self.bot, self.eot, self.pad = per_step, stages, every, bot, eot, pad
        self.reset_optimizer, self.scope, self.stage = reset_optimizer, scope, 0

    def progress(self) -> dict[str, Any]:
        return {"stage": self.stage}

    def latents(self, stage: int) -> int:
        """Latents of a stage."""
        return min(stage, self.stages) * self.per_step

    def row(self, item: Mapping[str, Any], stage: int | None = None) -> tuple[list[int], int]:
        """A row's tokens in a stage (None = the one in force), and how many of them have no label.

        Raises:
            InputError: the item lacks a part, its question or answer is empty, or the question holds ``bot``.
        """
        if missing := [n for n in ("question", "steps", "answer") if n not in item]:
            raise InputError(f"LatentCurriculum: expected items with question, steps and answer, got one without "
                             f"{', '.join(missing)}. Set remove_unused_columns=False in the Trainer's arguments.")
        if not len(item["question"]) or not len(item["answer"]) or self.bot in list(item["question"]):
            raise InputError("LatentCurriculum: expected a question without its bot and an answer, each of at least one token.")
        stage = self.stage if stage is None else stage
        steps: Sequence[Sequence[int]] = item["steps"][stage:] if stage <= self.stages else []
        asked = [*item["question"], *([] if self.bot is None else [self.bot]), *([] if self.eot is None else [self.eot])]
        return [*asked, *(t for step in steps for t in step), *item["answer"]], len(asked)

    def collate(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """A batch of the stage in force, padded on the right."""
        if not items:
            raise InputError("LatentCurriculum: expected items to make a batch of, got none.")
        rows = [self.row(item) for item in items]
        ids = torch.full((len(rows), max(len(tokens) for tokens, _ in rows)), self.pad)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)  # no loss
        for r, (tokens, asked) in enumerate(rows):
            ids[r, : len(tokens)], mask[r, : len(tokens)] = torch.tensor(tokens), 1
            labels[r, asked : len(tokens)] = torch.tensor(tokens[asked:])
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def begin(self, model: Any, resumed: bool) -> None:
        check_mark(loop_pass(model, self.scope, type(self).__name__), self.bot)
        self.stage = self.stage if resumed else 0
        self._set(model, self.latents(self.stage))

    def on_epoch_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        if (stage := int(state.epoch or 0) // self.every) == self.stage:
            return
        self.stage = stage
        self._set(model, self.latents(stage))
        if self.reset_optimizer and optimizer is not None:
            getattr(optimizer, "optimizer", optimizer).state.clear()

    def _remember(self, model: Any) -> None:
        self._loops = loops_of(model, scope=self.scope)
