"""Facts of a stock model: read from the model itself, or from a config alone, on the meta device without weights."""

from __future__ import annotations

import copy
import json
import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from depthpass.capture.export import find_layers
from depthpass.errors import InputError, UnsupportedModelError, did_you_mean
from depthpass.hf.checkpoints.marks import PREFIX as MARKED
from depthpass.hf.checkpoints.marks import unmarked
from depthpass.hf.modules.context import inner_model
from depthpass.prompt import at_prompt

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
"""What the id of a model on the hub looks like: ``gpt2``, ``meta-llama/Llama-3.2-1B``."""

ModelLike = Any
"""A PreTrainedModel, a PreTrainedConfig, a mapping of a config's fields, the path of a ``config.json``, or the id of a model
on the hub, of which the config alone is fetched."""


@at_prompt
@dataclass(frozen=True)
class ModelFacts:
    """What reports and passes need to know of a stock model.

    Attributes:
        model: class name.
        model_type: transformers' name of the architecture.
        layers: module path of the list of blocks.
        blocks: number of physical blocks.
        width: width of the hidden stream.
        vocabulary: number of token embeddings.
        max_positions: longest sequence the config is made for; None when it does not say.
        dtype: of the weights, e.g. ``bfloat16``.
        itemsize: bytes per value of that dtype.
        parameters: distinct parameters of the whole model; tied ones count once.
        block_parameters: parameters of each block.
        kv_widths: values that one token adds to a KV slot of each block, keys and values together; None when the
            config's head counts do not describe the attention modules.
        from_config: whether no weights were read.
        config: a copy of the model's config without a spec.
        head_dim: width of a head's keys; None when the config does not say.
    """

    model: str
    model_type: str
    layers: str
    blocks: int
    width: int
    vocabulary: int
    max_positions: int | None
    dtype: str
    itemsize: int
    parameters: int
    block_parameters: tuple[int, ...]
    kv_widths: tuple[int, ...] | None
    from_config: bool
    config: Any = field(default=None, repr=False, compare=False)
    head_dim: int | None = None


def model_facts(source: ModelLike) -> ModelFacts:
    """Facts of a model, or of the model that a config describes.

    Args:
        source: see :data:`ModelLike`.

    Raises:
        InputError: the source cannot be read as a model or config.
        UnsupportedModelError: the architecture is unknown, or has no single list of decoder blocks.
    """
    model: Any = stock_model(source)
    layers = find_layers(model)
    blocks = list(model.get_submodule(layers))
    text = model.config.get_text_config(decoder=True)
    first = next(model.parameters())
    return ModelFacts(
        model=type(model).__name__,
        model_type=model.config.model_type,
        layers=layers,
        blocks=len(blocks),
        width=text.hidden_size,
        vocabulary=model.get_input_embeddings().num_embeddings,
        max_positions=getattr(text, "max_position_embeddings", None),
        dtype=str(first.dtype).removeprefix("torch."),
        itemsize=first.dtype.itemsize,
        parameters=_count(model),
        block_parameters=tuple(_count(b) for b in blocks),
        kv_widths=_kv_widths(blocks, text),
        from_config=first.device.type == "meta",
        config=copy.deepcopy(model.config),
        head_dim=_head_dim(text),
    )


def stock_model(source: ModelLike) -> nn.Module:
    """The model itself, or one built from a config on the meta device: modules and shapes, no storage.

    Raises:
        InputError: the source cannot be read as a model or config.
        UnsupportedModelError: the architecture is unknown or cannot be built.
    """
    if isinstance(source, nn.Module):
        return inner_model(source)
    from transformers import AutoModelForCausalLM, PreTrainedConfig

    config = source if isinstance(source, PreTrainedConfig) else _config(source)
    cls = _architecture(config)
    try:
        with torch.device("meta"):
            # `_from_config` is what the auto class calls; it also takes the dtype from the config.
            model = cls._from_config(config) if cls else AutoModelForCausalLM.from_config(config)
    except Exception as error:
        # Whatever a third party's constructor raises, the user's question is about the config.
        raise UnsupportedModelError(
            f"{type(config).__name__}: no {cls.__name__ if cls else 'causal language model'} can be built from this "
            f"config: {type(error).__name__}: {_first_line(error)}"
        ) from error
    return model.eval()


def _architecture(config: Any) -> Any:
    """The class named by ``config.architectures``, or None when the config names none."""
    import transformers

    names = list(config.architectures or ())
    if not names:
        return None
    cls = getattr(transformers, names[0], None)
    if cls is None:
        raise UnsupportedModelError(
            f"architectures: transformers {transformers.__version__} has no class {names[0]!r}; models with code of "
            "their own are not supported. Load the model yourself and pass the model, or update transformers."
        )
    return cls


def _config(source: ModelLike) -> Any:
    from transformers import CONFIG_MAPPING, AutoConfig

    where = "config"
    if isinstance(source, str | Path):
        where, source = f"config {str(source)!r}", _read(_local(source))
    if not isinstance(source, Mapping):
        raise InputError(
            f"{where}: expected a transformers model, a config, a mapping of a config's fields or the path of a "
            f"config.json, got {type(source).__name__}."
        )
    fields = unmarked(dict(source), where)
    if isinstance(names := fields.get("architectures"), list | tuple):
        fields["architectures"] = [n.removeprefix(MARKED) if isinstance(n, str) else n for n in names]
    kind = fields.pop("model_type", None)
    if not isinstance(kind, str):
        raise InputError(f"{where}: expected a field 'model_type' such as \"llama\", got {kind!r}. Is this the config "
                         "of a transformers model?")
    if kind not in CONFIG_MAPPING:
        raise UnsupportedModelError(
            f"{where}: model_type {kind!r} is not known to this transformers.{did_you_mean(kind, CONFIG_MAPPING)} "
            "Update transformers, or pass a loaded model."
        )
    try:
        return AutoConfig.for_model(kind, **fields)
    except Exception as error:
        raise InputError(f"{where}: not a valid {kind} config: {_first_line(error)}") from error


def config_fields(source: str | Path) -> Any:
    """The fields of a config as they stand in its file; transformers is not imported for a path.

    Raises:
        InputError: there is no such file, or it is not JSON.
    """
    return _read(_local(source))


def _local(source: str | Path) -> Path:
    """The path itself, or where the config of a model on the hub was fetched to."""
    if isinstance(source, Path) or Path(source).exists() or not HUB_ID.fullmatch(source) or source.endswith(".json"):
        return Path(source)
    from transformers.utils.hub import cached_file

    try:
        return Path(str(cached_file(source, "config.json")))
    except (OSError, ValueError) as error:
        raise InputError(
            f"config {source!r}: expected the path of a config.json or its folder, or a model id of the hub; no such path here."
            f"{did_you_mean(source, map(str, Path().iterdir()))} No such config could be fetched: {_first_line(error)}"
        ) from None


def _read(path: Path) -> Any:
    file = path / "config.json" if path.is_dir() else path
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        near = did_you_mean(file.name, [p.name for p in file.parent.iterdir()]) if file.parent.is_dir() else ""
        raise InputError(
            f"config {str(file)!r} cannot be read: {error.strerror}.{near} Expected the path of a config.json or of a "
            "folder that holds one."
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"config {str(file)!r} is not JSON: {error}.") from None
    return data


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # transformers lists every class it knows behind what is wrong.
    return textwrap.shorten(" ".join(lines[:2]), 240, placeholder=" ...") or type(error).__name__


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _head_dim(text: Any) -> int | None:
    heads = getattr(text, "num_attention_heads", None)
    return getattr(text, "head_dim", None) or (text.hidden_size // heads if heads else None)


def _kv_widths(blocks: list[nn.Module], text: Any) -> tuple[int, ...] | None:
    """Keys and values per token of each block.

    Head counts have many names and exceptions (multi-query, latent attention), so where a block has separate key and
    value projections their widths are taken, and where it has none the config must give plain head counts.
    """
    widths = []
    heads = getattr(text, "num_attention_heads", None)
    latent = getattr(text, "kv_lora_rank", None) is not None
    groups = 1 if getattr(text, "multi_query", False) else getattr(text, "num_key_value_heads", None) or heads
    head_dim = _head_dim(text)
    split = any(path.rpartition(".")[2] == "k_proj" for b in blocks for path, _ in b.named_modules())
    for block in blocks:
        projections: dict[str, Any] = {
            leaf: module.weight.shape
            for path, module in block.named_modules()
            if (leaf := path.rpartition(".")[2]) in ("k_proj", "v_proj") and hasattr(module, "weight")
        }
        if len(projections) == 2:
            # torch's Linear keeps [out, in].
            widths.append(sum(shape[0] for shape in projections.values()))
        elif latent or split or not (groups and head_dim):
            return None
        else:
            widths.append(2 * groups * head_dim)
    return tuple(widths)
