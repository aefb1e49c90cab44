"""Estimates of scores, and of differences of scores on the same samples."""

from __future__ import annotations

from collections.abc import Sequence

from depthpass.search.samples import Sample
from depthpass.search.scores import Score
from depthpass.search.statistics import Estimate, Total, bootstrap, paired, wilson


def estimate(score: Score, values: Sequence[float], samples: Sequence[Sample]) -> Estimate:
    """A score with its interval: Wilson's for shares, by resampling samples otherwise."""
    total = _total(score, values, samples)
    value = total(range(len(values)))
    ends = wilson(sum(values), len(values)) if score.share else bootstrap(total, len(values))
    return Estimate(value, *(ends or (None, None)), len(values))


def difference(score: Score, a: Sequence[float], b: Sequence[float], samples: Sequence[Sample]) -> Estimate:
    """The score of ``a`` minus that of ``b``, sample by sample the same ones."""
    n, first, second = len(a), _total(score, a, samples), _total(score, b, samples)
    value = first(range(n)) - second(range(n))
    if score.share:
        ends = paired(sum(x > y for x, y in zip(a, b)), sum(x < y for x, y in zip(a, b)), n)
    else:
        ends = bootstrap(lambda places: first(places) - second(places), n)
    return Estimate(value, *(ends or (None, None)), n)


def _total(score: Score, values: Sequence[float], samples: Sequence[Sample]) -> Total:
    return lambda places: score.total([values[i] for i in places], [samples[i] for i in places])
