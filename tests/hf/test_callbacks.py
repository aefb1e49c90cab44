"""Loop-count schedules in real Trainer runs: switches, curricula, ledgers, resumed runs."""

import json
import warnings

import pytest
import torch
import zoo
from transformers import Trainer, TrainingArguments
from turbos import enliven

import depthpass as dp

pytest.importorskip("accelerate")
pytestmark = pytest.mark.usefixtures("one_capture")


class Rows(torch.utils.data.Dataset):
    def __init__(self, count=8):
        generator = torch.Generator().manual_seed(0)
        self.rows = [torch.randint(3, zoo.VOCABULARY, (6,), generator=generator) for _ in range(count)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return {"input_ids": self.rows[i], "labels": self.rows[i]}


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="accelerate.*")
        warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")
        yield


def trainer(model, folder, callback, **more):
    settings = {
        "output_dir": str(folder), "max_steps": 8, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "report_to": [],
        "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 100, "seed": 0, **more,
    }
    return Trainer(model=model, args=TrainingArguments(**settings), train_dataset=Rows(), eval_dataset=Rows(2),
                   callbacks=[callback])


def looped(**options):
    return dp.transform(enliven(zoo.model("llama", 2), std=0.2), dp.Loop(**{"start": 0, "end": 2, "times": 1, **options}))


def visits(callback):
    return [e.visits for e in callback.ledger.entries]


def test_shift_switches_once_and_keeps_everything(tmp_path):
    model = looped()
    callback = dp.ShiftSchedule(loops=3, d1=1e3, d2=1e3, patience=2, every=2)
    t = trainer(model, tmp_path, callback)
    ids = {n: id(p) for n, p in model.named_parameters()}
    t.train()
    # Evaluations at 2 (the first has none before it), 4 and 6: two in a row that did not move.
    assert callback.switched == 6 and [int(h[0]) for h in callback.history] == [2, 4, 6]
    assert visits(callback) == [2] * 6 + [6] * 2 and dp.loops_of(model) == 3
    assert {n: id(p) for n, p in model.named_parameters()} == ids
    steps = {int(s["step"]) for s in t.optimizer.state.values()}
    assert steps == {8} and len(t.optimizer.state) == len(ids)
    assert callback.ledger.block_ratio == pytest.approx(callback.expected_ratio(8)) == pytest.approx(0.75 + 0.25 * 3)
    assert 1 < callback.ledger.ratio < callback.ledger.block_ratio
    assert not model._forward_hooks
    one = dp.report(dp.restore(model), seq_len=6, batch=2).cost
    whole = one.at("FLOPs forward", 6, 2) + one.at("FLOPs backward", 6, 2)
    assert callback.ledger.stock_flops == 8 * whole and callback.ledger.entries[0].flops == whole
    assert "total" in str(callback.ledger) and callback.ledger.rows()[0]["tokens"] == 12


def test_shift_waits_while_loss_or_gradient_moves(tmp_path):
    for more in ({"d1": 1e-12, "d2": 1e3}, {"d1": 1e3, "d2": 1e-12}):
        callback = dp.ShiftSchedule(loops=3, patience=1, every=2, **more)
        trainer(looped(times=2), tmp_path, callback, max_steps=4).train()
        assert callback.switched is None and len(callback.history) == 2 and visits(callback) == [2] * 4
        assert callback.expected_ratio(4) == 1


@pytest.mark.parametrize("kind", ["shift", "curriculum"])
@pytest.mark.parametrize("native", [False, True], ids=["plain", "restore_callback_states"])
def test_a_resumed_run_goes_on_with_its_loop_count_and_ledger(tmp_path, kind, native):
    def make():
        if kind == "shift":
            return dp.ShiftSchedule(loops=3, d1=1e3, d2=1e3, patience=1, every=2)
        return dp.RecurrenceCurriculum(2.0, start=0.5, ramp=0.5, most=4)

    whole, model = make(), looped(inject="add")
    trainer(model, tmp_path / "a", whole, save_strategy="steps", save_steps=5).train()
    saved = json.loads((tmp_path / "a/checkpoint-5/config.json").read_text())["depthpass"]["spec"]["passes"][0]
    assert saved.get("times", 2) == (3 if kind == "shift" else whole.fixed)
    again, twin = make(), looped(inject="add", times=2)
    t = trainer(twin, tmp_path / "b", again, restore_callback_states_from_checkpoint=native)
    t.train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-5"))
    (again,) = [c for c in t.callback_handler.callbacks if isinstance(c, dp.FlopsLedger)]
    assert again.ledger.entries == whole.ledger.entries and len(set(visits(again))) > 1
    if kind == "shift":
        assert again.switched == whole.switched == 4 and again.history == whole.history
    else:
        assert again.drawn == whole.drawn
    for (n, p), q in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        torch.testing.assert_close(p, q[1], rtol=1e-5, atol=1e-6, msg=n)


def test_the_curriculum_ramps_and_evaluates_at_a_fixed_count(tmp_path):
    callback = dp.RecurrenceCurriculum(6.0, start=1.0, ramp=0.25)
    assert [callback.mean_at(k, 100) for k in (0, 5, 25, 99)] == [1.0, 2.0, 6.0, 6.0]
    late = [callback.times_at(k, 1000) for k in range(250, 1000)]
    early = [callback.times_at(k, 1000) for k in range(0, 100)]
    assert abs(sum(late) / len(late) - 7) < 0.6 and sum(early) / len(early) < 4
    assert dp.RecurrenceCurriculum(6.0, seed=1).times_at(500, 1000) in range(1, 60)
    zero = dp.RecurrenceCurriculum(6.0)
    assert [zero.times_at(0, 100) for _ in range(3)] == [1, 1, 1]
    model = looped(times=2, lora_rank=2)
    callback = dp.RecurrenceCurriculum(5.0, most=2, ramp=0.0)
    seen = []
    model.register_forward_hook(lambda m, a, o: seen.append((m.training, len(m.depth_program.visits))))
    trainer(model, tmp_path, callback, max_steps=4, eval_strategy="steps", eval_steps=2).train()
    assert {v for training, v in seen if not training} == {4} and dp.loops_of(model) == 2
    assert [v // 2 for training, v in seen if training] == callback.drawn


def test_the_plain_ledger_counts_counts_that_are_drawn_or_accumulated(tmp_path):
    callback, model = dp.FlopsLedger(), looped(times=(1, 3))
    trainer(model, tmp_path, callback, max_steps=5, gradient_accumulation_steps=2).train()
    assert [e.tokens for e in callback.ledger.entries] == [24, 24, 24, 24, 24]
    assert len(set(visits(callback))) > 1 and all(2 <= v <= 6 for v in visits(callback))
    assert callback.ledger.block_ratio == pytest.approx(sum(visits(callback)) / (2 * 5))


def test_bad_settings(tmp_path):
    with pytest.raises(dp.SpecError, match=r"ShiftSchedule.patience: expected an integer of at least 1, got 0"):
        dp.ShiftSchedule(2, patience=0)
    with pytest.raises(dp.SpecError, match="positive number"):
        dp.ShiftSchedule(2, d1=0)
    with pytest.raises(dp.SpecError, match=r"RecurrenceCurriculum.ramp: expected a share"):
        dp.RecurrenceCurriculum(2.0, ramp=2)
    stock = zoo.model("llama", 2)
    with pytest.raises(dp.SpecError, match="expected a transformed model"):
        trainer(stock, tmp_path, dp.RecurrenceCurriculum(2.0)).train()
    with pytest.raises(dp.SpecError, match="expected a spec with a loop"):
        trainer(dp.transform(stock, dp.Identity()), tmp_path, dp.RecurrenceCurriculum(2.0)).train()
    t = trainer(looped(), tmp_path, dp.ShiftSchedule(2, every=1))
    t.eval_dataset = None
    with pytest.raises(ValueError, match="eval_dataset"):
        t.train()


@pytest.mark.parametrize("kind", ["transformed", "stock"])
def test_a_run_stops_with_the_step_that_reaches_its_flops(tmp_path, kind):
    model = looped(times=2) if kind == "transformed" else enliven(zoo.model("llama", 2), std=0.2)
    free = dp.StopAtFlops(1e30)
    trainer(model, tmp_path / "free", free).train()
    costs = [e.flops for e in free.ledger.entries]
    assert free.stopped is None and len(costs) == 8 and min(costs) > 0
    if kind == "transformed":
        assert visits(free) == [4.0] * 8
    else:
        assert free.ledger.ratio == 1.0 and visits(free) == [2.0] * 8
    budget = dp.StopAtFlops(sum(costs[:3]) * (1 - 1e-9))
    t = trainer(model, tmp_path / "short", budget)
    t.train()
    assert budget.stopped == t.state.global_step == 3 and budget.ledger.flops >= budget.budget
    with pytest.raises(dp.SpecError, match=r"StopAtFlops\.budget: expected a positive number"):
        dp.StopAtFlops(0)
