"""Gradients of several sets of responses to one set of prompts: fast against slow thinking (arXiv 2410.23743)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from depthpass.analysis.gradients import GradientReport, gradients_of
from depthpass.annotations import checked
from depthpass.errors import InputError, did_you_mean
from depthpass.prompt import at_prompt

Response = Mapping[str, Tensor] | tuple[Sequence[int] | Tensor, Sequence[int] | Tensor]


@at_prompt
@dataclass(frozen=True)
class GradientComparison:
    """Gradients of sets of responses, each the mean over its responses one by one. ``print`` it.

    Attributes:
        sets: reports by name; norms and losses are means over the responses.
        counts: responses by name.
        parts: two blocks at which the tables cut the stack in three.
    """

    sets: Mapping[str, GradientReport]
    counts: Mapping[str, int]
    parts: tuple[int, int]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.sets)

    @property
    def ranges(self) -> dict[str, tuple[int, int]]:
        """The whole stack and its three parts as half-open ranges of blocks."""
        low, high = self.parts
        blocks = next(iter(self.sets.values())).blocks
        return {"all": (0, blocks), f"0..{low - 1}": (0, low), f"{low}..{high - 1}": (low, high), f"{high}..": (high, blocks)}

    def mad(self, part: str = "all") -> dict[str, dict[str, float]]:
        """MAD by set and projection: the mean of |s[l+1] - s[l]| over neighbouring blocks of a part (see :attr:`ranges`).

        Raises:
            InputError: no such part.
        """
        if part not in self.ranges:
            raise InputError(f"part: expected one of {', '.join(self.ranges)}, got {part!r}.{did_you_mean(part, self.ranges)}")
        return {name: report.mad(*self.ranges[part]) for name, report in self.sets.items()}

    def relative_difference(self, first: str | None = None, second: str | None = None) -> dict[tuple[int, str], float]:
        """RD = (s' - s) / s of two sets' mean nuclear norms, by block and projection; None = the first two sets.

        Raises:
            InputError: no such set.
        """
        one, two = (self.names[0] if first is None else first), (self.names[1] if second is None else second)
        for name in (one, two):
            if name not in self.sets:
                raise InputError(f"expected one of the sets {', '.join(self.names)}, got {name!r}."
                                 f"{did_you_mean(name, self.sets)}")
        return self.sets[one].relative_difference(self.sets[two])

    def rd_table(self, first: str | None = None, second: str | None = None) -> dict[str, dict[str, float]]:
        """Mean of \\|RD\\| over the blocks of a part, by part and projection."""
        differences = self.relative_difference(first, second)
        table: dict[str, dict[str, float]] = {}
        for part, (start, stop) in self.ranges.items():
            by_projection: dict[str, list[float]] = {}
            for (block, projection), value in differences.items():
                if start <= block < stop and value == value:
                    by_projection.setdefault(projection, []).append(abs(value))
            table[part] = {p: sum(v) / len(v) for p, v in by_projection.items()}
        return table

    def largest(self, count: int = 5, first: str | None = None, second: str | None = None) -> list[tuple[int, str, float]]:
        """The ``count`` largest \\|RD\\|, as (block, projection, RD)."""
        differences = self.relative_difference(first, second)
        order = sorted((k for k, v in differences.items() if v == v), key=lambda k: -abs(differences[k]))
        return [(block, projection, differences[block, projection]) for block, projection in order[:count]]

    def __str__(self) -> str:
        projections = next(iter(self.sets.values())).projections
        short = [p.rsplit(".", 1)[-1] for p in projections]
        wide = max(14, *(len(n) + 2 for n in self.names))
        head = "".join(f"{s:>11}" for s in short)
        lines = [", ".join(f"{n}: {c} responses, loss {self.sets[n].loss:.4g}" for n, c in self.counts.items())]
        for part in self.ranges:
            lines += ["", f"MAD of nuclear norms, blocks {part}", f"{'':<{wide}}{head}"]
            for name, row in self.mad(part).items():
                lines.append(f"{name:<{wide}}" + "".join(f"{row[p]:>11.4g}" if p in row else f"{'-':>11}" for p in projections))
        for other in self.names[1:]:
            lines += ["", f"|RD| of {other} against {self.names[0]}, mean over blocks", f"{'':<{wide}}{head}"]
            for part, row in self.rd_table(None, other).items():
                lines.append(f"{part:<{wide}}" + "".join(f"{row[p]:>11.4g}" if p in row else f"{'-':>11}" for p in projections))
            top = ", ".join(f"block {b} {p.rsplit('.', 1)[-1]} {v:+.3g}" for b, p, v in self.largest(5, None, other))
            lines.append(f"largest: {top}")
        return "\n".join(lines)


@checked("gradients")
def compare_gradients(
    model: nn.Module,
    sets: Mapping[str, Iterable[Response]],
    *,
    loss: Callable[[Any], Tensor] | None = None,
    projections: Sequence[str] | None = None,
    parts: tuple[int, int] | None = None,
) -> GradientComparison:
    """See :func:`depthpass.gradients`, which calls this for sets of responses.

    Raises:
        InputError: fewer than two sets, an empty one, or a response that is none.
    """
    listed = {name: list(responses) for name, responses in sets.items()}
    if len(listed) < 2:
        raise InputError(f"gradients: expected at least two sets of responses to compare, got {', '.join(listed) or 'none'}.")
    device = next(model.parameters()).device
    embedding: Any = getattr(model, "get_input_embeddings", lambda: None)()
    words = getattr(embedding, "num_embeddings", None)
    calls = {name: [_call(f"{name}[{i}]", r, device, words) for i, r in enumerate(rs)] for name, rs in listed.items()}
    for name, responses in calls.items():
        if not responses:
            raise InputError(f"gradients: expected responses in every set, got none in {name!r}.")
    means = {name: _mean([gradients_of(model, c, loss=loss, projections=projections) for c in rs]) for name, rs in calls.items()}
    blocks = next(iter(means.values())).blocks
    cut = (blocks // 3, 2 * (blocks // 3)) if parts is None else tuple(parts)
    if len(cut) != 2 or not 0 <= cut[0] <= cut[1] <= blocks:
        raise InputError(f"gradients: parts: expected two blocks 0 <= a <= b <= {blocks}, got {parts!r}.")
    return GradientComparison(means, {name: len(rs) for name, rs in calls.items()}, (cut[0], cut[1]))


def _call(where: str, response: Response, device: torch.device, words: int | None) -> Mapping[str, Tensor]:
    """A response as a call with labels on the response alone."""
    if isinstance(response, Mapping):
        return response
    if not isinstance(response, tuple | list) or len(response) != 2:
        raise InputError(f"gradients: {where}: expected a batch with labels or a pair (prompt ids, response ids), got "
                         f"{type(response).__name__}.")
    prompt, answer = (torch.as_tensor(part, dtype=torch.long).flatten() for part in response)
    if not len(prompt) or not len(answer):
        raise InputError(f"gradients: {where}: expected a prompt and a response of at least one token, got an empty one.")
    ids = torch.cat((prompt, answer)).to(device)
    if words is not None and not 0 <= int(ids.min()) <= int(ids.max()) < words:
        raise InputError(f"gradients: {where}: expected token ids of 0 to {words - 1}, got {int(ids.min())} to {int(ids.max())}.")
    labels = ids.clone()
    labels[: len(prompt)] = -100
    return {"input_ids": ids[None], "labels": labels[None]}


def _mean(reports: Sequence[GradientReport]) -> GradientReport:
    """The report of mean norms."""
    first, n = reports[0], len(reports)

    def averaged(name: str) -> tuple:
        rows = [getattr(r, name) for r in reports]
        return tuple(
            replace(m, nuclear=sum(x.nuclear for x in same) / n, frobenius=sum(x.frobenius for x in same) / n)
            for m, same in zip(rows[0], zip(*rows, strict=True), strict=True)
        )

    return replace(first, loss=sum(r.loss for r in reports) / n, layers=averaged("layers"), visits=averaged("visits"), tensors={})
