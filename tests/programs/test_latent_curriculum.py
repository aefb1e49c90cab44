"""Coconut's curriculum in a real Trainer run: rows, latents and optimizer of every stage."""

import warnings

import pytest
import torch
import zoo
from transformers import Trainer, TrainingArguments
from turbos import enliven

import depthpass as dp

pytest.importorskip("accelerate")
BOT, EOT = 90, 91


def items(count=4):
    g = torch.Generator().manual_seed(0)

    def tokens(n):
        return torch.randint(3, 80, (n,), generator=g).tolist()

    steps = (2, 3, 1)
    return [{"question": tokens(3 + i % 2), "steps": [*map(tokens, steps)], "answer": tokens(2)} for i in range(count)]


def test_rows_of_every_stage():
    curriculum = dp.LatentCurriculum(per_step=2, stages=2, bot=BOT, eot=EOT, every=3)
    item = {"question": [5, 6], "steps": [[10, 11], [20], [30]], "answer": [40]}
    want = {0: [10, 11, 20, 30, 40], 1: [20, 30, 40], 2: [30, 40], 3: [40], 7: [40]}
    for stage, rest in want.items():
        assert curriculum.row(item, stage) == ([5, 6, BOT, EOT, *rest], 4)
    assert [curriculum.latents(s) for s in range(5)] == [0, 2, 4, 4, 4]
    batch = curriculum.collate([item, {**item, "question": [5]}])
    assert batch["labels"][1].tolist() == [-100] * 3 + [10, 11, 20, 30, 40, -100]
    assert batch["attention_mask"].sum(-1).tolist() == [9, 8]
    with pytest.raises(dp.InputError, match="without steps, answer"):
        curriculum.row({"question": [1]})
    for wrong in ({"answer": []}, {"question": []}, {"question": [5, curriculum.bot, 6]}):  # latents would stand in the question
        with pytest.raises(dp.InputError, match="a question without its bot and an answer, each of at least one token"):
            curriculum.row({**item, **wrong})
    with pytest.raises(dp.InputError, match="items to make a batch of, got none"):
        curriculum.collate([])
    with pytest.raises(dp.SpecError, match=r"LatentCurriculum\.bot: expected a token id, got -1"):
        dp.LatentCurriculum(per_step=1, stages=1, bot=-1)
    with pytest.raises(dp.SpecError, match=r"LatentCurriculum\.per_step: expected an integer of at least 1, got 0"):
        dp.LatentCurriculum(per_step=0, stages=1)


def test_a_run(tmp_path):
    model = dp.transform(enliven(zoo.model("llama", 2), std=0.2), dp.Coconut(0, after=f"token:{BOT}"))
    curriculum = dp.LatentCurriculum(per_step=2, stages=1, bot=BOT, eot=EOT)
    seen = []

    class Watching(Trainer):
        def training_step(self, model, inputs, *args, **kwargs):
            held = sum(len(s) for s in self.optimizer.optimizer.state.values())
            seen.append((dp.loops_of(model), inputs["input_ids"].shape[1], held > 0))
            return super().training_step(model, inputs, *args, **kwargs)

    settings = TrainingArguments(
        output_dir=str(tmp_path), num_train_epochs=3, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        disable_tqdm=True, save_strategy="no", remove_unused_columns=False, seed=0, learning_rate=1e-3,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="accelerate.*")
        Watching(model, settings, train_dataset=items(), data_collator=curriculum.collate, callbacks=[curriculum]).train()
    assert [(k, held) for k, _, held in seen] == [(0, False), (0, True), (2, False), (2, True), (2, False), (2, True)]
    widths = [w for _, w, _ in seen]
    assert max(widths[:2]) == 14 and max(widths[2:4]) == 12 and max(widths[4:]) == 8
    assert curriculum.stage == 2 and len(curriculum.ledger.entries) == 6
    # Two latents of two blocks each are work that the ledger counts.
    assert curriculum.ledger.entries[2].visits == 2


def curriculum_on(after, bot):
    model = dp.transform(zoo.model("llama", 2), [dp.Loop(times=2), dp.Coconut(0, after=after)])
    return model, dp.LatentCurriculum(per_step=2, stages=1, bot=bot, eot=EOT)


@pytest.mark.parametrize(("token", "bot"), [(EOT, BOT), (BOT, EOT)])
def test_another_token_than_that_before_the_latents(token, bot, tmp_path):
    """Refused before the first step: a stage without latents would not see it."""
    model, curriculum = curriculum_on(f"token:{token}", bot)
    settings = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True, remove_unused_columns=False, max_steps=1)
    trainer = Trainer(model, settings, train_dataset=items(), data_collator=curriculum.collate, callbacks=[curriculum])
    wrong = rf"LatentCurriculum\.bot: expected {token}, as coconut has after='token:{token}', got {bot}"
    with pytest.raises(dp.SpecError, match=wrong):
        trainer.train()
    assert trainer.state.global_step == 0 and not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(("after", "bot"), [(f"token:{BOT}", BOT), (f"token:{EOT}", None), ("prompt", BOT), (3, BOT)])
def test_places_that_fit_the_rows(after, bot):
    model, curriculum = curriculum_on(after, bot)
    curriculum.begin(model, resumed=False)
    assert dp.loops_of(model, scope="coconut") == 0
