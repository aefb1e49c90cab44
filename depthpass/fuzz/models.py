"""Tiny random models of every supported architecture, built from configs without downloads."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

ModuleT = TypeVar("ModuleT", bound=nn.Module)

VOCABULARY = 97
WINDOW = 4
"""Sliding windows and attention chunks: far smaller than the rows."""
FIRST_TOKEN = 6
"""Tokens below have a meaning of their own (pads, begin, end, workspace)."""

ARCHITECTURES = (
    "llama qwen2 qwen3 mistral gemma gemma2 gemma3_text phi phi3 gpt2 gpt_neox olmo olmo2 olmo3 smollm3 granite cohere "
    "cohere2 stablelm starcoder2 mixtral qwen3_moe gpt_oss opt helium glm glm4 nemotron ernie4_5 exaone4 "
    "hunyuan_v1_dense apertus llama4_text"
).split()

COARSE = {"gemma": 5e-5, "gemma2": 1e-4, "gemma3_text": 5e-5}
"""Relative tolerance where stock code computes in float32 whatever the model's dtype, and rounds by the shape of a batch."""

_OF_TWO = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW}
_EXTRA: dict[str, dict[str, Any]] = {
    "mixtral": _OF_TWO,
    "gpt_oss": _OF_TWO | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "llama4_text": {
        "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 48, "attention_chunk_size": WINDOW,
    },
    "gemma2": {"sliding_window": WINDOW, "attn_implementation": "eager"},
    "gemma3_text": {"sliding_window": WINDOW, "layer_types": "alternate"},
    **{n: {"sliding_window": WINDOW} for n in ("mistral", "cohere2", "olmo3", "exaone4", "starcoder2")},
    "phi3": {"original_max_position_embeddings": 128},
    **{n: {"partial_rotary_factor": 0.5} for n in ("glm", "glm4")},
    "granite": {"logits_scaling": 3.0},
}
_TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def config(name: str, layers: int) -> Any:
    """Config of an architecture: width 32, 4 heads, 2 key-value heads."""
    if name == "gpt2":
        sizes: dict[str, Any] = {"n_embd": 32, "n_layer": layers, "n_head": 4, "n_positions": 128}
    elif name == "opt":
        sizes = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": layers, "num_attention_heads": 4,
                 "max_position_embeddings": 128, "word_embed_proj_dim": 32}
    else:
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers, "num_attention_heads": 4,
                 "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128}
    for left_out in {"gpt_neox": ("head_dim", "num_key_value_heads"), "phi": ("head_dim",)}.get(name, ()):
        del sizes[left_out]
    sizes |= _TOKENS | _EXTRA.get(name, {})
    if sizes.get("layer_types") == "alternate":
        sizes["layer_types"] = (["sliding_attention", "full_attention"] * layers)[:layers]
    return AutoConfig.for_model(name, **sizes)


@lru_cache(maxsize=8)
def stock(name: str, layers: int) -> PreTrainedModel:
    """A float64 model in eval mode with weights large enough that every block moves the output; do not change it."""
    torch.manual_seed(0)
    built = AutoModelForCausalLM.from_config(config(name, layers)).to(torch.float64).eval()
    if hasattr(built, "set_experts_implementation"):
        built.set_experts_implementation("eager")
    return enliven(built, seed=0, std=0.2, least=2)


def enliven(module: ModuleT, seed: int, std: float, least: int) -> ModuleT:
    """Random values for every parameter of at least ``least`` dimensions."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            if p.dim() >= least:
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * std)
    return module


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks of a stock model."""
    config: Any = model.config
    count = config.num_hidden_layers
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count)


def decoder_of(model: nn.Module) -> nn.Module:
    """The module that holds the blocks and the final norm."""
    blocks = blocks_of(model)
    return next(m for m in model.modules() if any(c is blocks for c in m.children()))


def norm_of(model: nn.Module) -> nn.Module:
    """The final norm of a stock model."""
    decoder = decoder_of(model)
    return next(getattr(decoder, n) for n in ("norm", "ln_f", "final_layer_norm", "final_layernorm") if hasattr(decoder, n))
