"""The FLOPs ledger of a training run: what every step cost at the loop count that ran, from the cost analysis."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, astuple, dataclass, field, fields
from typing import Any

from torch import nn

from depthpass.analysis.cost import Cost, cost, model_cost
from depthpass.analysis.cost.program import Trainable
from depthpass.hf.modules.context import context_of
from depthpass.hf.modules.placement import copied
from depthpass.ir.program import Program, plain
from depthpass.prompt import at_prompt

_BLOCKS = ("projection", "attention", "mlp", "new")
"""Classes of FLOPs inside the blocks and in what passes added; the rest is embedding, final norm and head."""


@dataclass(frozen=True)
class Entry:
    """One optimizer step.

    Attributes:
        step: number of the step, from 1.
        visits: block visits per token, averaged over rows and accumulated batches.
        tokens: rows times columns, pads included, of all its batches.
        flops, stock_flops: forward and backward; of the program that ran, and of the stock model on the same batches.
        block_flops, stock_block_flops: the share inside the blocks.
    """

    step: int
    visits: float
    tokens: int
    flops: float
    stock_flops: float
    block_flops: float
    stock_block_flops: float


@at_prompt
@dataclass
class Ledger:
    """FLOPs of a run, step by step; forward and backward, without optimizer, recomputation and evaluation.

    Attributes:
        entries: one per optimizer step.
    """

    entries: list[Entry] = field(default_factory=list)

    @property
    def flops(self) -> float:
        """All FLOPs of the run."""
        return sum(e.flops for e in self.entries)

    @property
    def stock_flops(self) -> float:
        """What the stock model would have taken for the same batches."""
        return sum(e.stock_flops for e in self.entries)

    @property
    def ratio(self) -> float:
        """FLOPs over the stock model's."""
        return self.flops / self.stock_flops

    @property
    def block_ratio(self) -> float:
        """The same inside the blocks: f + (1 - f) T for a whole-stack loop that is switched from 1 to T (SHIFT)."""
        return sum(e.block_flops for e in self.entries) / sum(e.stock_block_flops for e in self.entries)

    def rows(self) -> list[dict[str, Any]]:
        """One mapping from column to value per step."""
        return [asdict(e) for e in self.entries]

    def dump(self) -> list[list[float]]:
        """Plain data, for a checkpoint."""
        return [list(astuple(e)) for e in self.entries]

    @classmethod
    def load(cls, rows: Iterable[Iterable[Any]]) -> Ledger:
        return cls([Entry(*row) for row in rows])

    def __str__(self) -> str:
        head = [f.name for f in fields(Entry)]
        lines = ["  ".join(head)]
        lines += ["  ".join(f"{getattr(e, k):.4g}".rjust(len(k)) for k in head) for e in self.entries]
        if self.entries:
            lines.append(f"total {self.flops:.4g} FLOPs, {self.ratio:.4g} times the stock model")
        return "\n".join(lines)


class Counter:
    """Counts the calls of a model in training mode, until a step is closed.

    Args:
        model: the model itself, transformed or stock, out of any wrapper.
        trainable: which parameters train; see :data:`depthpass.analysis.cost.program.TRAINABLE`.
    """

    def __init__(self, model: Any, trainable: Trainable = "all"):
        from depthpass.hf.model import DepthModel
        from depthpass.hf.modules.hooks import without_hooks
        from depthpass.hf.stock import stock_copy

        self.model = model
        self.trainable: Trainable = trainable
        transformed = isinstance(model, DepthModel)
        self.plain = None if transformed else _plain(model)
        self.parts = model_cost(without_hooks(stock_copy(model) if transformed else copied(model)))
        self.costs: dict[int, tuple[Program, Cost]] = {}
        self.known: dict[tuple[int, int, int], tuple[float, float, float, float]] = {}
        self.calls: list[tuple[int, int, int]] = []
        self.handle = model.register_forward_hook(self._count, with_kwargs=True)

    def _count(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: object) -> None:
        if not module.training:
            return
        for program, rows, columns in self._ran(args, kwargs):
            # By identity: a program is made once per plan, and the ledger keeps it alive.
            if id(program) not in self.costs:
                self.costs[id(program)] = program, cost(program, self.parts, trainable=self.trainable)
            self.calls.append((id(program), rows, columns))

    def _ran(self, args: tuple, kwargs: dict[str, Any]) -> Sequence[tuple[Program, int, int]]:
        """What a call has run: programs with rows and columns."""
        if self.plain is None:
            return self.model._depth.ran
        tokens = next((x for n in ("input_ids", "inputs_embeds") if (x := kwargs.get(n)) is not None), None)
        tokens = args[0] if tokens is None else tokens
        return [(self.plain, tokens.shape[0], tokens.shape[1])]

    def close(self, step: int) -> Entry:
        """The entry of what was counted since the last one."""
        sums, visits, tokens = [0.0] * 4, 0.0, 0
        for key, rows, columns in self.calls:
            tokens += rows * columns
            visits += rows * columns * len(self.costs[key][0].visits)
            sums = [a + b for a, b in zip(sums, self._flops(key, rows, columns))]
        self.calls.clear()
        return Entry(step, visits / max(tokens, 1), tokens, *sums)

    def _flops(self, key: int, rows: int, columns: int) -> tuple[float, float, float, float]:
        at = (key, rows, columns)
        if at not in self.known:
            mine = self.costs[key][1]
            both = (_split(mine, rows, columns), _split(mine.stock or mine, rows, columns))
            self.known[at] = (both[0][0], both[1][0], both[0][1], both[1][1])
        return self.known[at]

    def remove(self) -> None:
        self.handle.remove()


def _plain(model: nn.Module) -> Program:
    """The program of a stock model."""
    context = context_of(model)
    return plain(context.model, context.blocks, context.width)


def _split(costs: Cost, rows: int, columns: int) -> tuple[float, float]:
    """FLOPs of a training step, all and inside the blocks."""
    whole = inside = 0.0
    for side in (costs.flops, costs.backward_flops):
        for name, expr in side.items():
            value = costs.evaluate(expr, columns, rows)
            whole += value
            inside += value if name in _BLOCKS else 0.0
    return whole, inside
