"""Checkpoints of published looped models as transformed stock models: which tensor is which, and in which order its rows stand.

A tensor of the public code becomes one of a stock decoder's, or a new parameter of the passes that stand for the rest. Rotary
embeddings of the public code pair neighbouring channels (Huginn) or the two halves of a head (Ouro); the stock host has the
other layout, so rows of queries and keys are put in its order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from depthpass.errors import CheckpointError
from depthpass.hf.transform import transform
from depthpass.passes.base import Pass
from depthpass.passes.loop import Loop
from depthpass.passes.sum_norms import SumNorms


class Tensors:
    """The tensors of a checkpoint, each of which is asked for once."""

    def __init__(self, system: str, given: Mapping[str, Tensor], ignored: tuple[str, ...] = ()):
        self.system, self.given = system, given
        self.left = {n for n in given if not n.endswith(ignored)} if ignored else set(given)

    def __call__(self, name: str, *shape: int) -> Tensor:
        if name not in self.given:
            raise CheckpointError(f"{self.system}: expected a tensor {name!r}, got none. Give the whole state dict of the public "
                                  "model.")
        tensor = self.given[name]
        if tuple(tensor.shape) != shape:
            raise CheckpointError(f"{self.system}: expected shape {shape} of {name!r}, as the config says, got "
                                  f"{tuple(tensor.shape)}.")
        self.left.discard(name)
        return tensor

    def finish(self) -> None:
        """Refuse tensors that nothing was made of."""
        if self.left:
            raise CheckpointError(f"{self.system}: expected the tensors of the public model alone, got {min(self.left)!r} as "
                                  "well.")


def huginn_model(config: Mapping[str, Any], tensors: Mapping[str, Tensor], **options: Any) -> Any:
    """Huginn (``huginn_raven`` of seal-rg/recurrent-pretraining) on a stock Llama.

    Args:
        config: the public config's fields.
        tensors: its state dict.
        options: of :class:`depthpass.Loop`: ``times``, ``exit``, ``criterion``, ``kv``; without ``times`` counts are drawn around
            ``mean_recurrence`` in training, and evaluation runs that many.

    Raises:
        CheckpointError: a tensor is missing, of another shape, or unknown.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    get = Tensors("huginn", tensors, ("freqs_cis", "lm_head.weight"))
    width, inner = config["n_embd"], config["intermediate_size"]
    heads = config.get("n_heads") or config["num_attention_heads"]
    kv, prelude, core, coda = config.get("num_key_value_heads") or heads, *(
        config[f"n_layers_in_{part}"] for part in ("prelude", "recurrent_block", "coda"))
    dim, vocabulary, biased = width // heads, len(tensors.get("transformer.wte.weight", ())), bool(config.get("qk_bias"))
    stock: Any = LlamaForCausalLM(LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=inner, num_hidden_layers=prelude + core + coda,
        num_attention_heads=heads, num_key_value_heads=kv, head_dim=dim, max_position_embeddings=config["block_size"],
        rms_norm_eps=config["norm_eps"], attention_bias=biased, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": float(config["rope_base"])},
        **_special(config),
    ))
    scale = config["init_values"]["embed_scale"]
    words = get("transformer.wte.weight", vocabulary, width)
    weights = {
        "model.embed_tokens.weight": words * scale, "lm_head.weight": tensors.get("lm_head.weight", words),
        "model.norm.weight": get("transformer.ln_f.weight", width),
        "depth.loop.inject.weight": get("transformer.adapter.weight", width, 2 * width),
        "depth.loop.inject.bias": get("transformer.adapter.bias", width) if config.get("bias") else words.new_zeros(width),
    }
    parts = [*(f"prelude.{i}" for i in range(prelude)), *(f"core_block.{i}" for i in range(core)),
             *(f"coda.{i}" for i in range(coda))]
    for i, part in enumerate(parts):
        weights |= _huginn_block(get, f"transformer.{part}", i, (width, inner, heads, kv, dim), biased)
    get.finish()
    mean = config["mean_recurrence"]
    bptt = config.get("mean_backprop_depth", 8)
    drawn = {} if "times" in options else {"times": (1, 4 * mean), "mean": float(mean), "bptt": bptt}
    std = config["init_values"]["std"] * scale
    noise = {"noise_std": std} if std > 0 else {"state": "zeros", "noise_std": 1.0, "noise_cut": None}
    loop = Loop.huginn(prelude, prelude + core, **{**noise, **drawn, **options})
    return _filled(stock.to(words.dtype), [loop, SumNorms(eps=config["norm_eps"])], weights)


def _huginn_block(get: Tensors, at: str, i: int, sizes: tuple[int, ...], biased: bool) -> dict[str, Tensor]:
    """Block i of the stock model, and the gains of its sums."""
    (width, inner, heads, kv, dim), to = sizes, f"model.layers.{i}"
    qkv = get(f"{at}.attn.Wqkv.weight", (heads + 2 * kv) * dim, width)
    q, k, v = qkv.split([heads * dim, kv * dim, kv * dim])
    gate, up = get(f"{at}.mlp.fc.weight", 2 * inner, width).chunk(2)
    weights = {
        f"{to}.self_attn.q_proj.weight": halves_of_pairs(q, dim), f"{to}.self_attn.k_proj.weight": halves_of_pairs(k, dim),
        f"{to}.self_attn.v_proj.weight": v, f"{to}.self_attn.o_proj.weight": get(f"{at}.attn.proj.weight", width, width),
        f"{to}.mlp.gate_proj.weight": gate, f"{to}.mlp.up_proj.weight": up,
        f"{to}.mlp.down_proj.weight": get(f"{at}.mlp.proj.weight", width, inner),
        f"{to}.input_layernorm.weight": get(f"{at}.norm_1.weight", width),
        f"{to}.post_attention_layernorm.weight": get(f"{at}.norm_3.weight", width),
        f"depth.sums.b{i}.attention.weight": get(f"{at}.norm_2.weight", width),
        f"depth.sums.b{i}.ffn.weight": get(f"{at}.norm_4.weight", width),
    }
    if biased:
        bias = get(f"{at}.attn.qk_bias", 2, 1, heads, dim)
        weights |= {f"{to}.self_attn.{n}_proj.bias": halves_of_pairs(b.reshape(-1), dim) for n, b in zip("qk", bias)}
        weights |= {f"{to}.self_attn.{n}_proj.bias": qkv.new_zeros(size) for n, size in (("v", kv * dim), ("o", width))}
    return weights


def ouro_model(config: Mapping[str, Any], tensors: Mapping[str, Tensor], **options: Any) -> Any:
    """Ouro (``ouro`` of ByteDance) on a stock GLM-4, whose blocks have the same four norms.

    Args:
        config: the public config's fields.
        tensors: its state dict.
        options: of :class:`depthpass.Loop`; ``exit=1.0`` runs every iteration.

    Raises:
        CheckpointError: a tensor is missing, of another shape, or unknown.
    """
    from transformers import Glm4Config, Glm4ForCausalLM

    get = Tensors("ouro", tensors, ("rotary_emb.inv_freq", "lm_head.weight"))
    width, inner, layers, heads = (config[n] for n in (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"))
    kv, dim = config.get("num_key_value_heads") or heads, config.get("head_dim") or width // heads
    vocabulary = len(tensors.get("model.embed_tokens.weight", ()))
    theta = (config.get("rope_parameters") or config)["rope_theta"]
    rotary: dict[str, Any] = {"partial_rotary_factor": 1.0}
    stock: Any = Glm4ForCausalLM(Glm4Config(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv, head_dim=dim, max_position_embeddings=config["max_position_embeddings"],
        rms_norm_eps=config["rms_norm_eps"], attention_bias=False, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": float(theta), "partial_rotary_factor": 1.0},
        **_special(config), **rotary,
    ))
    words = get("model.embed_tokens.weight", vocabulary, width)
    weights = {
        "model.embed_tokens.weight": words, "lm_head.weight": tensors.get("lm_head.weight", words),
        "model.norm.weight": get("model.norm.weight", width),
        "depth.loop.exit.weight": get("model.early_exit_gate.weight", 1, width),
        "depth.loop.exit.bias": get("model.early_exit_gate.bias", 1),
    }
    norms = {"input_layernorm": "input_layernorm", "input_layernorm_2": "post_self_attn_layernorm",
             "post_attention_layernorm": "post_attention_layernorm", "post_attention_layernorm_2": "post_mlp_layernorm"}
    for i in range(layers):
        at = f"model.layers.{i}"
        q, k = (pairs_of_halves(get(f"{at}.self_attn.{n}_proj.weight", count * dim, width), dim)
                for n, count in (("q", heads), ("k", kv)))
        gate, up = (get(f"{at}.mlp.{n}_proj.weight", inner, width) for n in ("gate", "up"))
        weights |= {
            f"{at}.self_attn.q_proj.weight": q, f"{at}.self_attn.k_proj.weight": k,
            f"{at}.self_attn.v_proj.weight": get(f"{at}.self_attn.v_proj.weight", kv * dim, width),
            f"{at}.self_attn.o_proj.weight": get(f"{at}.self_attn.o_proj.weight", width, heads * dim),
            f"{at}.mlp.gate_up_proj.weight": torch.cat((gate, up)),
            f"{at}.mlp.down_proj.weight": get(f"{at}.mlp.down_proj.weight", width, inner),
            **{f"{at}.{ours}.weight": get(f"{at}.{theirs}.weight", width) for theirs, ours in norms.items()},
        }
    get.finish()
    loop = Loop(**{"times": config["total_ut_steps"], "normalize": "loop", "exit": 1.0, **options})
    return _filled(stock.to(words.dtype), [loop], weights)


def halves_of_pairs(rows: Tensor, dim: int) -> Tensor:
    """Rows of heads whose rotary pairs are neighbours, with the first of every pair in the first half of its head."""
    heads = rows.unflatten(0, (-1, dim // 2, 2))
    return heads.transpose(1, 2).flatten(0, 2)


def pairs_of_halves(rows: Tensor, dim: int) -> Tensor:
    """The other way round."""
    heads = rows.unflatten(0, (-1, 2, dim // 2))
    return heads.transpose(1, 2).flatten(0, 2)


def _special(config: Mapping[str, Any]) -> dict[str, Any]:
    """Tokens with a meaning of their own, as far as a config names them."""
    return {n: config.get(n) for n in ("pad_token_id", "bos_token_id", "eos_token_id")}


def _filled(stock: Any, spec: list[Pass], weights: dict[str, Tensor]) -> Any:
    model = transform(stock.eval(), spec)
    missing, extra = model.load_state_dict(weights, strict=False)
    if missing or extra:
        raise CheckpointError(f"expected a value for every parameter, got none for {missing} and unknown ones {extra}.")
    return model
