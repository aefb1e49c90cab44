"""What a search found, with the controls beside it: as text, JSON, specs and pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from depthpass.errors import InputError
from depthpass.passes.base import Pass
from depthpass.prompt import at_prompt, in_notebooks
from depthpass.search.damped import data_of, spec_of
from depthpass.search.heat_map import HeatMap, heat_map
from depthpass.search.judge import Trial
from depthpass.search.space import Layers
from depthpass.search.statistics import Estimate
from depthpass.spec import dump_spec


@in_notebooks
@dataclass(frozen=True)
class Found:
    """One program for all samples.

    Attributes:
        layers: its visits.
        searched: its score on the samples of the search, which chose it.
        held_out: its score on the others; None = there are none.
    """

    layers: Layers
    searched: Estimate
    held_out: Estimate | None

    @property
    def spec(self) -> Pass:
        """What ``dp.transform`` takes."""
        return spec_of(self.layers)

    @property
    def score(self) -> float:
        """On the samples of the search."""
        return self.searched.value

    @property
    def visits(self) -> int:
        return len(self.layers)

    def to_dict(self) -> dict[str, Any]:
        return {**data_of(self.layers), "visits": self.visits, "searched": self.searched.to_dict(),
                "held_out": self.held_out and self.held_out.to_dict(), "spec": dump_spec(self.spec)}


@in_notebooks
@dataclass(frozen=True)
class Control:
    """The same budget spent without the search.

    Attributes:
        name: ``random``, ``input_blind``, or ``naive`` (the same loops undamped).
        what: how its programs were chosen.
        programs: how many were scored.
        best: the best one of them on the samples of the search.
        mean: the mean score of them all, on these samples.
        difference: held-out score of the search's best minus this one's; None = nothing is held out.
    """

    name: str
    what: str
    programs: int
    best: Found
    mean: float
    difference: Estimate | None

    @property
    def score(self) -> float:
        return self.best.score

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "what": self.what, "programs": self.programs, "mean": self.mean, **self.best.to_dict(),
                "difference": self.difference and self.difference.to_dict()}


@in_notebooks
@dataclass(frozen=True)
class PerSample:
    """A program for every sample, chosen with its answer in sight: an oracle, not a method.

    Attributes:
        best: by sample, the best trial.
        score, visits: of these programs: the score over all samples, and the mean length.
        random, random_visits: the same for as many random programs per sample.
        difference: score minus that of random programs, on the same samples.
        shorter: share of the samples that the stock program has right for which a shorter program is right, too; None = the
            score is not 0 or 1, or there are none.
        fixed: share of the others that some program has right, likewise.
    """

    best: tuple[Trial, ...]
    score: Estimate
    visits: float
    random: Estimate
    random_visits: float
    difference: Estimate
    shorter: float | None
    fixed: float | None

    def to_dict(self) -> dict[str, Any]:
        programs = [{"sample": t.sample, **data_of(t.layers), "score": t.score} for t in self.best]
        return {"programs": programs, "score": self.score.to_dict(), "visits": self.visits, "random": self.random.to_dict(),
                "random_visits": self.random_visits, "difference": self.difference.to_dict(), "shorter": self.shorter,
                "fixed": self.fixed}


@in_notebooks
@dataclass(frozen=True)
class Saved:
    """Block calls over a batch that the programs of a search and its controls consist of, and those that were made.

    Decoded tokens are not counted: every program makes its own.
    """

    asked: int
    ran: int

    @property
    def saved(self) -> int:
        return self.asked - self.ran

    def __str__(self) -> str:
        if not self.asked:
            return "not counted, the score runs the model itself"
        share = 100 * self.saved / self.asked
        return f"{self.asked} asked for, {self.ran} run; the prefix memo saved {self.saved} ({share:.0f} %)"


@at_prompt
@dataclass(frozen=True)
class SearchResult:
    """Result of :func:`depthpass.search`. ``print`` it.

    Attributes:
        model: class name.
        blocks: L.
        settings: method, space, score, budget, seed and numbers of samples, as plain data.
        lower: whether a lower score is better.
        stock: the stock program.
        best: the best single program for all samples: the highest score, then the fewest visits.
        front: single programs that no other beats in both score and visits, shortest first.
        trials: every program that the search scored, in order.
        controls: ``random`` and ``input_blind``, and ``naive`` for damped loops, by name.
        per_sample: the oracle of a search per sample; None = one search for all samples.
        block_visits: what the prefix memo saved.
    """

    model: str
    blocks: int
    settings: Mapping[str, Any]
    lower: bool
    stock: Found
    best: Found
    front: tuple[Found, ...]
    trials: tuple[Trial, ...] = field(repr=False)
    controls: Mapping[str, Control]
    per_sample: PerSample | None
    block_visits: Saved

    def __str__(self) -> str:
        from depthpass.search.text import to_text

        return to_text(self)

    def __rich__(self) -> Any:
        from rich.text import Text

        return Text(str(self))

    def front_table(self) -> str:
        """The Pareto front as a table in text."""
        from depthpass.search.text import front_lines

        return "\n".join(front_lines(self))

    def heat_map(self, times: int = 2) -> HeatMap:
        """Scores by start and end of the range that runs ``times`` times (RYS), or in so many damped steps; 0 = it is skipped.

        Raises:
            InputError: no trial of one repeated range, or ``times`` is 1 or negative.
        """
        return heat_map(self, times)

    def to_dict(self) -> dict[str, Any]:
        trials = [{**data_of(t.layers), "score": t.score, **({} if t.sample is None else {"sample": t.sample})}
                  for t in self.trials]
        return {
            "schema": "depthpass.search", "version": 1, "model": self.model, "blocks": self.blocks,
            "settings": dict(self.settings), "stock": self.stock.to_dict(), "best": self.best.to_dict(),
            "controls": [c.to_dict() for c in self.controls.values()], "front": [f.to_dict() for f in self.front],
            "per_sample": self.per_sample and self.per_sample.to_dict(),
            "block_visits": {"asked": self.block_visits.asked, "ran": self.block_visits.ran, "saved": self.block_visits.saved},
            "trials": trials,
        }

    def to_json(self, indent: int | None = 2) -> str:
        """:meth:`to_dict` as JSON; numbers that are not finite become null."""
        return json.dumps(_finite(self.to_dict()), indent=indent, allow_nan=False)

    def to_svg(self) -> str:
        """The Pareto front and all trials, score against visits, as a file of its own."""
        from depthpass.search.plot import front_svg

        return front_svg(self)

    def save(self, path: str | Path) -> Path:
        """Write specs that ``dp.transform`` takes: a ``.yaml`` or ``.json`` file of the best one, or a folder.

        The folder gets ``best.yaml``, ``front-VISITS.yaml`` for every program of the front, ``sample-I.yaml`` for every
        sample that was searched by itself, ``result.json`` and ``front.svg``.

        Raises:
            InputError: another kind of file.
        """
        path = Path(path)
        if path.suffix and not path.is_dir():
            if path.suffix not in (".yaml", ".yml", ".json"):
                raise InputError(f"save: expected a .yaml or .json file or a folder, got {str(path)!r}.")
            path.write_text(_spec_text(self.best.layers, path.suffix), encoding="utf-8")
            return path
        path.mkdir(parents=True, exist_ok=True)
        for name, layers in self._named():
            (path / f"{name}.yaml").write_text(_spec_text(layers, ".yaml"), encoding="utf-8")
        (path / "result.json").write_text(self.to_json() + "\n", encoding="utf-8")
        (path / "front.svg").write_text(self.to_svg(), encoding="utf-8")
        return path

    def _named(self) -> Iterator[tuple[str, Layers]]:
        yield "best", self.best.layers
        for program in self.front:
            yield f"front-{program.visits}", program.layers
        for trial in () if self.per_sample is None else self.per_sample.best:
            yield f"sample-{trial.sample}", trial.layers


def pareto(trials: Sequence[Trial], lower: bool) -> list[Trial]:
    """Trials that no other beats, shortest first: each has a better score than all shorter ones."""
    sign = -1 if lower else 1
    best: list[Trial] = []
    for t in sorted(trials, key=lambda t: (t.visits, -sign * t.score, t.layers)):
        if not best or sign * t.score > sign * best[-1].score:
            best.append(t)
    return best


def _spec_text(layers: Layers, suffix: str) -> str:
    spec = dump_spec(spec_of(layers))
    return json.dumps(spec, indent=2) + "\n" if suffix == ".json" else yaml.safe_dump(spec, sort_keys=False)


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {k: _finite(v) for k, v in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(v) for v in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
