"""Tokenizers for tasks, as Hugging Face tokenizers: bytes, characters, or symbols (whole numbers and words)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

from depthpass.annotations import checked
from depthpass.errors import InputError, did_you_mean
from depthpass.limits import INTEGER
from depthpass.tasks.registry import get
from depthpass.tasks.task import Task

KINDS = ("char", "byte", "symbol")
SAMPLED = 16
"""Instances of each task whose words a symbol tokenizer looks at."""


@checked("tokenizer")
def tokenizer(
    kind: Literal["char", "byte", "symbol"] = "char", tasks: Task | str | Sequence[Task | str] = (), *, numbers: int = 0,
    symbols: Sequence[str] = (), padding_side: Literal["left", "right"] = "right",
) -> Any:
    """A fast tokenizer (``PreTrainedTokenizerFast``) that encodes and decodes prompts and traces without loss.

    It has the tokens ``<pad> <bos> <eos> <unk> <mask>`` (ids 0 to 4), adds none of them by itself, and saves and loads as
    any other (``save_pretrained``, ``AutoTokenizer.from_pretrained``).

        char     one token per printable ASCII character and newline
        byte     one token per byte of UTF-8: any text
        symbol   numbers below ``numbers`` and words are one token; everything else falls apart into characters

    Args:
        kind: see above.
        tasks: for ``symbol``, tasks whose fixed words (of prompts and of local functions) become tokens.
        numbers: for ``symbol``, numbers from 0 to below this are one token.
        symbols: for ``symbol``, further tokens.
        padding_side: of batches; left for generating.

    Raises:
        InputError: unknown kind or side, or options of the symbol tokenizer with another one.
    """
    if kind not in KINDS:
        raise InputError(f"tokenizer: kind: expected one of {', '.join(KINDS)}, got {kind!r}.{did_you_mean(str(kind), KINDS)}")
    if padding_side not in ("left", "right"):
        raise InputError(f"tokenizer: padding_side: expected 'left' or 'right', got {padding_side!r}.")
    if not 0 <= numbers <= INTEGER:
        raise InputError(f"tokenizer: numbers: expected an integer from 0 to {INTEGER}, got {numbers}.")
    if kind != "symbol" and (tasks or numbers or symbols):
        raise InputError(f"tokenizer: tasks, numbers and symbols are options of kind='symbol', got kind={kind!r}.")
    from depthpass.hf.checkpoints.task_tokenizer import build

    if kind == "byte":
        return build("byte", (), padding_side)
    characters = [*string.printable[:95], "\n"]
    if kind == "char":
        return build("char", characters, padding_side)
    given = [tasks] if isinstance(tasks, (str, Task)) else tasks
    words = [*map(str, range(numbers)), *symbols, *(w for t in given for w in fixed_words(get(t) if isinstance(t, str) else t))]
    return build("symbol", [*characters, *words], padding_side)


def fixed_words(task: Task) -> list[str]:
    """Words of letters that stand in most instances of a task: those of its prompt, and names of its local functions."""
    low, high = task.span("S")
    seen: Counter[str] = Counter()
    for seed in range(SAMPLED):
        seen.update(set(re.findall(r"[A-Za-z]{2,}", task.instance(low + seed % (high - low + 1), seed).text)))
    return sorted(w for w, n in seen.items() if 2 * n >= SAMPLED)
