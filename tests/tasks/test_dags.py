import math
import random

import networkx as nx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from depthpass.errors import InputError
from depthpass.tasks import TASKS, TaskDAG, sufficient
from depthpass.tasks import dag as task
from depthpass.tasks.shapes import (
    arithmetic_formula,
    binary_search,
    edit_distance,
    parity,
    reachability,
    s5_word_problem,
)


@pytest.mark.parametrize(("n", "size", "depth"), [(30, 900, 59), (40, 1600, 79), (60, 3600, 119)])
def test_edit_distance_matches_the_published_sizes(n, size, depth):
    dag = edit_distance(n, n)
    assert (dag.size, dag.depth, dag.width) == (size, depth, n)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 9, 64, 100])
def test_reductions_have_logarithmic_depth_and_scans_linear_depth(n):
    for make in (parity, s5_word_problem):
        assert make(n).depth == math.ceil(math.log2(n))
        assert make(n).size == 2 * n - 1
        assert make(n).width == n
        assert make(n, "chain").depth == n
    assert parity(n).fan_in == (2 if n > 1 else 0)


def test_tree_reduction_computes_parity():
    """The DAG is evaluated, so that its edges mean what they say."""
    for n in (1, 2, 5, 13):
        dag, bits = parity(n), [(3 * i * i + i) % 7 % 2 for i in range(n)]
        value = {}
        for v in nx.topological_sort(dag.graph):
            value[v] = bits[v[1]] if v[0] == "in" else sum(value[u] for u in dag.graph.pred[v]) % 2
        (root,) = (v for v in dag.graph if dag.graph.out_degree(v) == 0)
        assert value[root] == sum(bits) % 2


def test_edit_distance_dag_computes_the_distance():
    a, b = "kitten", "sitting"
    dag, value = edit_distance(len(a), len(b)), {}

    def cell(i, j):
        return i + j + 2 if min(i, j) < 0 else value[i, j]

    for i, j in nx.topological_sort(dag.graph):
        assert set(dag.graph.pred[i, j]) <= {(i - 1, j), (i, j - 1), (i - 1, j - 1)}
        value[i, j] = min(cell(i - 1, j) + 1, cell(i, j - 1) + 1, cell(i - 1, j - 1) + (a[i] != b[j]))
    assert value[len(a) - 1, len(b) - 1] == 3


def test_reachability_depth_is_log_of_the_diameter():
    assert reachability(17).depth == 4  # a path of 17 nodes has 16 edges
    assert reachability(17).width == 17 * 17
    assert reachability(9, diameter=2).depth == 1


def test_repeated_squaring_over_the_dag_finds_every_path():
    n, edges = 7, {(0, 3), (3, 1), (1, 6), (6, 2), (2, 5), (5, 4)}
    dag, value = reachability(n), {}
    for v in nx.topological_sort(dag.graph):
        t, i, j = v
        if t == 0:
            value[v] = i == j or (i, j) in edges
        else:
            value[v] = any(value[t - 1, i, k] and value[t - 1, k, j] for k in range(n))
    want = nx.transitive_closure(nx.DiGraph(edges), reflexive=True)
    assert {(i, j) for (t, i, j), x in value.items() if t == dag.depth and x} == set(want.edges)


@pytest.mark.parametrize(("n", "depth"), [(1, 1), (2, 2), (5, 4), (64, 7), (70, 8)])
def test_binary_search_is_serial(n, depth):
    assert (binary_search(n).depth, binary_search(n).width) == (depth, 1) == (math.ceil(math.log2(n)) + 1, 1)


def test_arithmetic_formula_forms():
    assert arithmetic_formula(11).depth == 4
    assert arithmetic_formula(11).size == 23
    assert arithmetic_formula(11, "nested").depth == 11


@given(st.integers(1, 9), st.data())
def test_depth_and_width_agree_with_networkx(n, data):
    graph = nx.DiGraph()
    graph.add_nodes_from(range(n))
    pairs = [(i, j) for i in range(n) for j in range(i + 1, n)]
    if pairs:
        graph.add_edges_from(data.draw(st.lists(st.sampled_from(pairs))))
    dag = TaskDAG("random", graph)
    assert dag.depth == nx.dag_longest_path_length(graph)
    assert dag.width == max(len(level) for level in nx.topological_generations(graph))
    assert TaskDAG("random", graph, inputs_are_nodes=False).depth == dag.depth + 1


def test_sufficient_says_what_is_missing():
    verdict = sufficient(edit_distance(30), 16)
    assert not verdict.sufficient
    assert verdict.missing_depth == 43
    assert "does not cover this DAG" in verdict.text and "needs" not in verdict.text
    assert "43 too few" in verdict.text and "900 chain-of-thought steps" in verdict.text
    enough = sufficient(edit_distance(30), 59)
    assert enough.sufficient and "the program covers this DAG" in enough.text
    assert not sufficient(edit_distance(30), 59, visits_per_round=2).sufficient
    narrow = sufficient(edit_distance(30), 59, tokens=20)
    assert not narrow.sufficient and "10 pads too few" in narrow.text
    assert dict(narrow.rows())["widest level of its DAG (tokens)"] == 30


def test_a_verdict_is_about_one_dag_and_no_lower_bound():
    """Counter-example: two layers of uniform attention and a threshold per count decide parity at any length.

    The tree of exclusive ors has depth 6 here and the scan 64; both verdicts on depth 2 must not say that it cannot be done.
    """
    rng = random.Random(0)
    for _ in range(50):
        n = rng.randint(1, 64)
        bits = [rng.randint(0, 1) for _ in range(n)]
        mean = sum(bits) / n  # layer 1: uniform attention, O(log n) bits
        levels = [mean >= k / n - 1e-9 for k in range(1, n + 1)]  # layer 2: one threshold per pad
        assert sum((-1) ** k * on for k, on in enumerate(levels)) == sum(bits) % 2
    for form in ("tree", "chain"):
        verdict = sufficient(parity(64, form), 2)
        assert not verdict.sufficient and "no lower bound" in verdict.text
        assert "needs" not in verdict.text and "Necessary" not in verdict.text


def test_turboconn_depth_covers_a_scan_of_parity_at_group_one_but_not_at_group_four():
    """L + floor((n-1)/g)*(s-d) with s - d = 1 grows by one visit per token only at group 1."""
    n, layers, span = 100, 4, 1

    def depth(g):
        return layers + (n - 1) // g * span

    assert sufficient(parity(n, "chain"), depth(1)).sufficient
    assert sufficient(parity(n, "chain"), depth(4)).missing_depth == n - depth(4)


@pytest.mark.parametrize("name", [*TASKS, "arithmetic_formula"])
def test_every_built_in_task_is_reachable_by_name(name):
    assert task(name, 6).size >= 1


def test_the_old_place_of_these_names():
    from depthpass.analysis import tasks as old

    assert old.task("edit_distance", 30, 30).depth == 59 and old.TaskDAG is TaskDAG and old.sufficient is sufficient
    assert set(old.TASKS) == {*TASKS, "arithmetic_formula"}


def test_bad_input_is_explained():
    with pytest.raises(InputError, match=r"unknown task 'paritty'\. Did you mean 'parity'\?"):
        task("paritty", 3)
    with pytest.raises(InputError, match="at least 1, got 0"):
        parity(0)
    with pytest.raises(InputError, match="at least 1, got -3"):
        edit_distance(4, -3)
    with pytest.raises(InputError, match="form must be"):
        parity(4, "tre")
    with pytest.raises(InputError, match="found the cycle"):
        TaskDAG("loop", nx.DiGraph([(0, 1), (1, 0)]))
    with pytest.raises(InputError, match="non-empty"):
        TaskDAG("empty", nx.DiGraph())
    with pytest.raises(InputError, match="depth_at_n: expected an integer of at least 0, got -1"):
        sufficient(parity(4), -1)
    with pytest.raises(InputError, match="binary_search"):
        task("binary_search", 3, 4)
