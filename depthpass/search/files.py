"""Samples from files: JSON or JSON lines, token ids or text."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from depthpass.errors import InputError
from depthpass.limits import shown

FORM = '[[prompt, answer], ...] or one {"prompt": ..., "answer": ...} a line, each a list of token ids or a text'


def read_samples(text: str, where: str, tokenizer: Callable[[], Any]) -> list[tuple[list[int], list[int]]]:
    """Pairs of token ids.

    Args:
        text: what the file holds.
        where: its name, for messages.
        tokenizer: gives the tokenizer; called only when there is text to tokenize.

    Raises:
        InputError: the file holds something else.
    """
    pairs = [_pair(entry, f"{where}, sample {i}") for i, entry in enumerate(_entries(text, where))]
    words = None
    if any(isinstance(part, str) for pair in pairs for part in pair):
        words = tokenizer()
    return [(_ids(prompt, words, True), _ids(answer, words, False)) for prompt, answer in pairs]


def _entries(text: str, where: str) -> list[Any]:
    try:
        entries = json.loads(text)
    except json.JSONDecodeError:
        try:
            entries = [json.loads(line) for line in text.splitlines() if line.strip()]
        except json.JSONDecodeError as error:
            raise InputError(f"{where}: expected JSON or JSON lines, {FORM}; {error}.") from None
    if isinstance(entries, dict):
        entries = [entries]
    if not isinstance(entries, list):
        raise InputError(f"{where}: expected {FORM}, got {shown(entries)}.")
    return entries


def _pair(entry: Any, where: str) -> tuple[Any, Any]:
    if isinstance(entry, dict) and {"prompt", "answer"} <= set(entry):
        return entry["prompt"], entry["answer"]
    if isinstance(entry, list) and len(entry) == 2:
        return entry[0], entry[1]
    raise InputError(f"{where}: expected {FORM}, got {shown(entry)}.")


def _ids(part: Any, words: Any, prompt: bool) -> Any:
    # The prompt begins as the tokenizer begins a text, the answer goes on.
    return words(part, add_special_tokens=prompt)["input_ids"] if isinstance(part, str) else part
