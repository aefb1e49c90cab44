"""Intervals, the walk of the tree, and the front against their definitions."""

from __future__ import annotations

import doctest
import math
import random
from types import SimpleNamespace

import pytest

from depthpass.search import mcts, statistics
from depthpass.search.judge import Trial
from depthpass.search.mcts import MCTS, Node
from depthpass.search.result import pareto
from depthpass.search.space import Space


def test_examples_in_docstrings():
    assert doctest.testmod(statistics).failed == 0 and doctest.testmod(mcts).failed == 0


def test_wilson_is_the_solution_of_its_equation():
    """Its ends are where the normal test of a share just rejects."""
    for right, n in ((0, 5), (3, 10), (19, 20)):
        for end in statistics.wilson(right, n):
            if 0 < end < 1:
                assert abs(right / n - end) == pytest.approx(statistics.Z * math.sqrt(end * (1 - end) / n))


def test_intervals_cover():
    """95 % intervals hold the truth in about 95 % of experiments."""
    rng, hits = random.Random(0), {"wilson": 0, "paired": 0, "bootstrap": 0}
    for seed in range(300):
        a = [rng.random() < 0.7 for _ in range(40)]
        b = [x if rng.random() < 0.8 else rng.random() < 0.5 for x in a]
        low, high = statistics.wilson(sum(a), 40)
        hits["wilson"] += low <= 0.7 <= high
        low, high = statistics.paired(sum(x > y for x, y in zip(a, b)), sum(x < y for x, y in zip(a, b)), 40)
        hits["paired"] += low <= 0.7 - (0.8 * 0.7 + 0.2 * 0.5) <= high
        if seed < 60:
            values = [rng.gauss(1, 2) for _ in range(40)]
            low, high = statistics.bootstrap(lambda places, v=values: sum(v[i] for i in places) / len(places), 40)
            hits["bootstrap"] += low <= 1 <= high
    assert hits["wilson"] / 300 > 0.9 and hits["paired"] / 300 > 0.9 and hits["bootstrap"] / 60 > 0.85
    assert statistics.bootstrap(lambda places: 0.0, 1) is None


def test_the_bound_is_that_of_the_paper():
    node = Node((0, 1, 1), visits=4, total=3.0)
    assert MCTS(exploration=1.8, penalty=5).bound(node, 9, blocks=4) == pytest.approx(
        3 / 4 + 1.8 * math.sqrt(math.log(9) / 4) - 5 * 3 / 4)


class Counting:
    """A judge whose score is 1 for programs that hold two visits of block 2."""

    def __init__(self, budget: int):
        self.root, self.budget, self.trials, self.asked = (0, 1, 2, 3), budget, {}, []
        self.bench = SimpleNamespace(score=SimpleNamespace(share=True))

    def gain(self, layers):
        self.asked.append(layers)
        return float(layers.count(2) == 2)


def test_a_simulation_scores_one_new_program_and_tells_every_node_above(monkeypatch):
    judge, method = Counting(60), MCTS(penalty=0.0, explore=0.2)
    roots = []
    walk = MCTS._walk

    def watched(self, root, *rest):
        roots.append(root)
        return walk(self, root, *rest)

    monkeypatch.setattr(MCTS, "_walk", watched)
    method.run(judge, Space(skip=(1,), repeat=(1,), times=(1,), edits=3), random.Random(0))
    root = roots[0]
    assert len(judge.asked) == 60 == root.visits
    assert root.total == sum(layers.count(2) == 2 for layers in judge.asked)

    def check(node):
        # What passed a node ended in it once, when it was made, or below.
        below = sum(c.visits for c in node.children)
        again = 1 if node is not root and not (node.edits == 3 or node.unexplored == []) else None
        assert node.visits == below + again if again else node.visits >= below
        assert node.edits <= 3
        for c in node.children:
            check(c)

    check(root)
    # It goes where the score is: one of the 8 single edits has it.
    assert root.total / 60 > 2 / 8


def test_a_shorter_program_is_preferred_by_the_penalty():
    def mean_length(penalty):
        judge = Counting(80)
        judge.gain = lambda layers: judge.asked.append(layers) or 0.0
        MCTS(penalty=penalty, explore=0.3).run(judge, Space(), random.Random(1))
        return sum(map(len, judge.asked)) / 80

    assert mean_length(5.0) < mean_length(0.0)


def test_a_front_is_what_nothing_beats():
    rng = random.Random(3)
    trials = [Trial(tuple([0] * rng.randint(1, 8) + [i]), (), round(rng.random(), 1)) for i in range(60)]
    for lower in (False, True):
        sign = -1 if lower else 1

        def beats(a, b, sign=sign):
            return a.visits <= b.visits and sign * a.score >= sign * b.score and (a.visits, a.score) != (b.visits, b.score)

        points = {(t.visits, t.score) for t in trials if not any(beats(o, t) for o in trials)}
        actual = pareto(trials, lower)
        assert {(t.visits, t.score) for t in actual} == points and len(actual) == len(points)
