"""Lists of layers as other tools write them: mergekit passthrough, PEFT's layer replication, flat maps."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from yaml.composer import ComposerError

from depthpass.errors import SpecError, did_you_mean
from depthpass.limits import TEXT, check_program, shown

_MERGEKIT = ("slices", "merge_method", "dtype", "out_dtype", "tokenizer_source", "tokenizer", "chat_template", "name")
"""Fields of a mergekit config that say which blocks are visited, or nothing about depth at all."""


def mergekit_layers(config: str | Mapping[str, Any]) -> tuple[int, ...]:
    """Of a passthrough config; raises as :meth:`depthpass.LayerProgram.from_mergekit`."""
    data = _yaml(config) if isinstance(config, str) else config
    if not isinstance(data, Mapping) or not isinstance(data.get("slices"), Sequence) or not data["slices"]:
        raise SpecError("mergekit config: expected a mapping with a list 'slices', "
                        f"got {', '.join(data) if isinstance(data, Mapping) else repr(data)}.")
    _known(data, _MERGEKIT, "mergekit config")
    if data.get("merge_method") != "passthrough":
        raise SpecError(f"mergekit config: expected merge_method passthrough, got {data.get('merge_method')!r}. "
                        "Other methods merge weights; run them in mergekit and transform the result.")
    sources = []
    for i, piece in enumerate(data["slices"]):
        where = f"mergekit config: slices[{i}]"
        listed = piece.get("sources") if isinstance(piece, Mapping) else None
        if not isinstance(listed, Sequence) or len(listed) != 1 or not isinstance(listed[0], Mapping):
            raise SpecError(f"{where}: expected 'sources' with exactly one source, got {piece!r}.")
        _known(piece, ("sources",), where)
        _known(listed[0], ("model", "layer_range"), f"{where}.sources[0]")
        sources.append(listed[0])
    models = {str(s.get("model")) for s in sources}
    if len(models) > 1:
        raise SpecError(f"mergekit config: expected slices of one model, got {', '.join(sorted(models))}. "
                        "Blocks of several models need their weights merged first.")
    return joined_ranges([s.get("layer_range") for s in sources])


def joined_ranges(ranges: Sequence[Any]) -> tuple[int, ...]:
    """Of half-open ranges [start, end), joined."""
    layers: list[int] = []
    for i, pair in enumerate(ranges):
        ok = isinstance(pair, list | tuple) and len(pair) == 2 and all(type(p) is int for p in pair)
        if not ok or not 0 <= pair[0] < pair[1]:
            raise SpecError(f"layer range {i}: expected [start, end) with 0 <= start < end, got {shown(pair)}.")
        check_program(len(layers) + pair[1] - pair[0], 0, f"layer range {i}")
        layers += range(*pair)
    return tuple(layers)


def flat_layers(text: str) -> tuple[int, ...]:
    """Of block numbers and ``start:end`` ranges, separated by commas or spaces."""
    layers: list[int] = []
    for word in re.split(r"[,\s]+", text.strip()):
        match = re.fullmatch(r"(\d+)(?::(\d+))?", word)
        if not match:
            raise SpecError(f"layer map: expected numbers and start:end ranges, got {word!r} in {text!r}.")
        if len(word) > 20:
            raise SpecError(f"layer map: expected block numbers, got {shown(word)}.")
        piece = range(int(match[1]), int(match[2]) if match[2] else int(match[1]) + 1)
        check_program(len(layers) + len(piece), 0, "layer map")
        if not piece:
            raise SpecError(f"layer map: expected a range start:end with start < end, got {word!r}.")
        layers += piece
    return tuple(layers)


def _yaml(text: str) -> Any:
    if len(text) > TEXT:
        raise SpecError(f"mergekit config: expected at most {TEXT} characters, got {len(text)}.")
    try:
        return yaml.safe_load(text)
    except ComposerError as error:
        raise SpecError("mergekit config: expected one document, got several (separated by ---), of which each makes a model of "
                        "its own. Pass one of them.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise SpecError(f"mergekit config: expected one YAML document, got text that is none: {reason}.") from None


def _known(data: Mapping[str, Any], fields: Sequence[str], where: str) -> None:
    for key in data:
        if key not in fields:
            raise SpecError(f"{where}: the field {key!r} is not supported.{did_you_mean(str(key), fields)} "
                            f"Supported: {', '.join(fields)}.")
