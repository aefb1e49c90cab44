"""The RYS heat map: the score by start and end of one repeated range."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from depthpass.errors import InputError
from depthpass.limits import shown
from depthpass.prompt import at_prompt
from depthpass.search.damped import Damped
from depthpass.search.space import Layers, stock

if TYPE_CHECKING:
    from depthpass.search.result import SearchResult


@at_prompt
@dataclass(frozen=True)
class HeatMap:
    """Scores of programs that run blocks ``start .. end-1`` ``times`` times in a row.

    Attributes:
        times: visits of the range; 0 = it is skipped.
        scores: ``scores[start][end - 1]``; None = not scored.
        stock: the score of the stock program.
    """

    times: int
    scores: tuple[tuple[float | None, ...], ...]
    stock: float

    def __str__(self) -> str:
        blocks = len(self.scores)
        head = (f"score by start (down) and end (across, exclusive) of the range that runs {self.times} times; stock "
                f"{self.stock:.3g}")
        lines = [head, "       " + "".join(f"{end:>7}" for end in range(1, blocks + 1))]
        for start, row in enumerate(self.scores):
            lines.append(f"{start:>7}" + "".join(f"{'' if s is None else f'{s:.3g}':>7}" for s in row))
        return "\n".join(line.rstrip() for line in lines)

    def to_json(self) -> str:
        return json.dumps({"times": self.times, "stock": self.stock, "scores": [list(row) for row in self.scores]})

    def to_svg(self) -> str:
        """A picture, as a file of its own."""
        from depthpass.search.plot import heat_svg

        return heat_svg(self)


def heat_map(result: SearchResult, times: int) -> HeatMap:
    """See :meth:`SearchResult.heat_map`."""
    if type(times) is not int or times < 0 or times == 1:
        raise InputError(f"heat_map.times: expected 0 (skipped) or at least 2, got {shown(times)}; once is the stock program.")
    known = {t.layers: t.score for t in result.trials if t.sample is None}
    plain = stock(result.blocks)
    rows = []
    for start in range(result.blocks):
        ends = range(1, result.blocks + 1)
        rows.append(tuple(
            _score(known, plain, start, end, times) if end > start else None for end in ends
        ))
    if all(s is None for row in rows for s in row):
        raise InputError(f"heat_map: no program of one range that runs {times} times was scored on all samples. Search with "
                         "method='sweep', space='rys'.")
    return HeatMap(times, tuple(rows), result.stock.score)


def _score(known: dict[Layers, float], plain: Layers, start: int, end: int, times: int) -> float | None:
    """Of the range repeated as it is, else in damped steps of 1 / times."""
    score = known.get(plain[:start] + plain[start:end] * times + plain[end:])
    return known.get(Damped(len(plain), start, end, times)) if score is None and times else score
