"""Models whose cost the tests know by hand."""

from __future__ import annotations

from functools import cache

import torch
import zoo
from transformers import LlamaConfig, LlamaForCausalLM

from depthpass.analysis.cost import ModelCost, model_cost


def llama_on_meta(*, dtype: torch.dtype = torch.bfloat16, **sizes) -> LlamaForCausalLM:
    """A Llama of the given sizes without weights."""
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**sizes)).to(dtype)


@cache
def llama_1b() -> ModelCost:
    """The shape of Llama-3.2-1B: 1,235,814,400 parameters."""
    return model_cost(llama_on_meta(
        num_hidden_layers=16, hidden_size=2048, intermediate_size=8192, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256, tie_word_embeddings=True,
    ))


@cache
def llama_162m() -> ModelCost:
    """Inner Thinking's LLaMA-2 162M: 8 layers of width 1024, 32,000 words, untied; 2560 inside gives 162.0M."""
    return model_cost(llama_on_meta(
        num_hidden_layers=8, hidden_size=1024, intermediate_size=2560, num_attention_heads=16, num_key_value_heads=16,
        vocab_size=32000, tie_word_embeddings=False,
    ))


@cache
def tiny(name: str = "llama", layers: int = 4, **overrides) -> ModelCost:
    """A random small model of any architecture (tests/zoo.py)."""
    return model_cost(zoo.model(name, layers, **overrides))
