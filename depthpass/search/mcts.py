"""Monte Carlo tree search over edits, as CoLa and Dr.LLM search."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from typing import ClassVar

from depthpass.errors import InputError
from depthpass.limits import shown
from depthpass.search.judge import Judge
from depthpass.search.methods import Method
from depthpass.search.space import AnySpace, Layers


@dataclass
class Node:
    """A program in the tree.

    Attributes:
        edits: from the root to it.
        unexplored: programs of one more edit that have no node yet, in random order; None = not listed yet.
        visits, total: of the simulations that passed it: their number v and the sum Q of their scores.
        done: whether it and everything below it has been scored, so that no walk leads there any more.
    """

    layers: Layers
    edits: int = 0
    unexplored: list[Layers] | None = None
    children: list[Node] = field(default_factory=list)
    visits: int = 0
    total: float = 0.0
    done: bool = False


@dataclass(frozen=True)
class MCTS(Method):
    """Tree search with ``UCB(P) = Q/v + c sqrt(ln V / v) - penalty |P| / L`` (CoLa, arXiv 2507.07996).

    The root is the stock program, a child is one edit away. A simulation walks down by the largest UCB, at every node with
    probability ``explore`` to a random unexplored child instead, makes one new node where it arrives, and adds its score to
    every node above. V counts simulations. Scores outside of 0 and 1 are mapped there by the least and largest one seen.
    A budget counts simulations, so programs that are met again on another way are not replaced. Where edits are limited, walks
    pass by what has been tried whole: the papers' trees have no end, and the penalty would lead back to the shortest one.

    Args:
        exploration: c; CoLa does not say, Dr.LLM has 1.8.
        penalty: of length, in stock lengths; CoLa has 5, the released search of Dr.LLM 3.
        explore: probability of a random unexplored child.
    """

    name: ClassVar[str] = "mcts"

    exploration: float = 1.8
    penalty: float = 5.0
    explore: float = 0.1

    def __post_init__(self):
        for name, most in (("exploration", math.inf), ("penalty", math.inf), ("explore", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
                raise InputError(f"mcts.{name}: expected a number of at least 0{' and at most 1' * (most == 1)}, got "
                                 f"{shown(value)}.")

    def run(self, judge: Judge, space: AnySpace, rng: random.Random) -> None:
        root = Node(judge.root)
        for simulation in range(judge.budget):
            if root.done:
                return
            path = self._walk(root, judge, space, rng, simulation + 1)
            gain = judge.gain(path[-1].layers)
            gain = gain if math.isfinite(gain) else self._range(judge)[0]
            for node in reversed(path):
                node.visits, node.total = node.visits + 1, node.total + gain
                if node.unexplored is not None:
                    node.done = not node.unexplored and all(c.done for c in node.children)

    def _walk(self, root: Node, judge: Judge, space: AnySpace, rng: random.Random, simulation: int) -> list[Node]:
        """From the root to a new node; the root alone when nothing can be edited."""
        path = [root]
        while True:
            node = path[-1]
            if node.unexplored is None:
                node.unexplored = space.children(node.layers, len(judge.root), node.edits)
                rng.shuffle(node.unexplored)
            ways = [c for c in node.children if not c.done]
            if node.unexplored and (not ways or rng.random() < self.explore):
                child = Node(node.unexplored.pop(), node.edits + 1)
                child.done = not space.children(child.layers, len(judge.root), child.edits)
                node.children.append(child)
                return [*path, child]
            if not ways:
                return path
            low, span = self._range(judge)
            path.append(max(ways, key=lambda c: self.bound(c, simulation, len(judge.root), low, span)))

    def bound(self, node: Node, simulation: int, blocks: int, low: float = 0.0, span: float = 1.0) -> float:
        """UCB of a node, with scores mapped from ``low .. low + span``."""
        mean = (node.total / node.visits - low) / span
        return mean + self.exploration * math.sqrt(math.log(simulation) / node.visits) - (
            self.penalty * len(node.layers) / blocks)

    @staticmethod
    def _range(judge: Judge) -> tuple[float, float]:
        if judge.bench.score.share:
            return 0.0, 1.0
        gains = [g for t in judge.trials.values() if math.isfinite(g := judge.bench.score.gain(t.score))]
        low, high = min(gains, default=0.0), max(gains, default=1.0)
        return low, (high - low) or 1.0
