"""Algorithmic tasks of any length: prompt, trace, answer and task DAG from one program per task.

    import depthpass.tasks as tasks

    task = tasks.get("levenshtein")
    item = task.instance(length=6, seed=0)
    item.prompt, str(item.trace), item.answer, item.dag.depth
    rows = tasks.TaskDataset(task, 10_000, "S", tokenizer=tasks.tokenizer("char"))
"""

from depthpass.tasks.checker import Check
from depthpass.tasks.dag import Sufficiency, TaskDAG, sufficient
from depthpass.tasks.data import Collator, TaskDataset, TaskStream, draw, encode, stream
from depthpass.tasks.registry import CANON, RELAY, TAIL, TASKS, dag, get
from depthpass.tasks.staged import Chain, RelayBatch, chain_texts, relay_batch, relay_total_loss, write_chains
from depthpass.tasks.tape import Step, Tape, Trace
from depthpass.tasks.task import Instance, Task
from depthpass.tasks.tokens import tokenizer

__all__ = [
    "CANON", "Chain", "Check", "Collator", "Instance", "RELAY", "RelayBatch", "Step", "Sufficiency", "TAIL", "TASKS", "Tape",
    "Task", "TaskDAG", "TaskDataset", "TaskStream", "Trace", "chain_texts", "dag", "draw", "encode", "get", "relay_batch",
    "relay_total_loss", "stream", "sufficient", "tokenizer", "write_chains",
]
