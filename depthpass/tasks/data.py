"""Instances as data sets: torch data sets by index and as a stream, ``datasets`` objects, and batches."""

from __future__ import annotations

import hashlib
import importlib
import sys
from collections.abc import Iterator, Sequence
from itertools import count as count_up
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from depthpass.annotations import checked
from depthpass.errors import InputError
from depthpass.limits import shown
from depthpass.tasks.registry import get
from depthpass.tasks.task import Instance, Size, Task

Lengths = Size | int | tuple[int, int]
Split = Literal["train", "test"]


@checked("draw", but=("lengths",))
def draw(task: Task, lengths: Lengths, index: int, *, seed: int = 0, split: Split | None = None) -> Instance:
    """Instance number ``index`` of a seed: a length drawn evenly from the range, then a problem.

    ``split`` keeps two sets of *prompts* apart whatever the seeds: a prompt belongs to the test set if its SHA-256 is
    divisible by 10.

    Raises:
        InputError: lengths out of range; no prompt of this split at these lengths.
    """
    import random

    low, high = task.span(lengths)
    if split not in (None, "train", "test"):
        raise InputError(f"split: expected 'train', 'test' or None, got {split!r}.")
    for attempt in range(1000):
        key = f"{seed}:{index}:{attempt}"
        instance = task.instance(random.Random(f"length {task.name} {key}").randint(low, high), key)
        if split is None or split == ("train" if _hash(instance.prompt) % 10 else "test"):
            return instance
    raise InputError(f"task {task.name!r}: no prompt of the split {split!r} in 1000 draws of lengths {low} to {high}: there are "
                     "too few problems of these lengths. Use longer ones, or split=None.")


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


@checked("stream", but=("lengths",))
def stream(task: Task | str, lengths: Lengths = "S", *, seed: int = 0, split: Split | None = None, start: int = 0
           ) -> Iterator[Instance]:
    """Instances without end, from number ``start`` on."""
    task = _task(task)
    task.span(lengths)
    if start < 0:
        raise InputError(f"stream: start: expected an integer of at least 0, got {start}.")
    return (draw(task, lengths, i, seed=seed, split=split) for i in count_up(start))


@checked("encode")
def encode(instance: Instance, tokenizer: Any, *, trace: bool = True) -> dict[str, list[int]]:
    """Prompt, trace and answer as ids, closed by the end-of-sequence token; no loss is taken on the prompt.

    Raises:
        InputError: the tokenizer does not know a symbol.
    """
    prompt = tokenizer(instance.prompt + "\n", add_special_tokens=False)["input_ids"]
    response = instance.response if trace else instance.answer
    ids = tokenizer(response, add_special_tokens=False)["input_ids"]
    if tokenizer.eos_token_id is not None:
        ids = [*ids, tokenizer.eos_token_id]
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in [*prompt, *ids]:
        raise InputError(f"task {instance.task.name!r}: the tokenizer does not know every symbol of {instance.text[:80]!r}. Use "
                         "depthpass.tasks.tokenizer('char'), or one made for this task.")
    whole = [*prompt, *ids]
    return {"input_ids": whole, "labels": [*[-100] * len(prompt), *ids], "attention_mask": [1] * len(whole)}


class _Rows:
    """What data sets by index and streams share."""

    def __init__(self, task: Task | str, lengths: Lengths, seed: int, split: Split | None, tokenizer: Any, trace: bool) -> None:
        if tokenizer is not None:
            check_tokenizer(type(self).__name__, tokenizer)
        self.task, self.seed = _task(task), seed
        self.lengths: Lengths = lengths
        self.split: Split | None = split
        self.tokenizer, self.trace = tokenizer, trace
        self.task.span(lengths)
        draw(self.task, lengths, 0, seed=seed, split=split)

    def instance(self, index: int) -> Instance:
        """Instance number ``index``."""
        return draw(self.task, self.lengths, index, seed=self.seed, split=self.split)

    def row(self, index: int) -> dict[str, Any]:
        instance = self.instance(index)
        if self.tokenizer is None:
            return instance.record(trace=self.trace)
        return encode(instance, self.tokenizer, trace=self.trace)


class TaskDataset(_Rows, Dataset):
    """So many instances by index; item i is the same whatever was asked before, in every process.

    Args:
        task: a task or its name.
        count: rows.
        lengths: S, M, L, a length, or (shortest, longest); drawn evenly.
        seed: of all rows.
        split: keep train and test prompts apart; None = all prompts.
        tokenizer: rows are ids and labels, else plain records.
        trace: with the trace, or with prompt and answer only.

    Raises:
        InputError: unknown task, lengths out of range, a count below 1.
    """

    @checked("TaskDataset", but=("lengths",))
    def __init__(self, task: Task | str, count: int, lengths: Lengths = "S", *, seed: int = 0, split: Split | None = None,
                 tokenizer: Any = None, trace: bool = True) -> None:
        if not 1 <= count <= sys.maxsize:
            raise InputError(f"count: expected an integer of at least 1, got {count}.")
        super().__init__(task, lengths, seed, split, tokenizer, trace)
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -self.count <= index < self.count:
            raise IndexError(f"expected an index below {self.count}, got {index}")
        return self.row(index % self.count)

    def to_datasets(self) -> Any:
        """A ``datasets.Dataset`` of the same rows.

        Raises:
            InputError: the package ``datasets`` is not installed.
        """
        return _datasets().Dataset.from_list([self[i] for i in range(len(self))])


class TaskStream(_Rows, IterableDataset):
    """Instances without end (or ``count`` of them), shared out between the workers of a DataLoader; can be resumed.

    Args:
        start: number of the first instance, to resume a stream: worker w of W gives the numbers start + w, start + w + W, ..
        count: stop after so many numbers; None = never.

    The other arguments are those of :class:`TaskDataset`.
    """

    @checked("TaskStream", but=("lengths",))
    def __init__(self, task: Task | str, lengths: Lengths = "S", *, seed: int = 0, split: Split | None = None,
                 tokenizer: Any = None, trace: bool = True, start: int = 0, count: int | None = None) -> None:
        super().__init__(task, lengths, seed, split, tokenizer, trace)
        if start < 0 or (count is not None and count < 1):
            raise InputError(f"TaskStream: expected start of at least 0 and count of at least 1, got {start} and {count}.")
        self.start, self.count = start, count

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        first, stride = (0, 1) if worker is None else (worker.id, worker.num_workers)
        stop = None if self.count is None else self.start + self.count
        for i in count_up(self.start + first, stride):
            if stop is not None and i >= stop:
                return
            yield self.row(i)

    def to_datasets(self) -> Any:
        """A ``datasets.IterableDataset`` of the same rows, drawn as they are asked for.

        Raises:
            InputError: the package ``datasets`` is not installed.
        """
        return _datasets().IterableDataset.from_generator(self.__iter__)


class Collator:
    """Rows of ids to a batch: pads ids with the tokenizer's pad token and labels with -100.

    Args:
        tokenizer: gives the pad token.
        side: where the pads go; None = the tokenizer's ``padding_side``.
    """

    @checked("Collator")
    def __init__(self, tokenizer: Any, side: Literal["left", "right"] | None = None) -> None:
        check_tokenizer("Collator", tokenizer)
        self.pad, self.side = tokenizer.pad_token_id, side or tokenizer.padding_side
        if self.pad is None:
            raise InputError("expected a tokenizer with a pad token, got one without. Set tokenizer.pad_token.")
        if self.side not in ("left", "right"):
            raise InputError(f"side: expected 'left' or 'right', got {side!r}.")

    def __call__(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
        columns = max(len(r["input_ids"]) for r in rows)
        fill = {"input_ids": self.pad, "labels": -100, "attention_mask": 0}
        return {k: torch.tensor([self._padded(r[k], columns, v) for r in rows]) for k, v in fill.items()}

    def _padded(self, row: list[int], columns: int, fill: int) -> list[int]:
        pads = [fill] * (columns - len(row))
        return [*pads, *row] if self.side == "left" else [*row, *pads]


def check_tokenizer(who: str, tokenizer: Any) -> None:
    """Refuse what does not work as a Hugging Face tokenizer.

    Raises:
        InputError: it cannot be called, or has no pad token.
    """
    if not callable(tokenizer) or not hasattr(tokenizer, "pad_token_id"):
        raise InputError(f"{who}: tokenizer: expected one of transformers' or depthpass.tasks.tokenizer(..), got "
                         f"{shown(tokenizer)} ({type(tokenizer).__name__}).")


def _task(task: Task | str) -> Task:
    return get(task) if isinstance(task, str) else task


def _datasets() -> Any:
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise InputError("expected the package 'datasets', which is not installed. Run: pip install 'depthpass[tasks]'") from None
    return datasets
