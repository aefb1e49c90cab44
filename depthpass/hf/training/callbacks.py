"""Trainer callbacks that change the loop count while a model trains, and keep the ledger of what that costs."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from depthpass.analysis.cost.program import Trainable
from depthpass.annotations import checked
from depthpass.errors import InputError, SpecError
from depthpass.hf.modules.context import inner_model
from depthpass.hf.switching.switch import loops_of, set_loops, transformed
from depthpass.hf.training.ledger import Counter, Ledger
from depthpass.passes.draws import draw
from depthpass.prompt import at_prompt


@at_prompt
class FlopsLedger(TrainerCallback, ExportableState):
    """Keeps a :class:`~depthpass.hf.training.ledger.Ledger` of a run, whatever decides the loop counts.

    Checkpoints hold the ledger and the loop count; resuming from one goes on with both.

    Args:
        trainable: what the cost analysis takes as trained: ``all`` parameters or only the ``new`` ones.

    Attributes:
        ledger: FLOPs per optimizer step.
    """

    @checked("FlopsLedger", SpecError)
    def __init__(self, trainable: Trainable = "all"):
        self.trainable: Trainable = trainable
        self.ledger = Ledger()
        self._counter: Counter | None = None
        self._loops: Any = None

    # What differs between schedules.

    def arguments(self) -> dict[str, Any]:
        """Arguments of the constructor, as plain data; each is kept under its name."""
        return {n: getattr(self, n) for n in list(inspect.signature(type(self).__init__).parameters)[1:]}

    def progress(self) -> dict[str, Any]:
        """What a schedule remembers besides the ledger, as plain data."""
        return {}

    def subject(self, model: Any) -> Any:
        """The model whose calls are counted, out of any wrapper."""
        return transformed(model, type(self).__name__)

    def begin(self, model: Any, resumed: bool) -> None:
        """Called before the first step; ``resumed`` after a checkpoint has given :meth:`progress` back."""

    # What the Trainer calls.

    def state(self) -> dict[str, Any]:
        return {"args": self.arguments(), "attributes": {"held": {
            "ledger": self.ledger.dump(), "loops": self._loops, **self.progress(),
        }}}

    @property
    def held(self) -> dict[str, Any]:
        """What a checkpoint holds of this callback."""
        return self.state()["attributes"]["held"]

    @held.setter
    def held(self, saved: dict[str, Any]) -> None:
        self.ledger = Ledger.load(saved["ledger"])
        self._loops = saved["loops"]
        for key in self.progress():
            setattr(self, key, saved[key])

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        inner = self.subject(model)
        # Trainer gives callbacks their state back only on request; a loop count that starts anew would be a silent error.
        saved = state.stateful_callbacks.get(type(self).__name__) if state.global_step else None
        saved = saved[-1] if isinstance(saved, list) and saved else saved
        held = saved.get("attributes", {}).get("held") if isinstance(saved, dict) else None
        if held is not None:
            self.held = held
        else:
            self.ledger = Ledger()
        # What may refuse the model comes before its hook.
        self.begin(model, held is not None)
        self._counter = Counter(inner, self.trainable)
        self._remember(model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self._counter is not None:
            self.ledger.entries.append(self._counter.close(state.global_step))
        self._remember(model)

    def on_train_end(self, args, state, control, **kwargs):
        if self._counter is not None:
            self._counter.remove()
        self._counter = None

    def _remember(self, model: Any) -> None:
        self._loops = None

    def _set(self, model: Any, times: Any) -> None:
        set_loops(model, list(times) if isinstance(times, list | tuple) else times, scope=getattr(self, "scope", None))


class StopAtFlops(FlopsLedger):
    """Ends a training run with the optimizer step that reaches a number of FLOPs: equal compute for models of unequal cost.

    Counts as :class:`FlopsLedger` does, on transformed and on stock models alike, and resumes with its checkpoint::

        budget = FlopsLedger's ledger.flops of the other run, or a number
        Trainer(model=AutoModelForCausalLM.from_config(dp.twin(report)), callbacks=[dp.StopAtFlops(budget)], ...)

    Set ``max_steps`` (which the learning-rate schedule follows) to what the run will about take, or more.

    Args:
        budget: FLOPs, forward and backward.
        trainable: see :class:`FlopsLedger`.

    Attributes:
        stopped: step that reached the budget; None = not yet.
    """

    @checked("StopAtFlops", SpecError)
    def __init__(self, budget: float, *, trainable: Trainable = "all"):
        super().__init__(trainable)
        if budget <= 0:
            raise SpecError(f"StopAtFlops.budget: expected a positive number of FLOPs, got {budget!r}.")
        self.budget = budget
        self.stopped: int | None = None

    def progress(self) -> dict[str, Any]:
        return {"stopped": self.stopped}

    def subject(self, model: Any) -> Any:
        return inner_model(model)

    def begin(self, model: Any, resumed: bool) -> None:
        if not resumed:
            self.stopped = None

    def on_step_end(self, args, state, control, model=None, **kwargs):
        super().on_step_end(args, state, control, model=model, **kwargs)
        if self.ledger.flops >= self.budget:
            self.stopped = self.stopped or state.global_step
            control.should_training_stop = True
        return control


class ShiftSchedule(FlopsLedger):
    """SHIFT (arXiv 2510.10089): train with T = 1 until nothing moves, then go on with more loops and the same parameters.

    Every ``every`` steps the Trainer evaluates. When the evaluation loss has changed by less than ``d1`` and the gradient
    norm by less than ``d2`` since the evaluation before, ``patience`` times in a row, the loop count becomes ``loops``.

    The Trainer needs an ``eval_dataset``; it says so at the first evaluation. The training cost is f + (1 - f) T steps of
    T = 1, f being the share of steps before the switch.

    Args:
        loops: T after the switch.
        d1: on the evaluation loss.
        d2: on the gradient norm, before clipping.
        patience: W, evaluations in a row.
        every: evaluation interval in optimizer steps.
        scope: which pass, when the spec has several loops; see :func:`depthpass.set_loops`.
        trainable: see :class:`FlopsLedger`.

    Attributes:
        switched: step after which the loop count was raised; None = not yet.
        history: (step, evaluation loss, gradient norm) of every evaluation.
    """

    @checked("ShiftSchedule", SpecError)
    def __init__(
        self, loops: int, *, d1: float = 0.01, d2: float = 0.1, patience: int = 3, every: int = 100,
        scope: str | int | None = None, trainable: Trainable = "all",
    ):
        super().__init__(trainable)
        for name, value, least in (("loops", loops, True), ("patience", patience, True), ("every", every, True),
                                   ("d1", d1, False), ("d2", d2, False)):
            if value <= 0:
                wanted = "an integer of at least 1" if least else "a positive number"
                raise SpecError(f"ShiftSchedule.{name}: expected {wanted}, got {value!r}.")
        self.loops, self.d1, self.d2, self.patience, self.every, self.scope = loops, d1, d2, patience, every, scope
        self.bad = 0
        self.switched: int | None = None
        self.history: list[list[float]] = []
        self._norm: float | None = None

    def progress(self) -> dict[str, Any]:
        return {"bad": self.bad, "switched": self.switched, "history": self.history}

    def begin(self, model: Any, resumed: bool) -> None:
        if not resumed:
            self.bad, self.switched, self.history = 0, None, []
        self._set(model, 1 if self.switched is None else self.loops)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        super().on_step_end(args, state, control, model=model, **kwargs)
        if self.switched is None and state.global_step % self.every == 0:
            # The gradient norm of this step comes with the log, which comes before the evaluation.
            control.should_log = control.should_evaluate = True
        return control

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and logs.get("grad_norm") is not None:
            self._norm = float(logs["grad_norm"])

    def on_evaluate(self, args, state, control, metrics=None, model=None, **kwargs):
        if self.switched is not None or state.global_step == 0 or state.global_step % self.every:
            return
        loss = (metrics or {}).get("eval_loss")
        if loss is None or self._norm is None:
            raise InputError("ShiftSchedule: expected eval_loss among the metrics and grad_norm in the logs, got "
                             f"{', '.join(metrics or {}) or 'no metrics'} and grad_norm {self._norm}. Keep the Trainer's own "
                             "evaluation, and one eval_dataset.")
        if self.history:
            _, before, norm = self.history[-1]
            still = abs(loss - before) < self.d1 and abs(self._norm - norm) < self.d2
            self.bad = self.bad + 1 if still else 0
        self.history.append([state.global_step, float(loss), self._norm])
        if self.bad >= self.patience:
            self.switched = state.global_step
            self._set(model, self.loops)
            self._remember(model)

    def _remember(self, model: Any) -> None:
        self._loops = loops_of(model, scope=self.scope)

    def expected_ratio(self, steps: int) -> float:
        """f + (1 - f) T for a run of so many steps: what :attr:`Ledger.block_ratio` is for a loop over the whole stack."""
        f = 1.0 if self.switched is None else min(1.0, self.switched / steps)
        return f + (1 - f) * self.loops


class RecurrenceCurriculum(FlopsLedger):
    """Retrofit curriculum (arXiv 2511.07384): loop counts drawn around a mean that ramps up linearly, then stays.

    Step k (from 0) draws r ~ Poisson(LogNormal(ln m - sigma^2/2, sigma)) + 1 with
    m = start + (mean - start) min(1, k / (ramp steps)). A step's count depends on ``seed`` and k only, so every process
    draws the same and a resumed run draws on. Evaluation and checkpoints have the fixed count ``eval_times``.

    Args:
        mean: m at the end of the ramp; r is ``mean`` + 1 on average.
        start: m at step 0; 0 = one loop.
        ramp: share of all steps that the ramp takes.
        sigma: of the log-normal.
        most: largest count that is run.
        eval_times: None = the rounded mean plus one, at most ``most``.
        seed: of the draws.
        scope: which pass, when the spec has several loops; see :func:`depthpass.set_loops`.
        trainable: see :class:`FlopsLedger`.

    Attributes:
        drawn: the count of every step so far.
    """

    @checked("RecurrenceCurriculum", SpecError)
    def __init__(
        self, mean: float, *, start: float = 0.0, ramp: float = 0.25, sigma: float = 0.5, most: int | None = None,
        eval_times: int | None = None, seed: int = 0, scope: str | int | None = None, trainable: Trainable = "all",
    ):
        super().__init__(trainable)
        for name, value, ok, want in (
            ("mean", mean, mean > 0, "a positive number"), ("start", start, start >= 0, "at least 0"),
            ("ramp", ramp, 0 <= ramp <= 1, "a share in [0, 1]"), ("sigma", sigma, sigma >= 0, "at least 0"),
            ("most", most, most is None or most >= 1, "at least 1"),
            ("eval_times", eval_times, eval_times is None or eval_times >= 1, "at least 1"),
        ):
            if not ok:
                raise SpecError(f"RecurrenceCurriculum.{name}: expected {want}, got {value!r}.")
        self.mean, self.start, self.ramp, self.sigma, self.most = mean, start, ramp, sigma, most
        self.eval_times, self.seed, self.scope = eval_times, seed, scope
        self.drawn: list[int] = []

    def progress(self) -> dict[str, Any]:
        return {"drawn": self.drawn}

    @property
    def fixed(self) -> int:
        """The count of evaluation."""
        count = self.eval_times or round(self.mean) + 1
        return count if self.eval_times or self.most is None else min(count, self.most)

    def mean_at(self, step: int, steps: int) -> float:
        """m at a step of a run of so many steps."""
        ramp = self.ramp * steps
        return self.start + (self.mean - self.start) * (1.0 if step >= ramp else step / ramp)

    def times_at(self, step: int, steps: int) -> int:
        """The count that a step draws."""
        generator = torch.Generator().manual_seed((self.seed << 32) + step)
        mean = max(self.mean_at(step, steps), 1e-9)
        return draw(mean, self.sigma, 1, self.most or 2**31, generator)

    def begin(self, model: Any, resumed: bool) -> None:
        if not resumed:
            self.drawn = []
        self._set(model, self.fixed)

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        times = self.times_at(state.global_step, state.max_steps)
        self.drawn.append(times)
        self._set(model, times)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        super().on_step_end(args, state, control, model=model, **kwargs)
        self._set(model, self.fixed)

    def _remember(self, model: Any) -> None:
        self._loops = self.fixed
