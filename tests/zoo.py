"""Small random models of every supported architecture, built from configs without downloads."""

from __future__ import annotations

import inspect

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

SUPPORTED = (
    "llama qwen2 qwen3 mistral gemma gemma2 gemma3_text phi phi3 gpt2 gpt_neox olmo olmo2 olmo3 smollm3 granite cohere "
    "cohere2 stablelm starcoder2 mixtral qwen3_moe gpt_oss opt helium glm glm4 nemotron ernie4_5 exaone4 "
    "hunyuan_v1_dense apertus llama4_text"
).split()

CACHE = next(n for n in ("cache", "past_key_values") if n in inspect.signature(LlamaForCausalLM.forward).parameters)
"""Name of a stock model's cache, as an argument and in its outputs: transformers 5.24 renamed it."""

VOCABULARY = 97
WINDOW = 4
"""Sliding windows and attention chunks: far smaller than the sequences of the tests."""

_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_EXTRA: dict[str, dict] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "llama4_text": {
        "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 48, "attention_chunk_size": WINDOW,
    },
    # Older transformers would take sdpa, which leaves the softcap out.
    "gemma2": {"sliding_window": WINDOW, "attn_implementation": "eager"},
    "gemma3_text": {"sliding_window": WINDOW, "layer_types": "alternate"},
    "mistral": {"sliding_window": WINDOW},
    "cohere2": {"sliding_window": WINDOW},
    "olmo3": {"sliding_window": WINDOW},
    "exaone4": {"sliding_window": WINDOW},
    "starcoder2": {"sliding_window": WINDOW},
    "phi3": {"original_max_position_embeddings": 128},
    "glm": {"partial_rotary_factor": 0.5},
    "glm4": {"partial_rotary_factor": 0.5},
}


def config(name: str, layers: int = 4, **overrides):
    """A tiny config of an architecture: width 32, 4 heads, 2 key-value heads."""
    if name == "gpt2":
        d = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": layers, "n_head": 4, "n_positions": 128}
    elif name == "opt":
        d = {"vocab_size": VOCABULARY, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": layers,
             "num_attention_heads": 4, "max_position_embeddings": 128, "word_embed_proj_dim": 32}
    else:
        d = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers,
             "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128}
    if name in ("gpt_neox", "phi"):
        d.pop("head_dim")
    if name == "gpt_neox":
        d.pop("num_key_value_heads")
    d |= _TOKENS | _EXTRA.get(name, {}) | overrides
    if d.get("layer_types") == "alternate":
        d["layer_types"] = ["sliding_attention", "full_attention"] * (layers // 2) + ["full_attention"] * (layers % 2)
    if name == "gpt_oss":
        d.setdefault("rope_parameters", {"rope_type": "default", "rope_theta": 10000.0})
    return AutoConfig.for_model(name, **d)


def model(name: str, layers: int = 4, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides):
    """A random model in eval mode. float64 models of experts use transformers' eager experts."""
    torch.manual_seed(seed)
    built = AutoModelForCausalLM.from_config(config(name, layers, **overrides)).to(dtype).eval()
    if dtype == torch.float64 and hasattr(built, "set_experts_implementation"):
        built.set_experts_implementation("eager")
    return built


def batch(lengths: list[int], side: str = "left", seed: int = 0) -> dict[str, torch.Tensor]:
    """Random ids with padding on one side: ``input_ids`` and ``attention_mask`` of ``[rows, max(lengths)]``."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.randint(3, VOCABULARY, (len(lengths), width), generator=generator)
    mask = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, n in enumerate(lengths):
        mask[row, width - n :] = 1 if side == "left" else 0
        if side == "right":
            mask[row, :n] = 1
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}
