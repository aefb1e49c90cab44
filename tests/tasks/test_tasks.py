"""Every task: answers against independent solvers, traces that are what they say, checkers that name the mistake."""

import hashlib
import itertools
import math
import re

import networkx as nx
import pytest
import task_solvers as solvers

from depthpass.errors import InputError
from depthpass.tasks import CANON, RELAY, TAIL, TASKS, dag, draw, get, stream

NAMES = sorted(TASKS)


def instances(name, lengths=None, seeds=4):
    task = get(name)
    low, high = task.span("S")
    for length, seed in itertools.product(lengths or sorted({task.least, low, (low + high) // 2}), range(seeds)):
        yield task.instance(length, seed)


def test_the_tasks_are_those_of_the_papers():
    assert (len(TAIL), len(RELAY), len(CANON)) == (18, 3, 17)
    families = {get(n).family for n in TAIL}
    assert len(families) == 8
    assert all(set(get(n).ranges) == {"S", "M", "L"} for n in TASKS)


@pytest.mark.parametrize("name", NAMES)
def test_answers_equal_an_independent_solver(name):
    solve, answers = getattr(solvers, name), set()
    for item in instances(name, seeds=8):
        assert item.answer == solve(item.prompt), item.prompt
        answers.add(item.answer)
    assert len(answers) > 1
    small = get(name).ranges["M"][0]
    if name not in ("lcs", "relay_edit_distance", "relay_subsequence", "edit_distance"):  # slow solvers at length
        item = get(name).instance(small, 5)
        assert item.answer == solve(item.prompt)


@pytest.mark.parametrize("name", NAMES)
def test_traces_are_linear_fetch_what_was_written_and_end_in_the_answer(name):
    """Read from the printed text alone: operands stand in the prompt's symbols or in earlier lines, with these values."""
    for item in instances(name, seeds=2):
        written, inputs = {}, {k: str(c).partition("=")[2] for k, c in item.trace.inputs.items()}
        graph = nx.DiGraph()
        for line in str(item.trace).splitlines():
            state, rest = line.split(": ", 1)
            *fetched, function, value = rest.split()
            graph.add_node(state)
            for one in fetched:
                source, _, was = one.partition("=")
                assert (written | inputs)[source] == was
                if source in written:
                    graph.add_edge(source, state)
            assert state not in written and re.fullmatch(r"[a-z]\w*", function)
            written[state] = value
        assert nx.utils.graphs_equal(graph, item.trace.graph) and item.dag.size == len(graph)
        assert item.dag.depth == nx.dag_longest_path_length(graph) + 1 == item.trace.depth
        assert item.dag.width == max(map(len, nx.topological_generations(graph))) == item.trace.width
        # Every state is worked out from what it fetches, and from nothing else.
        for step in item.trace.steps:
            assert step.function(*(c.value for c in step.fetched)) == step.cell.value


@pytest.mark.parametrize("name", NAMES)
def test_prompts_can_be_parsed_and_checked(name):
    task = get(name)
    for item in instances(name, seeds=2):
        assert task.show(task.parse(item.prompt)) == item.prompt
        result = task.check(item.prompt, item.response)
        assert result and result.answer and result.trace
        assert task.check(item.prompt, item.answer).trace is None and task.check(item.prompt, f"answer {item.answer}")
        wrong = task.check(item.prompt, item.answer + "1")
        assert not wrong and "expected the answer" in wrong.message
    with pytest.raises(InputError, match="expected a prompt such as"):
        task.check("nonsense", "1")


@pytest.mark.parametrize("name", ["large_add", "dijkstra", "levenshtein", "sudoku_9", "s5_word_problem", "maze"])
def test_the_checker_names_the_kind_of_the_first_mistake(name):
    item = get(name).instance(get(name).ranges["S"][1], 3)
    lines = item.response.splitlines()
    at = next(i for i, line in enumerate(lines) if i > 1 and "=" in line)
    head, function, value = lines[at].rsplit(" ", 2)

    def judged(*changed):
        result = item.check("\n".join(changed))
        return result.kind, result.line, result.answer, bool(result)

    assert judged(*lines[:at], f"{head} {function} {value}9", *lines[at + 1 :]) == ("step", at, True, False)
    assert judged(*lines[:at], f"{head}9 {function} {value}", *lines[at + 1 :]) == ("fetch", at, True, False)
    assert judged(*lines[:at], f"{head} other {value}", *lines[at + 1 :]) == ("transition", at, True, False)
    assert judged(*lines[:at], *lines[at + 1 :])[:2] == ("transition" if at < len(lines) - 2 else "missing", at)
    assert judged(*lines[:at], "???", *lines[at + 1 :])[0] == "form"
    assert judged(*lines[:-2], lines[-1])[:2] == ("missing", len(lines) - 2)
    assert judged(*lines[:-1], "x: y 1", lines[-1])[:2] == ("extra", len(lines) - 1)
    assert judged(*lines[:-1], "answer none")[2:] == (False, False)


@pytest.mark.parametrize("name", NAMES)
def test_lengths_mean_what_they_say(name):
    task = get(name)
    for size in "SM" if name.startswith("relay") or name == "edit_distance" else "SML":
        low, high = task.span(size)
        assert task.instance(high, 1).length == high and low <= high
    with pytest.raises(InputError, match=r"expected a length \(.*got 0.*Its ranges are S "):
        task.instance(0)
    with pytest.raises(InputError, match=r"at most \d+, got 1000000000"):
        task.instance(10**9)
    with pytest.raises(InputError, match="expected one of S, M, L"):
        task.span("s")


def test_dags_that_nobody_could_draw_are_refused():
    for name, sizes in (("parity", (10**9,)), ("edit_distance", (10**5, 10**5)), ("reachability", (10**4,))):
        with pytest.raises(InputError, match="expected at most"):
            dag(name, *sizes)
    assert dag("binary_search", 10**9).depth == 31


def test_lengths_of_problems():
    assert all(len(x) == 12 for x in get("large_add").instance(12, 1).problem)
    assert get("large_div").instance(9, 1).prompt.split()[1].isdigit() and len(get("large_div").instance(9).problem[0]) == 9
    assert get("sudoku_9").instance(40, 2).prompt.count(".") == 40
    assert len(get("maze").instance(5, 2).problem) == 11
    assert get("modular_tree").instance(30, 1).prompt.count("(") <= 30
    assert len(re.findall(r"\d", get("modular_tree").instance(30, 1).prompt.partition(" mod")[0])) == 30
    assert sum(x in "+-*" for x in get("relay_arithmetic").instance(15, 2).problem) == 15
    assert len(get("p_hop").instance(5, 0).problem[1]) == 40


def test_sizes_and_depths_that_are_known():
    bubble = get("bubble_sort").instance(8, 0).dag
    assert bubble.size == 8 * 7  # two states for each of n (n - 1) / 2 comparisons
    grid = get("edit_distance").instance(30, 0).dag
    assert (grid.size, grid.depth, grid.width) == (900, 59, 30)
    for n in (5, 16, 17, 70):
        items = tuple(range(0, 3 * n, 3))
        depths = {get("binary_search").of((x, items), n).dag.depth for x in (-1, *items)}
        assert max(depths) == math.ceil(math.log2(n)) + 1
    assert get("word_flip").instance(20, 0).dag.depth == get("copy").instance(20, 0).dag.depth == 1
    assert get("parity").instance(64, 0).dag.depth == get("s5_word_problem").instance(64, 0).dag.depth == 64
    assert get("large_add").instance(40, 0).dag.depth == 41  # the carry
    assert dag("prefix_sums", 37, form="tree").depth == 6 and dag("prefix_sums", 37).depth == 37
    assert [dag("p_hop", p, form="doubling").depth for p in (1, 2, 3, 5, 8)] == [math.ceil(math.log2(p)) + 1
                                                                                  for p in (1, 2, 3, 5, 8)]
    assert dag("p_hop", 7).depth == 7 and dag("bubble_sort", 8).size == 56 and dag("parity", 9, form="trace").size == 9


def test_closed_forms_cover_the_traces():
    for n in (5, 9):
        assert dag("edit_distance", n).size == dag("edit_distance", n, form="trace").size
        assert dag("edit_distance", n).depth == dag("edit_distance", n, form="trace").depth
        assert dag("parity", n, form="chain").depth == dag("parity", n, form="trace").depth
        assert dag("binary_search", n).depth >= dag("binary_search", n, form="trace").depth


def test_prefix_scan_by_doubling_computes_the_sums():
    n, numbers = 11, [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
    graph, value = dag("prefix_sums", n, form="tree").graph, {}
    for v in nx.topological_sort(graph):
        value[v] = numbers[v[1]] if v[0] == "in" else sum(value[u] for u in graph.pred[v])
    last = {v[1]: v for v in nx.topological_sort(graph)}
    assert [value[last[i]] for i in range(n)] == list(itertools.accumulate(numbers))


def test_the_tree_of_a_sudoku_follows_its_rounds():
    """Each level holds the cells that are forced once the levels before are filled in, and not earlier."""
    item = get("sudoku_9").instance(40, 1)
    rounds = [len(level) for level in item.trace.levels]
    assert sum(rounds) == 40 and len(rounds) > 2


@pytest.mark.parametrize("name", sorted(RELAY))
def test_relay_rounds_are_the_published_targets(name):
    for length, seed in itertools.product((1, 3, 12), range(3)):
        item = get(name).instance(length, seed)
        assert item.rounds == solvers.relay_rounds(name, item.prompt)
        most = max(len(r.split()) for r in item.rounds)
        assert most <= len(item.prompt.split())
        assert len(item.rounds) == (length if name != "relay_subsequence" else math.ceil(length / 10))


def test_rounds_of_other_tasks_are_the_levels_of_their_dag():
    item = get("bubble_sort").instance(4, 0)
    assert len(item.rounds) == item.dag.depth and sum(len(r.split()) for r in item.rounds) == item.dag.size


def test_instances_are_the_same_everywhere(golden):
    """Seeds are part of what a paper reports: a changed generator is a new version of the data."""
    lines = []
    for name in NAMES:
        item = get(name).instance(get(name).span("S")[1] if name not in ("relay_subsequence", "edit_distance") else 12, 7)
        lines.append(f"{name} {hashlib.sha256(item.text.encode()).hexdigest()[:16]} {item.prompt[:60]!r}")
    golden("\n".join(lines))


def test_options_change_the_problem():
    plain, reverse = get("addition").instance(3, 1), get("addition", reverse=True).instance(3, 1)
    for item in (reverse, get("multiplication", reverse=True).instance(4, 2)):
        a, sign, b = re.fullmatch(r"(\d+)([+*])(\d+)=", item.prompt).groups()
        assert int(item.answer[::-1]) == eval(f"{int(a[::-1])}{sign}{int(b[::-1])}")
    assert plain.prompt != reverse.prompt
    assert set(get("copy", alphabet=2).instance(30, 0).problem) == {"a", "b"}
    word = get("s5_word_problem", generators=("1203", "1230")).instance(7, 0)
    assert word.answer == solvers.s5_word_problem(word.prompt)
    deep = get("dyck", kinds=4, depth=2)
    assert all(get("dyck").check(x.prompt, x.answer) for x in (deep.instance(9, s) for s in range(6)))
    assert int(get("prefix_sums", modulus=97).instance(5, 0).answer.split()[0]) < 97
    assert get("relay_arithmetic", modulus=3).instance(4, 0).answer in "012"


@pytest.mark.parametrize(("name", "options", "message"), [
    ("paritty", {}, "Did you mean 'parity'"),
    ("addition", {"revers": True}, "expected options among reverse"),
    ("copy", {"alphabet": 1}, "alphabet: expected an integer of at least 2"),
    ("copy", {"alphabet": 27}, "at most 26"),
    ("dyck", {"kinds": 5}, "kinds: expected at most 4"),
    ("s5_word_problem", {"generators": ("011",)}, "expected permutations in one line"),
    ("modular_tree", {"modulus": 1}, "modulus"),
    ("p_hop", {"spread": 2}, "spread"),
])
def test_bad_options(name, options, message):
    with pytest.raises(InputError, match=message):
        get(name, **options)


def test_bad_sizes_of_dags():
    with pytest.raises(InputError, match="expected one size"):
        dag("dijkstra", 5, 6)
    with pytest.raises(InputError, match="'trace', the only one"):
        dag("dijkstra", 5, form="tree")
    with pytest.raises(InputError, match="got 0"):
        dag("dijkstra", 0)
    with pytest.raises(InputError, match="parity"):
        dag("parity")


def test_streams_are_deterministic_and_can_be_resumed():
    first = [x.text for x in itertools.islice(stream("lcs", "M", seed=3), 6)]
    assert [x.text for x in itertools.islice(stream("lcs", "M", seed=3, start=4), 2)] == first[4:]
    assert first != [x.text for x in itertools.islice(stream("lcs", "M", seed=4), 6)]
    assert all(7 <= x.length <= 9 for x in itertools.islice(stream("lcs", "M"), 8))
    with pytest.raises(InputError, match="lengths"):
        stream("lcs", (5, 3))


def test_splits_never_share_a_prompt():
    task = get("parity")
    sets = {s: {draw(task, (1, 8), i, seed=seed, split=s).prompt for i in range(60) for seed in (0, 1)}
            for s in ("train", "test")}
    assert not sets["train"] & sets["test"] and len(sets["test"]) > 10
    with pytest.raises(InputError, match="no prompt of the split"):
        draw(get("prime_search"), (5, 5), 0, split="test")
