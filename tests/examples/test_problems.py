"""Rows and labels of the experiments against the solvers of the task tests, which work from prompts."""

import math

import pytest
import task_solvers as solve
import torch

from examples.harness.problems import IGNORED, Addition, Formula, Parity, PHop, Text, Trees, Words


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


@pytest.mark.parametrize("inner", [False, True])
def test_trees(inner):
    problem, asked = Trees(5, inner), 0
    for ids, labels in zip(*drawn(problem, rows=16, length=24)):
        text = "".join(problem.characters[t] for t in ids)
        assert text[-1] == "=" and "=" not in text[:-1]
        for i, label in enumerate(labels):
            if text[i] == "=" or (inner and text[i] == ")"):
                start = max(j for j in range(i) if text[j : i + 1].count("(") == text[j : i + 1].count(")") and text[j] == "(") \
                    if text[i] == ")" else 0
                assert label == eval(text[start : i + 1].strip("^=")) % 5
                asked += 1
            else:
                assert label == IGNORED
    assert asked >= (32 if inner else 16)


def test_text_is_shifted_and_held_out():
    ids, labels = drawn(Text(), length=40)
    assert [row[1:] for row in ids] == [row[:-1] for row in labels]
    held, seen = Text(held_out=True).characters, Text().characters
    assert len(seen) > 5 * len(held) > 100_000
    assert bytes(held[:200].tolist()) not in bytes(seen.tolist())
