"""Samples: (prompt ids, answer ids) pairs, checked before anything runs, and split into two parts."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral
from typing import Any, NamedTuple

from torch import Tensor

from depthpass.errors import InputError
from depthpass.limits import shown


class Sample(NamedTuple):
    """Token ids of a prompt and of the right answer."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


SamplesLike = Iterable[Any] | Callable[..., Iterable[Any]]


def load_samples(samples: SamplesLike, seed: int, what: str = "samples") -> tuple[Sample, ...]:
    """Read samples.

    Args:
        samples: (prompt ids, answer ids) pairs of lists, 1-D tensors or arrays, or a callable that returns them; it is given
            ``seed=`` if it takes that.

    Raises:
        InputError: there are none, or one is not a pair of non-empty rows of token ids.
    """
    if callable(samples) and not isinstance(samples, Sequence):
        samples = samples(**({"seed": seed} if _takes_seed(samples) else {}))
    if isinstance(samples, str | bytes | Tensor) or not isinstance(samples, Iterable):
        raise InputError(f"{what}: expected (prompt ids, answer ids) pairs or a callable that returns them, got "
                         f"{type(samples).__name__}.")
    loaded = tuple(s if isinstance(s, Sample) else _pair(s, f"{what}[{i}]") for i, s in enumerate(samples))
    if not loaded:
        raise InputError(f"{what}: expected at least one (prompt ids, answer ids) pair, got none.")
    return loaded


def _takes_seed(function: Callable[..., Any]) -> bool:
    try:
        return "seed" in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False


def _pair(sample: Any, where: str) -> Sample:
    if not isinstance(sample, list | tuple) or len(sample) != 2:
        raise InputError(f"{where}: expected a pair (prompt ids, answer ids), got {shown(sample)}.")
    return Sample(_ids(sample[0], f"{where} prompt"), _ids(sample[1], f"{where} answer"))


def _ids(ids: Any, where: str) -> tuple[int, ...]:
    if isinstance(ids, Tensor) and (ids.dim() != 1 or ids.is_floating_point()):
        raise InputError(f"{where}: expected token ids [tokens], got a {ids.dtype} tensor of shape {tuple(ids.shape)}.")
    if callable(getattr(ids, "tolist", None)):  # a tensor, a NumPy array
        ids = ids.tolist()
    if not isinstance(ids, list | tuple) or not ids or not all(_is_id(i) for i in ids):
        raise InputError(f"{where}: expected at least one token id, integers of at least 0, got {shown(ids)}.")
    return tuple(map(int, ids))


def _is_id(token: Any) -> bool:
    return isinstance(token, Integral) and not isinstance(token, bool) and int(token) >= 0


def check_fit(samples: Sequence[Sample], vocabulary: int, table: int | None, what: str = "samples") -> None:
    """Refuse samples that the model cannot take.

    Args:
        vocabulary: token ids are below it.
        table: positions of a learned table; None = there is none.

    Raises:
        InputError: naming the sample.
    """
    for i, s in enumerate(samples):
        worst = max(*s.prompt, *s.answer)
        if worst >= vocabulary:
            raise InputError(f"{what}[{i}]: expected token ids of 0 to {vocabulary - 1}, got {worst}.")
        needed = len(s.prompt) + len(s.answer) - 1
        if table is not None and needed > table:
            raise InputError(f"{what}[{i}]: its prompt of {len(s.prompt)} and answer of {len(s.answer)} tokens reach position "
                             f"{needed - 1}, but the model's position table has {table} entries. Shorten it.")


def split(samples: Sequence[Sample], share: float, seed: int) -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
    """Samples to search on, at least one, and a held-out share of the different ones; a permutation by seed.

    Equal samples stay together: what is held out was not searched on.

    Raises:
        InputError: the share is not in [0, 1).
    """
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < 1:
        raise InputError(f"held_out: expected a share of at least 0 and below 1, or samples, got {shown(share)}.")
    order = list(dict.fromkeys(samples))
    random.Random(seed).shuffle(order)
    held = set(order[: min(len(order) - 1, max(round(share * len(order)), 1 if share else 0))])
    return tuple(s for s in samples if s not in held), tuple(s for s in samples if s in held)


def check_apart(searched: Sequence[Sample], held: Sequence[Sample]) -> None:
    """Refuse held-out samples that are searched on.

    Raises:
        InputError: naming one.
    """
    known = set(searched)
    for i, s in enumerate(held):
        if s in known:
            raise InputError(f"held_out[{i}]: expected samples that are not searched on, got one that is: prompt "
                             f"{shown(list(s.prompt))}.")
