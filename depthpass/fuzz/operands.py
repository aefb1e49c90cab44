"""What a visit brings along, on the stock modules: a LoRA of its own, factors of what its parts read and add."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from depthpass.ir import Op

PLAIN = ("self_attn", "mlp", "self_attn", "mlp")
_SANDWICH = ("self_attn", "mlp", "post_attention_layernorm", "post_feedforward_layernorm")
PLACES = {
    "gpt2": ("attn", "mlp", "attn", "mlp"), "gpt_neox": ("attention", "mlp", "attention", "mlp"),
    "glm4": ("self_attn", "mlp", "post_self_attn_layernorm", "post_mlp_layernorm"),
    "llama4_text": ("self_attn", "feed_forward", "self_attn", "feed_forward"),
    **dict.fromkeys(("gemma2", "gemma3_text", "olmo2", "olmo3", "exaone4"), _SANDWICH),
}
"""Attention, MLP, and the modules whose results the residual stream takes, where they are not those of Llama."""


_ENDS = {"opt": ("self_attn", "fc2")}
_BESIDE = ("gpt_neox", "phi", "cohere", "cohere2")


def beside(model: Any) -> bool:
    """Whether the branches of a model's blocks run beside each other: both read the block's input."""
    return model.config.model_type in _BESIDE


@contextmanager
def silent(block: nn.Module, kind: str, network: bool | None):
    """A stock block whose network (True) or attention (False) adds nothing to the stream."""
    if network is None:
        yield
        return
    ends: tuple[str, ...] = _ENDS.get(kind) or PLACES.get(kind, PLAIN)[2:]

    def nothing(module: nn.Module, args: Any, out: Any) -> Any:
        return (0 * out[0], *out[1:]) if isinstance(out, tuple) else 0 * out

    handle = block.get_submodule(ends[1 if network else 0]).register_forward_hook(nothing)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def operands(o: Op, block: nn.Module, p: Mapping[str, Tensor], kind: str):
    """A visit's LoRA and factors on a stock block of a model type."""
    with ExitStack() as stack:
        if o["lora"]:
            _low_rank(o, block, p, stack)
        if o["modulate"]:
            _factors(o, block, p, PLACES.get(kind, PLAIN), stack)
        yield


def _low_rank(o: Op, block: nn.Module, p: Mapping[str, Tensor], stack: ExitStack) -> None:
    for path, module in block.named_modules():
        name = f"{o['lora']}.{path}"
        if f"{name}.a" in p:
            table: dict[str, Any] = module._parameters
            weight = table["weight"]
            stack.callback(table.__setitem__, "weight", weight)
            table["weight"] = weight + p[f"{name}.b"] @ p[f"{name}.a"]


def _factors(o: Op, block: nn.Module, p: Mapping[str, Tensor], places: tuple[str, ...], stack: ExitStack) -> None:
    if o["clock"]:
        t = F.silu(_time(o["clock"], o["step"], p))
        factors = (p[f"{o['modulate']}.weight"] @ t + p[f"{o['modulate']}.bias"]).view(4, -1)
    else:
        factors = p[f"{o['modulate']}.weight"]
    gate_a, gate_m, read_a, read_m = factors
    attention, mlp, end_a, end_m = (block.get_submodule(n) for n in places)

    def reads(scale: Tensor) -> Callable[..., Any]:
        def hook(module, args, kwargs):
            if args:
                return (args[0] * (1 + scale), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": kwargs["hidden_states"] * (1 + scale)}

        return hook

    def adds(gate: Tensor) -> Callable[..., Any]:
        def hook(module, args, out):
            return (out[0] * (o["base"] + gate), *out[1:]) if isinstance(out, tuple) else out * (o["base"] + gate)

        return hook

    for module, scale in ((attention, read_a), (mlp, read_m)):
        stack.callback(module.register_forward_pre_hook(reads(scale), with_kwargs=True).remove)
    for module, gate in ((end_a, gate_a), (end_m, gate_m)):
        stack.callback(module.register_forward_hook(adds(gate)).remove)


def _time(name: str, step: int, p: Mapping[str, Tensor]) -> Tensor:
    width = p[f"{name}.rise.weight"].shape[1] // 2
    phase = torch.tensor([step / 10000 ** (i / width) for i in range(width)], dtype=torch.float64)
    inner = p[f"{name}.rise.weight"] @ torch.cat((phase.cos(), phase.sin())) + p[f"{name}.rise.bias"]
    return p[f"{name}.mix.weight"] @ F.silu(inner) + p[f"{name}.mix.bias"]
