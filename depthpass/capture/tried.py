"""Architectures of transformers whose captures were looked at; of any other the transform makes its first capture at once."""

from __future__ import annotations

TRIED = frozenset((
    "afmoe apertus arcee axk1 biogpt bitnet codegen cohere cohere2 cohere2_moe ctrl cwm deepseek_v2 deepseek_v3 diffllama dots1 "
    "ernie4_5 ernie4_5_moe exaone exaone4 exaone_moe flex_olmo gemma gemma2 gemma3_text gemma4_text glm glm4 glm4_moe "
    "glm4_moe_lite gpt2 gpt_bigcode gpt_neox gpt_oss gptj granite granitemoe granitemoeshared helium hunyuan_v1_dense "
    "hunyuan_v1_moe internlm3 llama llama4_text minicpm3 minimax_m2 ministral ministral3 mistral mixtral modernbert-decoder "
    "nanochat nemotron olmo olmo2 olmo3 olmoe opt persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 "
    "solar_open stablelm starcoder2 vaultgemma"
).split())
"""Model types that give their stock numbers with an identity program, padded, packed and token by token."""
