"""``depthpass.search``: check, split, search, run the controls, compare on what is held out."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from depthpass.annotations import checked
from depthpass.errors import InputError
from depthpass.limits import shown
from depthpass.log import Bar
from depthpass.search.compare import difference, estimate
from depthpass.search.damped import DampedLoops
from depthpass.search.forward import Forward
from depthpass.search.journal import Journal, digest, identity
from depthpass.search.judge import Bench, Judge, Trial
from depthpass.search.methods import Beam, Method, RandomSearch, Sweep
from depthpass.search.named import load_method
from depthpass.search.result import Control, Found, PerSample, Saved, SearchResult, pareto
from depthpass.search.samples import Sample, SamplesLike, check_apart, check_fit, load_samples, split
from depthpass.search.scores import Own, Score, load_score
from depthpass.search.space import AnySpace, Layers, SpaceLike, listing, load_space, stock
from depthpass.search.subject import subject

BUDGET = 200
"""Programs of a search, as published."""


@checked("search", but=("samples", "space", "held_out"))
def search(
    model: Any, samples: SamplesLike, *, score: str | Own = "exact_match", space: SpaceLike = "cola",
    method: str | Method = "mcts", budget: int | None = None, seed: int = 0, per_sample: bool = False,
    held_out: float | SamplesLike = 0.5, memo: int | bool = True, batch: int = 32,
    on_trial: Callable[[int, int], object] | None = None, resume: str | Path | None = None,
) -> SearchResult:
    """Search layer programs (which blocks are skipped, which repeated) that answer samples best, beside its controls.

    Programs are switched live; those that begin with the same visits share streams, keys and values. With every search the
    same budget goes to two controls: ``random`` programs of the space, and ``input_blind`` ones, the best single program that
    another simple way finds (for a search per sample: the same method, for all samples at once). All are compared on
    samples that nobody searched on. CoLa: arXiv 2507.07996; Dr.LLM; PoLar: arXiv 2606.06574; RYS; that input-blind programs
    match searched ones: arXiv 2610.10368.

    Args:
        model: a causal language model, which stays untouched; or one transformed with ``Identity`` or a layer program.
        samples: (prompt ids, answer ids) pairs of lists, 1-D tensors or arrays, or a callable that returns them (given
            ``seed=`` if it takes that).
        score: ``exact_match`` (by greedy ``generate``), ``greedy_match`` (the same tokens from one call, without decoding),
            ``log_prob``, ``perplexity``, or ``score(model, samples)``, one number per sample, more = better.
        space: ``cola`` (skip or repeat spans of 1 to 4, length at most 2L), ``dr_llm``, ``polar``, ``rys``,
            ``training_free`` (damped loops of a range, arXiv 2605.23872), a :class:`~depthpass.search.space.Space` or
            :class:`~depthpass.search.damped.DampedLoops`, their fields, or a list of layer programs.
        method: ``mcts``, ``beam``, ``random``, ``sweep`` (every program of one edit), ``exhaustive``, or one of
            :mod:`depthpass.search` with options, as ``MCTS(penalty=5)``.
        budget: programs that are scored besides the stock one, for each sample with ``per_sample``; None = 200, or all for
            ``sweep`` and ``exhaustive``. Each control has the same.
        seed: of the split, the search and the random control.
        per_sample: search a program for each sample with its answer in sight, as CoLa does: an oracle. ``best`` then is the
            best single one of these programs.
        held_out: share of the samples that is kept for comparison, or other samples.
        memo: bytes that shared prefixes may hold; True = 1 GiB, False = none. The numbers do not depend on it.
        batch: most rows of a call.
        on_trial: called after every program that ran, with how many have and how many can at most; left out = a bar on a
            terminal (``dp.progress(False)``: none).
        resume: a file that keeps every scored program as soon as it is known. A search that was stopped goes on when it is
            called again with the same file, to the same result; a larger ``budget`` goes on behind the smaller one.

    Raises:
        InputError: an argument cannot be honoured, a sample does not fit the model, ``resume`` is of another search, or a
            score is not finite; all but the last before any program runs.
        UnsupportedModelError: the model cannot be treated.
    """
    how, where, judged = load_method(method), load_space(space), load_score(score)
    _check(budget, seed, per_sample, memo, batch)
    given, searched, rest = _samples(samples, held_out, seed)
    journal = None if resume is None else Journal(resume)
    said = {"seed": seed, "samples": digest(given), "held_out": digest((searched, rest)), "per_sample": per_sample}
    with subject(model) as (live, inner), Bar("scoring programs") as bar:
        blocks = inner.depth_program.blocks
        where.check(blocks)
        how.check(where, blocks, BUDGET if budget is None and not how.complete else budget)
        _check_fit(inner, given, rest)
        budget = _budget(budget, how, where, blocks)
        most = (budget + 1) * (2 + len(searched) if per_sample else 3)
        told, room = on_trial or bar, (1 << 30) * memo if isinstance(memo, bool) else memo
        if journal is not None:
            journal.begin(identity(live, inner) | said | _asked(how, where, judged))
        bench = Bench(Forward(live, (*searched, *rest), room, batch), judged, lambda done: told(min(done, most), most), journal)
        return Search(bench, how, where, budget, seed, len(searched), stock(blocks)).result(type(inner).__name__, per_sample)


class Search:
    """One search and its controls.

    Attributes:
        rows, held: places of the samples to search on, and of the others.
    """

    def __init__(self, bench: Bench, method: Method, space: AnySpace, budget: int, seed: int, searched: int, root: Layers):
        self.bench, self.method, self.space, self.budget, self.seed, self.root = bench, method, space, budget, seed, root
        samples = bench.forward.samples
        self.rows, self.held = tuple(range(searched)), tuple(range(searched, len(samples)))

    def result(self, name: str, per_sample: bool) -> SearchResult:
        oracle, trials, judge = self._oracle() if per_sample else (None, (), None)
        if judge is None:
            judge = self._judge(self.method)
            blind_method = Beam() if isinstance(self.method, Sweep) else Sweep()
            what = f"the best single program by another way ({blind_method.name}), same budget"
            blind = self._judge(blind_method, "input_blind")
            singles = judge.trials
            trials = tuple(judge.trials.values())
        else:
            what = f"the best single program for all samples ({self.method.name}), same budget"
            blind = self._judge(self.method, "input_blind")
            singles = {**judge.trials, **blind.trials}
        best = judge.best()
        controls = (
            self._control("random", "random programs of the space, same budget", self._judge(RandomSearch(), "random"), best),
            self._control("input_blind", what, blind, best),
        )
        if isinstance(self.space, DampedLoops):
            naive = Judge(self.bench, self.rows, self.budget, self.root)
            naive.run(tuple(layers) for layers in singles if layers != self.root)
            controls += (self._control("naive", "the same ranges and counts, repeated without damping", naive, best),)
        score = self.bench.score
        settings = {
            **_asked(self.method, self.space, score), "budget": self.budget, "seed": self.seed,
            "samples": len(self.rows), "held_out": len(self.held), "scored": len(judge.trials) - 1,
            "programs": len(judge.trials) - 1 if oracle is None else self.budget, "per_sample": per_sample,
        }
        front = tuple(self._found(t) for t in pareto(list(singles.values()), score.lower))
        return SearchResult(
            name, len(self.root), settings, score.lower, self._found(judge.trials[self.root]), self._found(best), front, trials,
            {c.name: c for c in controls}, oracle, Saved(*self.bench.block_visits),
        )

    def _judge(self, method: Method, who: str = "search", sample: int | None = None) -> Judge:
        """A finished search on one sample, or on all of them; ``who`` gives it draws of its own."""
        judge = Judge(self.bench, self.rows if sample is None else (sample,), self.budget, self.root, sample)
        method.run(judge, self.space, random.Random(f"{self.seed} {who} {method.name} {sample}"))
        return judge

    def _oracle(self) -> tuple[PerSample, tuple[Trial, ...], Judge]:
        """A search per sample: what it says, all its trials, and its winners scored on all samples."""
        winners, others, trials = [], [], []
        for i in self.rows:
            judge = self._judge(self.method, sample=i)
            winners.append(judge.best())
            trials += judge.trials.values()
            others.append(self._judge(RandomSearch(), "random", i).best())
            self.bench.forward.memo.forget()
        everywhere = Judge(self.bench, self.rows, len(winners), self.root)
        everywhere.run(t.layers for t in winners)
        score, samples = self.bench.score, self._samples(self.rows)
        values, random_values = ([t.values[0] for t in bests] for bests in (winners, others))
        shorter = fixed = None
        if score.share:
            plain = everywhere.trials[self.root].values
            right = [t.visits < len(self.root) and t.score == 1 for t, p in zip(winners, plain) if p]
            wrong = [t.score == 1 for t, p in zip(winners, plain) if not p]
            shorter, fixed = (sum(x) / len(x) if x else None for x in (right, wrong))
        oracle = PerSample(
            tuple(winners), estimate(score, values, samples), _mean(t.visits for t in winners),
            estimate(score, random_values, samples), _mean(t.visits for t in others),
            difference(score, values, random_values, samples), shorter, fixed,
        )
        return oracle, tuple(trials), everywhere

    def _control(self, name: str, what: str, judge: Judge, best: Trial) -> Control:
        others = [t.score for t in judge.trials.values() if t.layers != self.root]
        apart = None
        if self.held:
            a, b = (self.bench.trial(t.layers, self.held).values for t in (best, judge.best()))
            apart = difference(self.bench.score, a, b, self._samples(self.held))
        return Control(name, what, judge.spent, self._found(judge.best()), _mean(others), apart)

    def _found(self, trial: Trial) -> Found:
        score = self.bench.score
        held = None
        if self.held:
            held = estimate(score, self.bench.trial(trial.layers, self.held).values, self._samples(self.held))
        return Found(trial.layers, estimate(score, trial.values, self._samples(self.rows)), held)

    def _samples(self, rows: tuple[int, ...]) -> list[Sample]:
        return [self.bench.forward.samples[r] for r in rows]


def _samples(samples: SamplesLike, held_out: float | SamplesLike, seed: int) -> tuple[tuple[Sample, ...], ...]:
    """All samples, those to search on, and those kept for comparison."""
    given = load_samples(samples, seed)
    if isinstance(held_out, int | float):
        return given, *split(given, held_out, seed)
    rest = load_samples(held_out, seed, "held_out")
    check_apart(given, rest)
    return given, given, rest


def _check_fit(model: Any, given: tuple[Sample, ...], rest: tuple[Sample, ...]) -> None:
    """Samples and held-out ones fit the model's vocabulary and positions."""
    from depthpass.hf.calls.table import table_size

    for part, what in ((given, "samples"), (rest, "held_out")):
        check_fit(part, len(model.get_input_embeddings().weight), table_size(model), what)


def _check(budget: Any, seed: Any, per_sample: Any, memo: Any, batch: Any) -> None:
    for name, value, least in (("budget", budget, 1), ("batch", batch, 1), ("seed", seed, None)):
        if (name == "budget" and value is None) or (type(value) is int and (least is None or value >= least)):
            continue
        raise InputError(f"{name}: expected an integer{'' if least is None else ' of at least 1'}, got {shown(value)}.")
    if not isinstance(per_sample, bool):
        raise InputError(f"per_sample: expected True or False, got {shown(per_sample)}.")
    if not isinstance(memo, int) or memo < 0:
        raise InputError(f"memo: expected a number of bytes, True or False, got {shown(memo)}.")


def _asked(method: Method, space: AnySpace, score: Score) -> dict[str, Any]:
    options = {f.name: getattr(method, f.name) for f in fields(method)}
    return {"method": method.name, "options": options, "space": space.to_dict(), "score": score.name}


def _budget(budget: int | None, method: Method, space: AnySpace, blocks: int) -> int:
    if budget is not None:
        return budget
    if not method.complete:
        return BUDGET
    if isinstance(method, Sweep):
        return len(space.children(stock(blocks), blocks, 0))
    return len(listing(space, blocks)[0]) - 1


def _mean(values: Any) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers) if numbers else float("nan")
