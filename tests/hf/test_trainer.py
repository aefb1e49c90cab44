"""transformers' Trainer on a transformed model, as on any other."""

import warnings

import pytest
import torch
import zoo
from transformers import Trainer, TrainingArguments
from turbos import pair, stock_of, turbo_of

import depthpass as dp

pytest.importorskip("accelerate")


class Rows(torch.utils.data.Dataset):
    """The same few rows of different lengths, to be learned by heart."""

    def __init__(self, count: int = 12):
        generator = torch.Generator().manual_seed(0)
        self.rows = [torch.randint(3, zoo.VOCABULARY, (5 + i % 4,), generator=generator) for i in range(count)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return {"input_ids": self.rows[i], "unknown_column": 1}


def collate(rows):
    width = max(len(r["input_ids"]) for r in rows)
    ids = torch.stack([torch.nn.functional.pad(r["input_ids"], (0, width - len(r["input_ids"]))) for r in rows])
    mask = torch.stack([(torch.arange(width) < len(r["input_ids"])).long() for r in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def trainer(model, folder, **more):
    settings = {
        "output_dir": str(folder), "max_steps": 6, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2, "logging_steps": 1, "save_steps": 3, "report_to": [], "use_cpu": True, "seed": 0,
        "disable_tqdm": True, "lr_scheduler_type": "constant", **more,
    }
    return Trainer(
        model=model, args=TrainingArguments(**settings), train_dataset=Rows(), eval_dataset=Rows(4), data_collator=collate
    )


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="accelerate.*")
        warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")
        yield


def logits(model):
    with torch.no_grad():
        return model.eval()(**zoo.batch([8, 5])).logits


def losses(t):
    return [e["loss"] for e in t.state.log_history if "loss" in e]


def test_trains_saves_and_resumes(tmp_path, captures):
    turbo = turbo_of(stock_of("llama"))
    before = {n: p.detach().clone() for n, p in turbo.named_parameters()}
    t = trainer(turbo, tmp_path, eval_strategy="steps", eval_steps=3)
    t.train()
    actual = losses(t)
    assert len(actual) == 6 and actual[-1] < actual[0]
    assert all(not torch.equal(p, before[n]) for n, p in turbo.named_parameters())
    # Training with item counts, evaluation without gradients: as many captures as kinds of calls, not as steps.
    assert len(captures) <= 2
    assert {e["eval_loss"] for e in t.state.log_history if "eval_loss" in e} and (tmp_path / "checkpoint-6").is_dir()
    loaded = dp.from_pretrained(tmp_path / "checkpoint-6")
    torch.testing.assert_close(logits(loaded), logits(turbo))
    again = trainer(turbo_of(stock_of("llama")), tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert losses(again)[-3:] == pytest.approx(actual[-3:], abs=1e-3)


@pytest.mark.usefixtures("one_capture")
def test_takes_the_steps_of_a_plain_loop(tmp_path):
    turbo, twin = turbo_of(stock_of("llama")), turbo_of(stock_of("llama"))
    t = trainer(turbo, tmp_path, max_steps=3, save_strategy="no", optim="sgd", weight_decay=0.0, max_grad_norm=0.0)
    batches = []
    t.data_collator = lambda rows: (batches.append(collate(rows)), batches[-1])[1]
    t.train()
    optimizer = torch.optim.SGD(twin.train().parameters(), lr=1e-2)
    for step in range(3):
        pair_of = batches[2 * step : 2 * step + 2]  # accumulated: the loss is the mean over both batches' tokens
        items = sum(int((b["labels"][:, 1:] != -100).sum()) for b in pair_of)
        for batch in pair_of:
            twin(**batch, num_items_in_batch=items).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for (n, p), q in zip(turbo.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6, msg=n)


@pytest.mark.usefixtures("one_capture")
@pytest.mark.parametrize("more", [
    {"gradient_checkpointing": True}, {"bf16": True}, {"neftune_noise_alpha": 5.0},
], ids=lambda m: next(iter(m)))
def test_options(tmp_path, more):
    turbo = turbo_of(stock_of("llama"))
    t = trainer(turbo, tmp_path, max_steps=3, save_strategy="no", **more)
    t.train()
    if "neftune_noise_alpha" in more:  # a hook on the embeddings: the noise of training makes the first loss another one
        plain = trainer(turbo_of(stock_of("llama")), tmp_path, max_steps=1, save_strategy="no")
        plain.train()
        assert abs(losses(plain)[0] - losses(t)[0]) > 1e-6
    assert all(torch.isfinite(torch.tensor(losses(t)))) and losses(t)[-1] < losses(t)[0]
    # Mixed precision leaves a wrapped forward on the model: neither restore nor a new transform may run that one.
    stock = dp.restore(turbo)
    assert "forward" not in stock.__dict__
    again = dp.transform(stock, turbo.depth_spec)
    again.depth.load_state_dict(turbo.depth.state_dict())
    torch.testing.assert_close(logits(again)[1, 3:], logits(turbo)[1, 3:], rtol=0.1, atol=0.1)
    assert (logits(again) - logits(stock))[1, 3:].abs().max() > 1


@pytest.mark.usefixtures("one_capture")
def test_a_stock_model_that_was_trained_in_mixed_precision_can_be_transformed(tmp_path):
    stock = stock_of("llama")
    trainer(stock, tmp_path, max_steps=1, save_strategy="no", bf16=True).train()
    turbo = turbo_of(stock)
    assert (logits(turbo) - logits(stock)).abs().max() > 1


@pytest.mark.usefixtures("one_capture")
def test_with_an_adapter(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["depth"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(turbo_of(stock_of("llama")), config)
    t = trainer(model, tmp_path, learning_rate=3e-2, gradient_checkpointing=True)
    t.train()
    assert losses(t)[-1] < losses(t)[0]
    base = turbo_of(stock_of("llama"))
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "checkpoint-6")
    torch.testing.assert_close(logits(loaded), logits(model))
    assert (logits(loaded) - logits(pair("llama")[1])).abs().max() > 1e-3


@pytest.mark.usefixtures("one_capture")
def test_goes_on_with_an_adapter_that_was_there_before_the_transform(tmp_path):
    """As the run that nobody stopped, and with the chosen step's bridges at its end: they were the fresh or the last ones."""
    peft = pytest.importorskip("peft")

    def made():
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        return turbo_of(peft.get_peft_model(stock_of("llama"), config))

    options = {"max_steps": 4, "save_steps": 2, "gradient_accumulation_steps": 1}
    whole = trainer(made(), tmp_path, **options, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True,
                    metric_for_best_model="eval_loss", greater_is_better=True)  # the first, so that something is loaded
    whole.train()
    evaluated = {e["step"]: e["eval_loss"] for e in whole.state.log_history if "eval_loss" in e}
    assert evaluated[2] > evaluated[4] + 1e-3
    assert whole.evaluate()["eval_loss"] == pytest.approx(evaluated[2], abs=1e-6)
    straight, again = trainer(made(), tmp_path / "b", **options), trainer(made(), tmp_path / "c", **options)
    straight.train()
    again.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2"))
    for (name, p), q in zip(again.model.named_parameters(), straight.model.parameters(), strict=True):
        assert torch.equal(p, q), name
