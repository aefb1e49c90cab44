"""Facts of models against the models themselves."""

from __future__ import annotations

import pytest
import torch
import zoo
from transformers import AutoConfig

from depthpass.errors import UnsupportedModelError
from depthpass.hf.facts import model_facts, stock_model


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "phi3", "opt", "mixtral", "gemma3_text", "starcoder2"])
def test_facts_equal_those_of_a_running_model(name: str) -> None:
    """Parameters by counting, keys and values per token from the model's own cache."""
    model = zoo.model(name)
    facts = model_facts(zoo.config(name))
    assert facts.model == type(model).__name__
    assert facts.parameters == sum(p.numel() for p in model.parameters())
    assert (facts.blocks, facts.width, facts.vocabulary) == (4, 32, zoo.VOCABULARY)
    layers = model.get_submodule(facts.layers)
    assert facts.block_parameters == tuple(sum(p.numel() for p in layer.parameters()) for layer in layers)
    with torch.no_grad():
        cache = model(torch.tensor([[3, 4, 5]]), use_cache=True).past_key_values
    kept = tuple((layer.keys[0, :, 0].numel() + layer.values[0, :, 0].numel()) for layer in cache.layers)
    assert facts.kv_widths == kept


def test_dtype_of_the_config() -> None:
    facts = model_facts(zoo.config("llama", dtype="bfloat16"))
    assert (facts.dtype, facts.itemsize, facts.from_config) == ("bfloat16", 2, True)


def test_tied_parameters_count_once() -> None:
    tied = model_facts(zoo.config("llama", tie_word_embeddings=True))
    free = model_facts(zoo.config("llama", tie_word_embeddings=False))
    assert free.parameters - tied.parameters == zoo.VOCABULARY * 32


def test_unknown_head_counts_are_not_guessed() -> None:
    latent = AutoConfig.for_model(
        "deepseek_v3", num_hidden_layers=2, hidden_size=32, intermediate_size=48, moe_intermediate_size=16,
        n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=1, num_attention_heads=4, kv_lora_rank=8,
        q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8, vocab_size=50, first_k_dense_replace=1,
        num_key_value_heads=4,
    )
    assert model_facts(latent).kv_widths is None
    mixed = AutoConfig.for_model(
        "lfm2", num_hidden_layers=4, hidden_size=32, intermediate_size=48, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=50, layer_types=["conv", "full_attention", "conv", "full_attention"],
    )
    assert model_facts(mixed).kv_widths is None


def test_config_models_have_no_storage() -> None:
    model = stock_model({"model_type": "llama", "hidden_size": 8192, "num_hidden_layers": 3, "vocab_size": 128000})
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_models_without_one_list_of_blocks_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="expected a transformers decoder, got Linear"):
        model_facts(torch.nn.Linear(2, 2))
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        model_facts({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "d_model": 16})
