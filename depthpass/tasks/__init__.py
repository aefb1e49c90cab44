"""Algorithmic tasks of any length: prompt, trace, answer and task DAG from one program per task.

    import depthpass.tasks as tasks

    task = tasks.get("levenshtein")
    item = task.instance(length=6, seed=0)
    item.prompt, str(item.trace), item.answer, item.dag.depth
    rows = tasks.TaskDataset(task, 10_000, "S", tokenizer=tasks.tokenizer("char"))
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from depthpass.tasks.checker import Check
    from depthpass.tasks.dags import Sufficiency, TaskDAG, sufficient
    from depthpass.tasks.data import Collator, TaskDataset, TaskStream, draw, encode, stream
    from depthpass.tasks.registry import CANON, RELAY, TAIL, TASKS, dag, get
    from depthpass.tasks.staged import Chain, RelayBatch, chain_texts, relay_batch, relay_total_loss, write_chains
    from depthpass.tasks.tape import Step, Tape, Trace
    from depthpass.tasks.task import Instance, Task
    from depthpass.tasks.tokens import tokenizer

# Public name -> module: imported on first use, so that the command line does not wait for torch.
_PUBLIC = {
    "Check": "checker", "Sufficiency": "dags", "TaskDAG": "dags", "sufficient": "dags", "Collator": "data", "TaskDataset": "data",
    "TaskStream": "data", "draw": "data", "encode": "data", "stream": "data", "CANON": "registry", "RELAY": "registry",
    "TAIL": "registry", "TASKS": "registry", "dag": "registry", "get": "registry", "Chain": "staged", "RelayBatch": "staged",
    "chain_texts": "staged", "relay_batch": "staged", "relay_total_loss": "staged", "write_chains": "staged", "Step": "tape",
    "Tape": "tape", "Trace": "tape", "Instance": "task", "Task": "task", "tokenizer": "tokens",
}

__all__ = [
    "CANON", "Chain", "Check", "Collator", "Instance", "RELAY", "RelayBatch", "Step", "Sufficiency", "TAIL", "TASKS", "Tape",
    "Task", "TaskDAG", "TaskDataset", "TaskStream", "Trace", "chain_texts", "dag", "draw", "encode", "get", "relay_batch",
    "relay_total_loss", "stream", "sufficient", "tokenizer", "write_chains",
]


def __getattr__(name: str):
    if name in _PUBLIC:
        public = globals()[name] = getattr(import_module(f"depthpass.tasks.{_PUBLIC[name]}"), name)
        return public
    raise AttributeError(f"module 'depthpass.tasks' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
