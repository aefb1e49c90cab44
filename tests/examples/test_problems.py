"""Rows and labels of the experiments against the solvers of the task tests, which work from prompts."""

import math
import random

import pytest
import task_solvers as solve
import torch

from depthpass import tasks
from examples.harness.problems import IGNORED, Addition, Formula, Parity, PHop, Text, Trees, Words, code, values


def drawn(problem, rows=6, length=12, seed=3):
    ids, labels = problem.draw(rows, length, torch.Generator().manual_seed(seed))
    assert ids.shape == labels.shape == (rows, length) and int(ids.max()) < problem.vocabulary
    return ids.tolist(), labels.tolist()


@pytest.mark.parametrize("last", [None, 1, 3])
def test_parity(last):
    for ids, labels in zip(*drawn(Parity(last))):
        assert ids[0] == 2
        for i, label in enumerate(labels):
            bits = ids[1 : i + 1][-last:] if last else ids[1 : i + 1]
            assert label == (int(solve.parity("".join(map(str, bits)) + " =")) if bits else 0)


@pytest.mark.parametrize("last", [None, 2])
@pytest.mark.parametrize("generators", [("102", "120"), ("10234", "12340")])
def test_words(generators, last):
    problem = Words(generators, last)
    assert len(problem.elements) == math.factorial(len(generators[0]))
    head = " ".join(f"{x}={g}" for x, g in zip("ab", generators))
    for ids, labels in zip(*drawn(problem)):
        for i, label in enumerate(labels):
            word = ids[1 : i + 1][-last:] if last else ids[1 : i + 1]
            want = solve._word(f"{head} : " + "".join("ab"[t] for t in word)) if word else "01234"[: len(generators[0])]
            assert "".join(map(str, problem.elements[label])) == want


@pytest.mark.parametrize("hops", [1, 2, 3])
def test_p_hop(hops):
    asked = 0
    for ids, labels in zip(*drawn(PHop(hops, 3), length=20)):
        text = "".join("abc"[t] for t in ids)
        for i, label in enumerate(labels):
            try:
                want = solve.p_hop(f"{hops} hops {text[: i + 1]}")
            except ValueError:  # a hop does not exist
                want = None
            assert (None if label == IGNORED else "abc"[label]) == want
            asked += want is not None
    assert asked > 40


@pytest.mark.parametrize("base", [2, 10])
def test_addition(base):
    for ids, labels in zip(*drawn(Addition(base))):
        assert ids[0] == base**2 and labels[0] == 0
        a, b = (sum(d * base**i for i, d in enumerate(digits)) for digits in zip(*(divmod(t, base) for t in ids[1:])))
        assert sum(d * base**i for i, d in enumerate(labels[1:])) == (a + b) % base ** (len(labels) - 1)


@pytest.mark.parametrize("last", [None, 2])
def test_formula(last):
    for ids, labels in zip(*drawn(Formula(5, last))):
        for i, label in enumerate(labels):
            text = "0"
            for token in ids[1 : i + 1][-last:] if last else ids[1 : i + 1]:
                text = f"({text}{'+*'[token // 5]}{token % 5})"
            assert label == eval(text) % 5


@pytest.mark.parametrize("modulus", [3, 10])
def test_trees(modulus):
    problem, operands = Trees(modulus), 0
    for ids, labels in zip(*drawn(problem, rows=16, length=24)):
        symbols = [problem.symbols[t] for t in ids]
        start = next(i for i, x in enumerate(symbols) if x != "^")
        assert all(label == IGNORED for label in labels[:start]) and "^" not in symbols[start:]
        formulas: list[str] = []  # one for each register
        for symbol, label in zip(symbols[start:], labels[start:]):
            if symbol == "-":
                formulas[-1] = f"(-{formulas[-1]})"
            elif symbol[0] in "+*":
                right = symbol[1:]
                if right.isalpha():
                    assert "abcdefghij"[len(formulas) - 1] == right
                    right, operands = formulas.pop(), operands + 1
                formulas[-1] = f"({formulas[-1]}{symbol[0]}{right})"
            else:
                formulas.append(symbol[1:])
                assert "abcdefghij"[len(formulas) - 1] == symbol[0]
            assert label == eval(formulas[-1]) % modulus
        assert len(formulas) == 1
    assert operands > 8  # operators that join two subtrees


def test_code_has_the_value_of_the_tree():
    task, rng = tasks.get("modular_tree"), random.Random(4)
    for nodes in (1, 2, 5, 12, 30, 30, 30, 30):
        tree = task.draw(nodes, rng)
        symbols = code(tree, 10)
        assert values(symbols, 10)[-1] == eval(task.show(tree).partition(" mod ")[0]) % 10
        assert sum(any(x.isdigit() for x in symbol) for symbol in symbols) == nodes


def test_text_is_shifted_and_held_out():
    ids, labels = drawn(Text(), length=40)
    assert [row[1:] for row in ids] == [row[:-1] for row in labels]
    held, seen = Text(held_out=True).characters, Text().characters
    assert len(seen) > 5 * len(held) > 100_000
    assert bytes(held[:200].tolist()) not in bytes(seen.tolist())
