"""Task DAGs under the name they had before: they live in :mod:`depthpass.tasks` now."""

from __future__ import annotations

from depthpass.tasks.dags import Sufficiency, TaskDAG, sufficient
from depthpass.tasks.registry import FORMULA
from depthpass.tasks.registry import TASKS as _TASKS
from depthpass.tasks.registry import dag as task
from depthpass.tasks.shapes import arithmetic_formula, binary_search, edit_distance, parity, reachability, s5_word_problem

TASKS = (*_TASKS, FORMULA)
"""Names that :func:`task` takes."""

__all__ = ["TASKS", "Sufficiency", "TaskDAG", "arithmetic_formula", "binary_search", "edit_distance", "parity", "reachability",
           "s5_word_problem", "sufficient", "task"]
