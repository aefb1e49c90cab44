"""What modes of ``generate`` with a decoding of our own (drafts, rows of different depth) can be combined with."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import StopStringCriteria

from depthpass.errors import CacheError, InputError

_PLAIN: tuple[tuple[str, Any], ...] = (
    ("num_beams", 1), ("num_beam_groups", 1), ("use_cache", True), ("output_attentions", False), ("output_hidden_states", False),
    ("assistant_model", None), ("assistant_tokenizer", None), ("assistant_early_exit", None), ("prompt_lookup_num_tokens", None),
    ("custom_generate", None),
    ("inputs_embeds", None), ("prefill_chunk_size", None), ("guidance_scale", 1), ("penalty_alpha", None),
    ("dola_layers", None), ("constraints", None), ("force_words_ids", None), ("negative_prompt_ids", None),
    ("synced_gpus", False), ("prompt_length", None),
)
"""Settings with the value that leaves plain greedy decoding or sampling as it is."""


def named(generate: Any, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of ``generate`` by name."""
    names = list(inspect.signature(generate).parameters)[1:]
    if len(args) > len(names):
        raise TypeError(f"generate: expected at most {len(names)} positional arguments, got {len(args)}.")
    if twice := [n for n in names[: len(args)] if n in kwargs]:
        raise TypeError(f"generate: got several values for {twice[0]!r}.")
    return dict(zip(names, args)) | kwargs


def with_stop_strings(model: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Stop strings as a criterion: transformers keeps the tokenizer from decoding that is not its own.

    Raises:
        InputError: there is no tokenizer to read them with.
    """
    kwargs = dict(kwargs)
    tokenizer, config = kwargs.pop("tokenizer", None), kwargs.get("generation_config")
    told = (kwargs.get("stop_strings"), getattr(config, "stop_strings", None), model.generation_config.stop_strings)
    strings = next((s for s in told if s is not None), None)
    if strings is None:
        return kwargs
    if tokenizer is None:
        raise InputError("stop_strings: expected the model's tokenizer beside them, got none. Pass generate(..., tokenizer=...).")
    criterion = StopStringCriteria(tokenizer=tokenizer, stop_strings=strings)
    return kwargs | {"stop_strings": None, "stopping_criteria": [*(kwargs.get("stopping_criteria") or ()), criterion]}


def check_combined(model: Any, kwargs: dict[str, Any], cache: Any, tokens: Any, who: str = "draft") -> None:
    """Refuse what cannot be combined, before anything runs; ``who`` is the argument that asks.

    Raises:
        InputError, CacheError: naming the argument.
    """
    if tokens != "auto" and (type(tokens) is not int or tokens < 1):
        raise InputError(f"draft_tokens: expected a number of at least 1 or 'auto', got {tokens!r}.")
    if cache is not None:
        raise CacheError(f"{who}: expected no cache of your own, got a {type(cache).__name__}. It keeps several states, which "
                         "are made afresh.")
    config = kwargs.get("generation_config") or model.generation_config
    for name, plain in _PLAIN:
        given = kwargs.get(name, getattr(config, name, None))
        if given is not None and (plain is None or given != plain):
            shown = type(given).__name__ if hasattr(given, "shape") or callable(given) else repr(given)
            raise InputError(f"{who}: expected {name}={plain!r} beside it, got {shown}. Leave one of them out.")
    for processor in kwargs.get("logits_processor") or ():
        if getattr(processor, "hears_model", False):
            raise InputError(f"{who}: expected logits processors that read tokens and scores, got {type(processor).__name__}, "
                             "which listens to calls of the model. Leave one of them out.")
