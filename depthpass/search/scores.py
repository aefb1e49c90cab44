"""Scores of a program on samples: exact match by generate, greedy match, log-probability, perplexity, and a user's own."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from depthpass.errors import InputError, did_you_mean
from depthpass.limits import shown
from depthpass.search.forward import Forward
from depthpass.search.samples import Sample
from depthpass.search.space import Layers

Own = Callable[[Any, Sequence[Sample]], Any]


@dataclass(frozen=True)
class Score:
    """How programs are compared.

    Attributes:
        name: as it is printed.
        values: one number for each of the rows.
        share: whether the numbers are 0 or 1.
        lower: whether lower totals are better.
    """

    name: str
    values: Callable[[Forward, Layers, Sequence[int]], list[float]]
    share: bool = False
    lower: bool = False

    def total(self, values: Sequence[float], samples: Sequence[Sample]) -> float:
        """The score over samples: the mean of their numbers."""
        return math.fsum(values) / len(values)

    def gain(self, total: float) -> float:
        """The score with its sign set so that more is better."""
        return -total if self.lower else total


class Perplexity(Score):
    """Per token of the answers: the values are negative log-probabilities of whole answers."""

    def total(self, values: Sequence[float], samples: Sequence[Sample]) -> float:
        mean = math.fsum(values) / sum(len(s.answer) for s in samples)
        return math.exp(mean) if mean < 700 else math.inf


def load_score(score: str | Own) -> Score:
    """A score by its name, or a user's own.

    Args:
        score: ``exact_match``: whether ``generate`` (greedy) says the answer. ``greedy_match``: whether every token of the
            answer is the most likely one after those before it, the same in one call without decoding (but for generation
            settings such as penalties). ``log_prob``: log-probability of the answer. ``perplexity``: per token of the answers.
            Or a callable ``score(model, samples)`` that returns one number per sample, more = better; the model runs the
            program, samples are (prompt ids, answer ids) pairs.

    Raises:
        InputError: no such score.
    """
    if callable(score):
        return Score(getattr(score, "__name__", type(score).__name__), _own(score))
    if not isinstance(score, str) or score not in SCORES:
        raise InputError(f"score: expected one of {', '.join(SCORES)} or a callable, got {shown(score)}."
                         f"{did_you_mean(str(score), SCORES)}")
    return SCORES[score]


def check_values(name: str, layers: Layers, values: Sequence[float]) -> None:
    """Refuse a score that is not a finite number: means, intervals and differences of it say nothing.

    Raises:
        InputError: naming the sample and the program.
    """
    for i, v in enumerate(values):
        if not math.isfinite(v):
            got = "NaN" if math.isnan(v) else "infinity" if v > 0 else "minus infinity"
            raise InputError(f"score {name}: expected a finite number for every sample, got {got} for sample {i} of the searched "
                             f"ones with the program {list(layers)}. Programs cannot be compared with it: return a worst value "
                             "instead, or check the model's numbers (float16 overflows).")


def _exact(forward: Forward, layers: Layers, rows: Sequence[int]) -> list[float]:
    scores = {r: float(new == forward.samples[r].answer) for r, new in forward.generated(layers, rows)}
    return [scores[r] for r in rows]


def _greedy(forward: Forward, layers: Layers, rows: Sequence[int]) -> list[float]:
    scores = {r: float(tuple(x.argmax(-1).tolist()) == forward.samples[r].answer)
              for r, x in forward.answer_logits(layers, rows)}
    return [scores[r] for r in rows]


def _log_prob(forward: Forward, layers: Layers, rows: Sequence[int]) -> list[float]:
    scores = {}
    for r, x in forward.answer_logits(layers, rows):
        answer = torch.tensor(forward.samples[r].answer, device=x.device)
        x = x if x.dtype == torch.float64 else x.float()
        scores[r] = float(x.log_softmax(-1).gather(-1, answer[:, None]).sum())
    return [scores[r] for r in rows]


def _own(score: Own) -> Callable[[Forward, Layers, Sequence[int]], list[float]]:
    def values(forward: Forward, layers: Layers, rows: Sequence[int]) -> list[float]:
        samples = [forward.samples[r] for r in rows]
        with forward.using(layers), torch.no_grad():
            answer: Any = score(forward.model, samples)
            if _is_number(answer) and len(samples) > 1:  # of all samples together: ask for one at a time
                answer = [score(forward.model, [s]) for s in samples]
        listed = getattr(answer, "tolist", None)  # of a tensor, a NumPy array
        given: Any = [answer] if _is_number(answer) else listed() if callable(listed) else answer
        if not isinstance(given, Sequence) or len(given) != len(samples) or not all(map(_is_number, given)):
            raise InputError(f"score: expected {len(samples)} numbers, one for each sample, got {shown(given)}. Write "
                             "score(model, samples) so that it returns a list.")
        return [float(v) for v in given]

    return values


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) or (isinstance(value, torch.Tensor) and value.numel() == 1 and value.dim() == 0)


SCORES: dict[str, Score] = {
    "exact_match": Score("exact_match", _exact, share=True),
    "greedy_match": Score("greedy_match", _greedy, share=True),
    "log_prob": Score("log_prob", _log_prob),
    "perplexity": Perplexity("perplexity", lambda f, p, r: [-v for v in _log_prob(f, p, r)], lower=True),
}
