"""TRL's trainers train the program: new parameters move, and losses are those of a loop written by hand."""

import warnings

import pytest
import torch
from torch.nn import functional as F

import depthpass as dp
from tests.tools.conftest import weights, words

trl = pytest.importorskip("trl", reason="needs the tools extra")
from datasets import Dataset  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
QUIET = {
    "per_device_train_batch_size": 2, "max_steps": 2, "report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_steps": 1,
    "save_strategy": "no", "learning_rate": 1e-2, "bf16": False,
}
TEXTS = [words(1, 2, 3, 4, 5), words(6, 7, 8), words(9, 10, 11, 12), words(13, 14)]


def first_loss(trainer):
    return next(e["loss"] for e in trainer.state.log_history if "loss" in e)


def log_probabilities(model, ids):
    """Of every token after the first, ``[tokens - 1]``."""
    with torch.no_grad():
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
    return torch.log_softmax(logits, -1).gather(-1, ids[1:, None])[:, 0]


def test_sft_trains_the_program(turbo, tokenizer, moved, tmp_path):
    before = weights(turbo)
    data = Dataset.from_dict({"text": TEXTS})
    config = trl.SFTConfig(output_dir=str(tmp_path), max_length=16, seed=0, data_seed=0, **QUIET)
    trainer = trl.SFTTrainer(turbo, args=config, train_dataset=data, processing_class=tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    losses, count = 0.0, 0
    with torch.no_grad():
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
            ids, labels = ids[mask.bool()], labels[mask.bool()]
            losses = losses + F.cross_entropy(turbo(input_ids=ids[None]).logits[0, :-1], labels[1:], reduction="sum")
            count += int((labels[1:] != -100).sum())
    with torch.no_grad():
        turbo.eval()
        want = float(losses / count)
        got = float(trainer.compute_loss(turbo, dict(batch)))
    assert got == pytest.approx(want, rel=1e-4)
    turbo.train()
    trainer.train()
    assert moved(turbo, before) == before.keys()


def test_dpo_trains_the_program(turbo, tokenizer, moved, tmp_path):
    turbo.save_pretrained(tmp_path / "start")
    turbo = dp.from_pretrained(tmp_path / "start")  # the reference is loaded by TRL, from the folder, with an Auto class
    before = weights(turbo)
    data = Dataset.from_dict({
        "prompt": [words(1, 2), words(3, 4, 5)] * 2, "chosen": [" " + words(6, 7), " " + words(8)] * 2,
        "rejected": [" " + words(9), " " + words(10, 11)] * 2,
    })
    config = trl.DPOConfig(output_dir=str(tmp_path), max_length=16, **QUIET)
    trainer = trl.DPOTrainer(turbo, args=config, train_dataset=data, processing_class=tokenizer)
    assert isinstance(trainer.ref_model, dp.DepthModel)
    trainer.train()
    # Policy and reference are the same program at the start, so their ratio is one.
    assert first_loss(trainer) == pytest.approx(0.6931, abs=1e-3)
    assert moved(turbo, before) == before.keys()


def test_grpo_trains_the_program(turbo, tokenizer, moved, tmp_path):
    before = weights(turbo)
    data = Dataset.from_dict({"prompt": [words(1, 2, 3), words(4, 5)] * 2})

    def reward(completions, **kwargs):
        return [float(len(set(c.split()))) + 0.1 * sum(map(ord, c)) % 7 for c in completions]

    config = trl.GRPOConfig(output_dir=str(tmp_path), num_generations=2, max_completion_length=4, **QUIET)
    trainer = trl.GRPOTrainer(turbo, reward_funcs=reward, args=config, train_dataset=data, processing_class=tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    assert moved(turbo, before) == before.keys()
