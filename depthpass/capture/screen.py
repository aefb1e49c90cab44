"""What can be told about a model before it is traced: refuse by name what the capture could not treat soundly."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, cast

from torch import nn

from depthpass.capture.adapters import screen_adapters
from depthpass.capture.attention import attention_style, signature_names
from depthpass.capture.explain import attends_by_itself, computes_attention, dispatches, mask_makers
from depthpass.errors import UnsupportedModelError

_TRACED_ROPE = {
    "dynamic": "rescales every token's angles with the longest position of the call",
    "longrope": "switches every token's angles when a row grows past its original length",
}
_LOCAL = re.compile("norm|mlp|feed.?forward|ffn|moe|expert|dropout|embed|identity|^linear$", re.IGNORECASE)
_LIBRARY = "transformers."
_CACHES = {"past_key_values", "past_key_value", "cache", "cache_params", "state", "layer_past"}
"""What layers call the state that they are given."""
_FLAGS = ("output_router_logits", "output_attentions", "output_hidden_states")


def depth_field(config: Any) -> str:
    """The field of a config that counts the decoder's blocks; ``num_hidden_layers`` of BART's kind counts the encoder's."""
    return "decoder_layers" if getattr(config, "decoder_layers", None) else "num_hidden_layers"


def find_layers(model: nn.Module) -> str:
    """Module path of the list of decoder blocks: the outermost module list with ``num_hidden_layers`` entries.

    Raises:
        UnsupportedModelError: there is no such list, or more than one; or the model is no decoder of transformers.
    """
    config = getattr(model, "config", None)
    name = type(model).__name__
    if config is None or not hasattr(model, "get_input_embeddings") or not hasattr(config, "get_text_config"):
        raise UnsupportedModelError(
            f"expected a transformers decoder, got {name}: depthpass rewrites PreTrainedModel decoders "
            "(AutoModelForCausalLM and their like) and torch.compile graphs of them."
        )
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{name} is an encoder-decoder: its blocks also read the encoder's output, while only the hidden stream may "
            "flow from block to block. Use a decoder-only model."
        )
    text = config.get_text_config(decoder=True)
    count = getattr(text, depth_field(text), None)
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    fitting = [n for n, m in lists.items() if len(m) == count]
    outer = [n for n in fitting if not any(n.startswith(o + ".") for o in fitting)]
    if len(outer) > 1:  # a tower beside the text decoder may have as many
        outer = [n for n in outer if isinstance(_config_around(model, n), type(text))] or outer
    if len(outer) != 1:
        have = ", ".join(f"{n} ({len(m)})" for n, m in lists.items()) or "none"
        raise UnsupportedModelError(
            f"{name}: expected one list of {count} blocks (config.{depth_field(text)}), found "
            f"{' and '.join(outer) or 'none'}; module lists of the model: {have}."
        )
    return outer[0]


def _config_around(model: nn.Module, path: str) -> object:
    """The config of the innermost module around a path that has one."""
    config = None
    while path and config is None:
        path = path.rpartition(".")[0]
        config = getattr(model.get_submodule(path), "config", None)
    return config


def block_list(model: nn.Module, layers: str) -> nn.ModuleList:
    """The list of decoder blocks at a path that :func:`find_layers` has found."""
    return cast(nn.ModuleList, model.get_submodule(layers))


def text_config(model: nn.Module) -> Any:
    """The config of a model's decoder; of the model itself where it is nothing but text."""
    config: Any = model.config
    return config.get_text_config(decoder=True)


def screen(model: nn.Module, static: Mapping[str, object]) -> None:
    """Refuse models and calls that cannot be captured, by their modules and config.

    Args:
        static: keyword arguments of the call that are no tensors.

    Raises:
        UnsupportedModelError: says which layer, config field or argument, and why.
    """
    screen_modules(model)
    config = text_config(model)
    for flag in _FLAGS:
        if static.get(flag, getattr(config, flag, False)):
            raise UnsupportedModelError(
                f"{flag}=True: these values would leave the blocks besides the hidden stream, which is all that may flow "
                f"from block to block. Set {flag}=False."
            )
    if static.get("use_cache"):
        raise UnsupportedModelError("use_cache=True: caching is done by depthpass; capture without it.")


def screen_modules(model: nn.Module) -> None:
    """Refuse decoders that no call could be captured of, whatever its arguments and config: known at the transform.

    Raises:
        UnsupportedModelError: says which layer or config field, and why.
    """
    layers = find_layers(model)
    name = type(model).__name__
    attention_style(model)
    if not len(block_list(model, layers)):
        raise UnsupportedModelError(f"{name}: {layers} is empty; expected at least one block.")
    for module in model.modules():
        own = getattr(module, "config", None)
        if own is not None and getattr(own, "is_causal", True) is False:
            raise UnsupportedModelError(
                f"{name}: config.is_causal=False makes its attention bidirectional; a token that sees later tokens has "
                "no place in a token loop. Expected a causal decoder."
            )
    screen_adapters(model)
    for path, module in model.named_modules():
        for kind in _rope_types(module):
            if kind in _TRACED_ROPE:
                raise UnsupportedModelError(
                    f"{path} ({type(module).__name__}): rope type {kind!r} {_TRACED_ROPE[kind]}, so that a token's "
                    "table depends on later tokens. Expected a fixed table: 'default', 'linear', 'yarn', 'llama3', ... "
                    "(set config.rope_parameters)."
                )
    # Tracing would find these too, after minutes of unrolled recurrences.
    if mixers := _mixers(model, layers):
        raise UnsupportedModelError(
            f"{name}: {', '.join(mixers)} carries a state along the tokens besides keys and values (state-space, recurrent "
            "or linear-attention layers); a program cannot chunk or delay it yet. Use a model whose blocks mix tokens by "
            "attention only."
        )
    _screen_attention(model, layers)
    _screen_inputs(model)


def _screen_inputs(model: nn.Module) -> None:
    """Refuse blocks that read keys of earlier blocks, and positions that are made from what the ids are.

    Raises:
        UnsupportedModelError: naming the config field or the module.
    """
    if shared := getattr(text_config(model), "num_kv_shared_layers", 0):
        raise UnsupportedModelError(
            f"{type(model).__name__}: config.num_kv_shared_layers={shared}: the last {shared} blocks attend to keys and values "
            "of earlier blocks, while only the hidden stream may flow from block to block. Use a model without such blocks."
        )
    for path, module in model.named_modules():
        if path and hasattr(module, "create_position_ids_from_input_ids"):
            raise UnsupportedModelError(
                f"{path} ({type(module).__name__}) numbers tokens by what their ids are (padding ids are not counted, the first "
                "position is behind the padding's), which no chunk of a row knows. Expected positions that count columns."
            )


def screen_prompts(model: Any) -> None:
    """Refuse a PEFT model whose prompts are keys and values instead of embeddings.

    Raises:
        UnsupportedModelError: naming the kind.
    """
    config = getattr(model, "active_peft_config", None)
    kind = getattr(getattr(config, "peft_type", None), "value", "")
    if kind in ("PREFIX_TUNING", "CARTRIDGE") and not getattr(model, "_adapters_disabled", False):
        raise UnsupportedModelError(
            f"{kind.lower()}: these prompts are keys and values that every block is given and no token has, so visits, delays "
            "and loops have nothing to compute them from. Use prompt tuning or p-tuning, whose prompts are embeddings."
        )


def _screen_attention(model: nn.Module, layers: str) -> None:
    """Refuse attention that is known to be out of reach: of transformers' own classes, whose code is looked through.

    Raises:
        UnsupportedModelError: as the trace would.
    """
    name = type(model).__name__
    if type(model).__module__.startswith(_LIBRARY):
        makes, decides = mask_makers(type(model)), getattr(model.config, "is_decoder", True)
        if "create_bidirectional_mask" in makes and not (decides and "create_causal_mask" in makes):
            raise UnsupportedModelError(
                f"{name}: its attention is bidirectional" + ("" if decides else " (config.is_decoder=False)") +
                "; a token that sees later tokens has no place in a token loop. Expected a causal decoder."
            )
    for i, block in enumerate(block_list(model, layers)):
        attention = [m for m in block.modules() if dispatches(type(m))]
        # One that is causal is the block's own; what stands beside it reads an encoder, and is not called without one.
        both = [m for m in attention if getattr(m, "is_causal", True) is False and type(m).__module__.startswith(_LIBRARY)]
        if both and len(both) == len(attention):
            raise UnsupportedModelError(
                f"{name}: {type(both[0]).__name__}: expected causal attention, got is_causal=False (bidirectional), which "
                "lets tokens see later tokens."
            )
        if attention:
            continue
        attending = [(f"{layers}.{i}.{path}", m) for path, m in block.named_modules()
                     if path and type(m).__module__.startswith(_LIBRARY) and computes_attention(type(m))]
        if attending:
            raise attends_by_itself(name, *attending[0])


def _mixers(model: nn.Module, layers: str) -> list[str]:
    """Modules of the blocks that mix tokens by something else than attention, the first of each class.

    Those are modules that are given a cache and dispatch no attention; where there are none in a model that says that it has
    states, what is not token-local by name.
    """
    says = getattr(model, "_is_stateful", False)
    stateful: dict[str, str] = {}
    unknown: dict[str, str] = {}
    for i, block in enumerate(block_list(model, layers)):
        for path, module in block.named_modules():
            kind = type(module).__name__
            if path and not any(dispatches(type(m)) for m in module.modules()):
                known = says or (type(module).__module__.startswith(_LIBRARY) and
                                 not any(computes_attention(type(m)) for m in module.modules()))
                if known and _CACHES & {*signature_names(type(module).forward)}:
                    stateful.setdefault(kind, f"{layers}.{i}.{path} ({kind})")
                if says and "." not in path and not _LOCAL.search(kind):
                    unknown.setdefault(kind, f"{layers}.{i}.{path} ({kind})")
    return list((stateful or unknown).values())


def _rope_types(module: nn.Module) -> list[str]:
    value = getattr(module, "rope_type", None)
    settings = list(value.values()) if isinstance(value, dict) else [value]
    return ["dynamic" if "dynamic" in kind else kind for kind in settings if isinstance(kind, str)]
