"""What an experiment says of itself, and the order in which its runs are made."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from examples.harness.arms import Arm, config, config_of, stock, transformed
from examples.harness.costs import costs, step_flops
from examples.harness.problems import Problem
from examples.harness.settings import Settings, fingerprint, merge
from examples.harness.store import Store, conditions
from examples.harness.training import train

Draw = Callable[[Any, "Summary"], None]


@dataclass(frozen=True)
class Experiment:
    """One question.

    Attributes:
        title: in a line.
        arms: of the settings, in order; twins follow their arm.
        problem: what an arm trains on.
        measure: ``(model, settings, arm) -> plain data`` of the trained model; ``score`` among it picks the learning rate.
        draw: ``(figure, summary)``: the picture.
        columns: of the table: heading -> key of the measures (``a.b`` leads into mappings), or key and form.
        before: problem of the cheap pre-training of the stock model below an arm; None = none.
        form: how the numbers of the table are written.
    """

    title: str
    arms: Callable[[Settings], list[Arm]]
    problem: Callable[[Settings, Arm], Problem]
    measure: Callable[[Any, Settings, Arm], dict[str, Any]]
    draw: Draw
    columns: Callable[[Settings], Mapping[str, str | tuple[str, str]]]
    before: Callable[[Settings, Arm], Problem | None] | None = None
    form: str = "{:.1%}"


@dataclass
class Summary:
    """All runs of an experiment at the learning rate that its first seed chose for each arm.

    Attributes:
        settings, arms: of the experiment.
        runs: by arm, one for each seed.
        sweep: by arm: learning rate -> score of the seed that chose.
        others: the runs of the sweep at the rates that were not chosen.
        minutes: of CPU time for all runs of these arms, the sweep's others counted; of older runs the training alone.
    """

    name: str
    title: str
    settings: Settings
    arms: list[Arm]
    runs: dict[str, list[dict[str, Any]]]
    sweep: dict[str, dict[float, float]]
    minutes: float = 0.0
    others: list[dict[str, Any]] = field(default_factory=list)


class Runner:
    """Makes the runs that are missing, arm by arm.

    Args:
        name, experiment, settings: which one.
        store: of finished runs.
        seeds: 0, 1, ..
        only: names of arms, or parts of them; None = all.
        say: takes lines of text.
        progress: ``(description, total) -> tick`` of a run.
    """

    def __init__(self, name: str, experiment: Experiment, settings: Settings, store: Store, seeds: int, *,
                 only: list[str] | None = None, say: Callable[[str], Any] = print, progress: Callable | None = None):
        self.name, self.experiment, self.settings, self.store, self.seeds = name, experiment, settings, store, seeds
        self.say, self.progress = say, progress or (lambda text, total: None)
        self.arms = {a.name: a for a in experiment.arms(settings)}
        self.only = only
        if unknown := [part for part in only or () if not any(part in name for name in self.arms)]:
            raise ValueError(f"--arms: expected parts of {', '.join(self.arms)}, got {', '.join(unknown)}")
        self.pretrained: dict[str, dict[str, torch.Tensor]] = {}

    def wanted(self) -> list[Arm]:
        return [a for a in self.arms.values() if self.only is None or any(o in a.name for o in self.only)]

    def run(self, missing: bool = True) -> Summary:
        """Make what is missing and sum up; or, without ``missing``, sum up what there is."""
        runs: dict[str, list[dict[str, Any]]] = {}
        sweep: dict[str, dict[float, float]] = {}
        spent, others = 0.0, []
        for arm in self.wanted():
            rates = merge(self.settings.train, arm.train).lr
            tried = {lr: r for lr in rates if (r := self.one(arm, 0, lr, missing)) is not None}
            if not tried:
                continue
            best = max(tried, key=lambda lr: tried[lr]["measures"]["score"])
            sweep[arm.name] = {lr: r["measures"]["score"] for lr, r in tried.items()}
            more = [self.one(arm, seed, best, missing) for seed in range(1, self.seeds)]
            runs[arm.name] = [tried[best], *(r for r in more if r is not None)]
            others += [r for lr, r in tried.items() if lr != best]
            records = [*tried.values(), *runs[arm.name][1:]]
            spent += sum(r.get("cpu", r["seconds"]) for r in records)
        finished = [a for a in self.wanted() if a.name in runs]
        return Summary(self.name, self.experiment.title, self.settings, finished, runs, sweep, spent / 60, others)

    def one(self, arm: Arm, seed: int, lr: float, missing: bool = True) -> dict[str, Any] | None:
        """A finished run, from the store or, if it is ``missing`` there, made now."""
        print_ = self.fingerprint(arm)
        record = self.store.find(arm.name, seed, lr, print_)
        if record is None and missing:
            record = self.make(arm, seed, lr) | {"arm": arm.name, "seed": seed, "lr": lr, "settings": print_}
            self.store.add(record)
            self.say(f"{arm.name}, seed {seed}, lr {lr:g}: score {record['measures']['score']:.4f}, {record['steps']} steps, "
                     f"{record['seconds']:.0f} s")
        return record

    def fingerprint(self, arm: Arm) -> str:
        """Of all that decides a run beside its rate: other arms and other learning rates leave it as it is."""
        held = merge({k: v for k, v in self.settings.items() if k != "arms"}, {"train": {"lr": None}})
        both = [a and merge(a.plain(), {"train": {"lr": None}}) for a in (arm, self.arms.get(arm.twin or ""))]
        return fingerprint(held, *both)

    def make(self, arm: Arm, seed: int, lr: float) -> dict[str, Any]:
        c, experiment, begun = self.settings, self.experiment, time.process_time()
        device = c.get("device", "cpu")
        problem, plan = experiment.problem(c, arm), merge(c.train, arm.train)
        base = self.base(arm, seed, problem.vocabulary, device)
        model = transformed(base, arm, seed).to(device)
        budget = self.budget(arm, seed)
        if "flops" in budget:  # the learning rate falls over the steps that the budget will take
            plan["steps"] = max(plan.warmup + 1, round(budget["flops"] / step_flops(model, plan.length, plan.rows)))
        tick = self.progress(f"{arm.name} seed {seed} lr {lr:g}", plan.steps)
        done = train(model, problem, plan, lr, seed, device=device, tick=tick, **budget)
        if hasattr(tick, "close"):
            tick.close()
        measures = experiment.measure(model, c, arm)
        if c.get("targets"):
            measures["flops_to"] = {str(loss): done.flops_to(loss) for loss in c.targets}
        return {
            "measures": measures, "steps": done.steps, "seconds": round(done.seconds, 2),
            "flops": done.flops, "step_ms": done.step_ms, "length": done.length, "curve": done.curve,
            "costs": costs(model, plan.length), "cpu": round(time.process_time() - begun, 2), **conditions(device),
        }

    def base(self, arm: Arm, seed: int, vocabulary: int, device: str) -> Any:
        """The stock model below an arm, pre-trained where the experiment does so; equal bases are trained once."""
        stock_config = config_of(arm, self.arms, self.settings, vocabulary)
        model = stock(stock_config, seed).to(device)
        plan = self.settings.get("pretrain")
        problem = self.experiment.before(self.settings, arm) if plan and self.experiment.before else None
        if problem is None:
            return model
        if "model" in plan:  # other attention than later, with the same weights
            stock_config = config(merge(merge(self.settings.model, arm.model), plan.model | _size(stock_config)), vocabulary)
        key = fingerprint(stock_config.to_dict(), seed, repr(problem), plan)
        if key not in self.pretrained:
            self.pretrained[key] = self.pretrain(key, stock(stock_config, seed).to(device), problem, plan, seed, device)
        model.load_state_dict(self.pretrained[key])
        return model

    def pretrain(self, key: str, model: Any, problem: Problem, plan: Settings, seed: int, device: str) -> dict[str, torch.Tensor]:
        """Weights after ``pretrain``; those of other attention (language models) are kept beside the runs."""
        file = self.store.path.parent / "bases" / f"{self.name}-{key}.safetensors" if "model" in plan else None
        if file is not None and file.exists():
            return load_file(file, device=device)
        done = train(model, problem, plan, plan.lr, seed, device=device, count=False)
        if file is not None:
            file.parent.mkdir(exist_ok=True, parents=True)
            save_file({k: v.contiguous() for k, v in model.state_dict().items()}, file)
            self.say(f"pre-trained on {problem}, seed {seed}: loss {done.curve[-1][2]:.3f} after {done.steps} steps, {file}")
        return {k: v.clone() for k, v in model.state_dict().items()}

    def budget(self, arm: Arm, seed: int) -> dict[str, float]:
        """What the other arm took with this seed."""
        if arm.by not in ("seconds", "training FLOPs"):
            return {}
        other = self.arms[arm.twin or ""]
        runs = [r for r in self.store.records() if r["arm"] == other.name and r["seed"] == seed
                and r["settings"] == self.fingerprint(other)]
        if not runs:
            raise ValueError(f"{arm.name}: expected finished runs of {other.name!r}, seed {seed}, whose {arm.by} it takes. Run "
                             f"that arm first, or both with --arms.")
        best = max(runs, key=lambda r: r["measures"]["score"])
        return {"seconds": best["seconds"]} if arm.by == "seconds" else {"flops": best["flops"]}


def _size(stock_config: Any) -> dict[str, int]:
    """Of a twin: its blocks and its feed-forward width."""
    return {"blocks": stock_config.num_hidden_layers, "feedforward": stock_config.intermediate_size}


def value(record: Mapping[str, Any], path: str) -> float:
    """``a.b`` of a run's measures; a key with a dot in it may stand last."""
    measures: Any = record["measures"]
    while path not in measures and "." in path:
        key, _, path = path.partition(".")
        measures = measures[key]
    return measures[path]


def folder(out: Path, name: str, overlay: str | None) -> Path:
    """Common stem of an experiment's files."""
    return out / (name if overlay is None else f"{name}-{overlay}")
