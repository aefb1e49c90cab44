"""Toy blocks with attention, positions and gates, in float64: enough to tell every rewiring from every other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from depthpass.ir import Program, parameters
from depthpass.ir.interpret import Interpretation

WIDTH = 6


def _random(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@dataclass
class ToyBlock:
    """One head of attention with a rotation by position, then a nonlinear map; residual adds included."""

    seed: int
    gates: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(self.seed)
        self.q, self.k, self.v, self.o, self.mlp = (_random(g, WIDTH, WIDTH) / math.sqrt(WIDTH) for _ in range(5))

    def keys(self, x: Tensor, position: int) -> tuple[Tensor, Tensor]:
        return self._rotate(self.k @ x, position), self.v @ x

    def __call__(
        self, x: Tensor, position: int, keys: Sequence[tuple[Tensor, Tensor]],
        own: Sequence[tuple[Tensor, Tensor]] = (), gate: str = "",
    ) -> Tensor:
        q = self._rotate(self.q @ x, position)
        y = self.attend(q, keys)
        if gate:
            g = self.gate(q, gate)
            y = g * y + (1 - g) * self.attend(q, own)
        x = x + self.o @ y
        return x + torch.tanh(self.mlp @ x)

    def gate(self, q: Tensor, name: str) -> Tensor:
        return torch.sigmoid(self.gates[name] @ q)

    @staticmethod
    def attend(q: Tensor, keys: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        scores = torch.stack([q @ k for k, _ in keys]).softmax(0)
        return scores @ torch.stack([v for _, v in keys])

    @staticmethod
    def _rotate(x: Tensor, position: int) -> Tensor:
        a, b = x.chunk(2)
        c, s = math.cos(0.7 * position), math.sin(0.7 * position)
        return torch.cat((a * c - b * s, a * s + b * c))


@dataclass
class Toy:
    """A toy model and one row of tokens."""

    blocks: int
    tokens: int
    seed: int = 0

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(self.seed)
        self.embed, self.noise = _random(g, self.tokens, WIDTH), _random(g, self.tokens, WIDTH)
        gates = {f"{scope}.v{i}.gate": _random(g, WIDTH) for scope in ("parallel_loop",) for i in range(self.blocks)}
        self.stack = [ToyBlock(100 * self.seed + i, gates) for i in range(self.blocks)]
        self.generator = g

    def norm(self, x: Tensor) -> Tensor:
        return x / x.square().mean().sqrt()

    def random_parameters(self, program: Program) -> dict[str, Tensor]:
        """Non-zero values for every new parameter, large enough to matter."""
        return {n: 0.5 * _random(self.generator, *p.shape) for n, p in parameters(program).items()}

    def initial_parameters(self, program: Program) -> dict[str, Tensor]:
        """The values a transform would create."""
        seen = {}
        for name, p in parameters(program).items():
            if p.fill is not None:
                seen[name] = torch.full(p.shape, p.fill, dtype=torch.float64)
            elif p.identity:
                seen[name] = torch.cat(
                    (torch.zeros(p.shape[0], p.shape[1] - p.shape[0]), torch.eye(p.shape[0])), 1).double()
            else:
                seen[name] = p.init * _random(self.generator, *p.shape)
        return seen

    def run(self, program: Program, values: dict[str, Tensor] | None = None) -> Interpretation:
        return Interpretation(program, self.embed, self.stack, self.norm, values, self.noise)


class Keys:
    """Growing keys of one visit, written by hand in the oracles."""

    def __init__(self, block: ToyBlock) -> None:
        self.block = block
        self.entries: list[tuple[Tensor, Tensor]] = []

    def __call__(self, x: Tensor, position: int) -> Tensor:
        """Append this token's keys, then run the block on all."""
        self.entries.append(self.block.keys(x, position))
        return self.block(x, position, self.entries)
