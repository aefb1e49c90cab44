"""Tasks by name: a lazy table, imported one file at a time."""

from __future__ import annotations

from dataclasses import fields
from importlib import import_module
from typing import Any, get_type_hints

from depthpass.annotations import check, checked
from depthpass.errors import InputError, did_you_mean
from depthpass.tasks.dags import TaskDAG
from depthpass.tasks.task import Task

TAIL: dict[str, str] = {
    "large_add": "simulation:LargeAdd",
    "large_div": "simulation:LargeDiv",
    "bubble_sort": "simulation:BubbleSort",
    "word_flip": "simulation:WordFlip",
    "compare_numbers": "simulation:CompareNumbers",
    "any_substring": "recursion:AnySubstring",
    "derangement": "recursion:Derangement",
    "population_growth": "iteration:PopulationGrowth",
    "dijkstra": "greedy:Dijkstra",
    "multi_machine": "greedy:MultiMachine",
    "count_letters": "enumeration:CountLetters",
    "diophantine": "enumeration:Diophantine",
    "prime_search": "enumeration:PrimeSearch",
    "knapsack": "dynamic:Knapsack",
    "lcs": "dynamic:LongestCommonSubsequence",
    "levenshtein": "dynamic:Levenshtein",
    "binary_search": "divide:BinarySearch",
    "palindrome_permutations": "backtracking:PalindromePermutations",
}
"""The 18 tasks of arXiv 2507.13332."""

RELAY: dict[str, str] = {
    "relay_arithmetic": "relay:RelayArithmetic",
    "relay_edit_distance": "relay:RelayEditDistance",
    "relay_subsequence": "relay:RelaySubsequence",
}
"""The tasks of arXiv 2502.08482, with one target per loop."""

CANON: dict[str, str] = {
    "parity": "words:Parity",
    "s3_word_problem": "words:S3",
    "s5_word_problem": "words:S5",
    "a5_word_problem": "words:A5",
    "addition": "arithmetic:Addition",
    "multiplication": "arithmetic:Multiplication",
    "modular_tree": "arithmetic:ModularTree",
    "prefix_sums": "arithmetic:PrefixSums",
    "copy": "sequences:Copy",
    "associative_recall": "sequences:AssociativeRecall",
    "p_hop": "sequences:PHop",
    "dyck": "sequences:Dyck",
    "edit_distance": "dynamic:EditDistance",
    "reachability": "graphs:Reachability",
    "maze": "graphs:Maze",
    "sudoku_4": "sudoku:Sudoku4",
    "sudoku_9": "sudoku:Sudoku9",
}
"""What the field measures depth and state tracking with."""

TASKS: dict[str, str] = {**TAIL, **RELAY, **CANON}
"""All built-in tasks: name -> ``file:class`` in this package."""

FORMULA = "arithmetic_formula"
"""A closed form without a generator of its own; :class:`~depthpass.tasks.arithmetic.ModularTree` draws such formulas."""


@checked("tasks.get", but=("name",))
def get(name: str, **options: Any) -> Task:
    """A task by name, with its options.

    >>> get("addition", reverse=True).instance(2, seed=1).prompt
    '19+09='

    Raises:
        InputError: an unknown name, or an option that the task does not have.
    """
    if not isinstance(name, str) or name not in TASKS:
        raise InputError(f"unknown task {name!r}.{did_you_mean(str(name), TASKS)} Known: {', '.join(sorted(TASKS))}.")
    module, _, cls = TASKS[name].partition(":")
    task = getattr(import_module(f"depthpass.tasks.{module}"), cls)
    known, types = [f.name for f in fields(task)], get_type_hints(task)
    for option in options:
        if option not in known:
            raise InputError(f"task {name!r}: expected options among {', '.join(known) or 'none'}, got {', '.join(options)}."
                             f"{did_you_mean(option, known)}")
    return task(**{k: check(f"task {name!r}: {k}", v, types[k]) for k, v in options.items()})


@checked("tasks.dag")
def dag(name: str, *sizes: int, form: str | None = None, seed: int = 0) -> TaskDAG:
    """The DAG of a task at a size: its closed form if it has one, else that of the drawn instance of a seed.

    >>> dag("edit_distance", 30, 30).depth, dag("parity", 64).depth, dag("parity", 64, form="chain").depth
    (59, 6, 64)

    Raises:
        InputError: an unknown task, sizes out of range, or a form that it does not have.
    """
    if name != FORMULA and not hasattr(get(name), "shape"):
        if form not in (None, "trace"):
            raise InputError(f"task {name!r}: form: expected 'trace', the only one of this task, got {form!r}.")
        form = "trace"
    if form == "trace":
        if name == FORMULA or len(sizes) != 1:
            raise InputError(f"task {name!r}: expected one size ({'' if name == FORMULA else get(name).unit}) for the DAG of a "
                             f"trace, got {list(sizes)}.")
        trace = get(name).instance(sizes[0], seed).dag
        return TaskDAG(f"{name}({sizes[0]}, seed {seed})", trace.graph, inputs_are_nodes=False, note=trace.note)
    from depthpass.tasks import shapes

    task: Any = None if name == FORMULA else get(name)
    shape: Any = shapes.arithmetic_formula if task is None else task.shape
    try:
        return shape(*sizes) if form is None else shape(*sizes, form=form)
    except TypeError as error:
        raise InputError(f"task {name!r}: {error}. Expected sizes such as {name}:8, and a form that the task has.") from None
