"""The judge of a search: runs programs, each once, within a budget, and keeps every trial."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from depthpass.passes.base import Pass
from depthpass.prompt import in_notebooks
from depthpass.search.damped import spec_of
from depthpass.search.forward import Forward
from depthpass.search.journal import Journal
from depthpass.search.scores import Score, check_values
from depthpass.search.space import Layers


@in_notebooks
@dataclass(frozen=True)
class Trial:
    """A program that was scored.

    Attributes:
        layers: its visits.
        values: the score's number for every sample it ran on; of a perplexity, negative log-probabilities.
        score: over these samples.
        sample: the place of its sample where every sample is searched by itself; None = all samples of the search.
    """

    layers: Layers
    values: tuple[float, ...]
    score: float
    sample: int | None = None

    @property
    def visits(self) -> int:
        return len(self.layers)

    @property
    def spec(self) -> Pass:
        """What ``dp.transform`` takes."""
        return spec_of(self.layers)


class Bench:
    """Scores of programs on samples, each pair run once.

    Args:
        forward: the model and all samples.
        score: how they are scored.
        on_trial: called with the number of pairs that have run.
        journal: has the pairs that ran before a stop, and is given every new one.
    """

    def __init__(self, forward: Forward, score: Score, on_trial: Callable[[int], object] | None = None,
                 journal: Journal | None = None):
        self.forward, self.score, self.on_trial, self.journal = forward, score, on_trial, journal
        self.known: dict[tuple[Layers, tuple[int, ...]], tuple[float, ...]] = {} if journal is None else dict(journal.known)

    @property
    def block_visits(self) -> tuple[int, int]:
        """Block calls of the programs, and those of them that were made, before a stop too."""
        memo, before = self.forward.memo, self.journal
        return memo.asked + (before.asked if before else 0), memo.ran + (before.ran if before else 0)

    def trial(self, layers: Layers, rows: tuple[int, ...], sample: int | None = None) -> Trial:
        """A program on the samples at some places."""
        values = self.known.get((layers, rows))
        if values is None:
            memo = self.forward.memo
            asked, ran = memo.asked, memo.ran
            values = tuple(self.score.values(self.forward, layers, rows))
            check_values(self.score.name, layers, values)
            self.known[layers, rows] = values
            if self.journal is not None:
                self.journal.add(layers, rows, values, memo.asked - asked, memo.ran - ran)
            if self.on_trial is not None:
                self.on_trial(len(self.known))
        samples = [self.forward.samples[r] for r in rows]
        return Trial(layers, values, self.score.total(values, samples), sample)


class Judge:
    """One search on some samples.

    Args:
        bench: what runs programs.
        rows: places of the samples.
        budget: programs that may be scored besides the stock one.
        root: the stock program, scored first.
        sample: as in :class:`Trial`.
    """

    def __init__(self, bench: Bench, rows: Sequence[int], budget: int, root: Layers, sample: int | None = None):
        self.bench, self.rows, self.budget, self.root, self.sample = bench, tuple(rows), budget, root, sample
        self.trials: dict[Layers, Trial] = {}
        self._run(root)

    @property
    def left(self) -> int:
        """Programs that may still be scored."""
        return self.budget - self.spent

    @property
    def spent(self) -> int:
        return len(self.trials) - 1

    def gain(self, layers: Layers) -> float:
        """The score of a program, more = better."""
        return self.bench.score.gain(self._run(layers).score)

    def run(self, programs: Iterable[Layers]) -> None:
        """Score programs, in an order in which neighbours share most, as far as the budget goes."""
        new = [p for p in dict.fromkeys(programs) if p not in self.trials][: self.left]
        for layers in sorted(new):
            self._run(layers)

    def best(self) -> Trial:
        """The best score; among equal ones the shortest program, then the first in order."""
        return min(self.trials.values(), key=lambda t: (-self.bench.score.gain(t.score), t.visits, t.layers))

    def _run(self, layers: Layers) -> Trial:
        trial = self.trials.get(layers)
        if trial is None:
            trial = self.trials[layers] = self.bench.trial(layers, self.rows, self.sample)
        return trial
