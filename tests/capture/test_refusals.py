"""Models that cannot be treated are refused before any compute, with the layer or op and the reason."""

from __future__ import annotations

import pytest
import torch
import zoo
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

import depthpass as dp
from depthpass.capture import capture
from depthpass.capture.attention import attention_style, capture_attention
from depthpass.capture.explain import dispatches
from depthpass.capture.screen import find_layers
from depthpass.errors import InputError, UnsupportedModelError

BASE = {
    "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}
ITSELF = "computes attention by itself instead of dispatching it through transformers' AttentionInterface"
STATE = "carries a state along the tokens"


def lm(name: str, **fields):
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **fields)).eval()


class Rounds(nn.ModuleList):
    """Blocks that the stock loop over them runs twice."""

    def __getitem__(self, i):
        actual = super().__getitem__(i)
        return [*actual, *actual] if isinstance(i, slice) else actual


def looping():
    built = zoo.model("llama", 2)
    built.model.layers = Rounds(built.model.layers)
    return built


REFUSED = {
    "a model that loops by itself": (looping, ["model.layers to run exactly once", "blocks that ran: [0, 1, 0, 1]", "dp.Loop"]),
    "bloom": (lambda: lm("bloom", vocab_size=97, hidden_size=32, n_layer=1, n_head=4),
              ["BloomForCausalLM", "transformer.h.0.self_attention (BloomAttention)", ITSELF]),
    "mpt": (lambda: lm("mpt", vocab_size=97, d_model=32, n_layers=1, n_heads=4),
            ["transformer.blocks.0.attn (MptAttention)", ITSELF]),
    "gpt_neo": (lambda: lm("gpt_neo", **BASE | {"num_hidden_layers": 1}, attention_types=[[["global"], 1]]),
                ["transformer.h.0.attn.attention (GPTNeoSelfAttention)", ITSELF]),
    "falcon with alibi": (lambda: lm("falcon", **BASE, alibi=True), ["(FalconAttention)", ITSELF]),
    "falcon": (lambda: lm("falcon", **BASE, alibi=False), ["(FalconAttention)", ITSELF]),
    "lfm2": (lambda: lm("lfm2", **BASE | {"num_hidden_layers": 2}, num_key_value_heads=2,
                        layer_types=["conv", "full_attention"]),
             ["model.layers.0.conv (Lfm2ShortConv)", STATE]),
    "granitemoehybrid": (lambda: lm("granitemoehybrid", **BASE, num_key_value_heads=2, num_local_experts=2, mamba_n_heads=4,
                                    num_experts_per_tok=1, layer_types=["mamba"]),
                         ["model.layers.0.mamba (GraniteMoeHybridMambaLayer)", STATE]),
    "deepseek_v4": (lambda: lm("deepseek_v4", **BASE), ["model.layers.0.self_attn.compressor (DeepseekV4HCACompressor)", STATE]),
    "mamba2": (lambda: lm("mamba2", vocab_size=97, hidden_size=32, num_hidden_layers=1, state_size=8, num_heads=4,
                          head_dim=16, n_groups=1),
               ["backbone.layers.0.mixer (Mamba2Mixer)", STATE]),
    "qwen3_next": (lambda: lm("qwen3_next", **BASE, num_key_value_heads=2, head_dim=8, linear_num_value_heads=4,
                              linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8, num_experts=4,
                              num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16,
                              layer_types=["linear_attention"]),
                   ["model.layers.0.linear_attn (Qwen3NextGatedDeltaNet)", STATE]),
    "recurrent_gemma": (lambda: lm("recurrent_gemma", **BASE, num_key_value_heads=1, lru_width=32),
                        ["model.layers.0.temporal_block (RecurrentGemmaRecurrentBlock)", STATE]),
    "minimax": (lambda: lm("minimax", **BASE, num_key_value_heads=2, head_dim=8, num_local_experts=4,
                           layer_types=["linear_attention"]),
                ["model.layers.0.self_attn (MiniMaxLightningAttention)", STATE]),
    "jetmoe": (lambda: lm("jetmoe", **BASE, num_key_value_heads=2, kv_channels=8, num_local_experts=4, num_experts_per_tok=2),
               ["JetMoeTopKGating", "expert_size = gates.long().sum(0)", "reduces over the tokens"]),
    "doge": (lambda: lm("doge", **BASE, num_key_value_heads=2),
             ["model.layers.0.self_attn (DogeAttention)", "modeling_doge.py", "prepare_dynamic_mask",
                                                                         "edits or reads its attention mask"]),
    "t5": (lambda: AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(
        "t5", vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)),
        ["T5ForConditionalGeneration", "encoder-decoder", "Use a decoder-only model"]),
    "bert": (lambda: AutoModel.from_config(AutoConfig.for_model("bert", **BASE)),
             ["BertModel", "its attention is bidirectional (config.is_decoder=False)", "token loop"]),
    "multi-layer perceptron": (lambda: nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)),
                               ["expected a transformers decoder, got Sequential"]),
    "bidirectional llama": (lambda: zoo.model("llama", 1, is_causal=False),
                            ["LlamaForCausalLM", "config.is_causal=False", "bidirectional"]),
    "bidirectional gemma3": (lambda: zoo.model("gemma3_text", 1, use_bidirectional_attention=True),
                             ["lets tokens see later tokens"]),
    "dynamic rope": (
        lambda: zoo.model("llama", 1, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
        ["model.rotary_emb (LlamaRotaryEmbedding)", "'dynamic'", "depends on later tokens", "'yarn'"]),
    "longrope": (
        lambda: zoo.model("phi3", 1, rope_parameters={
            "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
            "original_max_position_embeddings": 64}),
        ["model.rotary_emb (Phi3RotaryEmbedding)", "'longrope'"]),
    "keys of earlier blocks": (lambda: zoo.model("gemma4_text", num_kv_shared_layers=2, layer_types="alternate",
                                                 hidden_size_per_layer_input=0),
                               ["config.num_kv_shared_layers=2", "the last 2 blocks attend to keys and values"]),
    "positions from ids": (lambda: lm("roberta", **BASE, is_decoder=True),
                           ["embeddings (RobertaEmbeddings)", "numbers tokens by what their ids are"]),
    "router logits": (lambda: zoo.model("mixtral", 1, output_router_logits=True), ["output_router_logits=True"]),
    "a window of nothing": (lambda: zoo.model("mistral", 1, sliding_window=0), ["window or chunk of 0 tokens"]),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_by_name(what):
    build, parts = REFUSED[what]
    with pytest.raises(UnsupportedModelError) as error:
        capture(build(), zoo.batch([5, 7]), {})
    message = str(error.value)
    for part in parts:
        assert part in message
    assert "/" not in message.replace("docs/support.md", ""), "no machine paths"
    assert "\n" not in message
    # No call could ever run: known before anything is set up, or by a first capture of an architecture that nobody has tried.
    if {STATE, ITSELF, "bidirectional", "token loop"} & {*parts} or what in (
            "doge", "jetmoe", "keys of earlier blocks", "positions from ids"):
        with pytest.raises(UnsupportedModelError, match=parts[-1]):
            dp.transform(build(), dp.Identity())


def test_positions_computed_from_the_row_ask_for_position_ids():
    batch = zoo.batch([5, 7])
    with pytest.raises(UnsupportedModelError, match=r"prologue.*aten.cumsum.*pass position_ids"):
        capture(zoo.model("opt", 1), batch, {})
    capture(zoo.model("opt", 1), batch | {"position_ids": torch.zeros(2, 7, dtype=torch.long)}, {})


@pytest.mark.parametrize("flag", ["output_attentions", "output_hidden_states", "use_cache"])
def test_flags_that_want_more_than_the_hidden_stream(flag):
    with pytest.raises(UnsupportedModelError, match=f"{flag}=True"):
        capture(zoo.model("llama", 1), zoo.batch([5, 7]), {flag: True})


def test_block_lists():
    built = zoo.model("llama", 2)
    assert find_layers(built) == "model.layers"
    assert find_layers(zoo.model("gpt2", 2)) == "transformer.h"
    built.model.more = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    with pytest.raises(UnsupportedModelError, match=r"expected one list of 2 blocks.*model.layers and model.more"):
        find_layers(built)
    del built.model.more
    built.model.layers = nn.Sequential(*built.model.layers)
    with pytest.raises(UnsupportedModelError, match="found none; module lists of the model: none"):
        find_layers(built)


@pytest.mark.parametrize("style", ["flash_attention_2", "flex_attention", "sdpa_paged", "egaer"])
def test_attention_implementations(style):
    built = zoo.model("llama", 1)
    assert attention_style(built) == "sdpa"
    assert attention_style(zoo.model("gpt_oss", 1)) == "eager"
    built.config._attn_implementation_internal = style
    with pytest.raises(UnsupportedModelError, match=f"'{style}'; expected one of sdpa, eager.*attn_implementation='sdpa'"):
        attention_style(built)
    with pytest.raises(UnsupportedModelError, match=style):
        capture(built, zoo.batch([5, 7]), {})


def test_unknown_attention_arguments_are_refused_not_dropped():
    class SomeAttention(nn.Module):
        is_causal = True

    x = torch.zeros(1, 1, 2, 4)
    with pytest.raises(UnsupportedModelError, match=r"SomeAttention: passes attention arguments.*position_bias"):
        capture_attention(SomeAttention(), x, x, x, torch.ones(1, 2), position_bias=torch.zeros(1))
    with pytest.raises(UnsupportedModelError, match="SomeAttention: expected causal attention"):
        capture_attention(SomeAttention(), x, x, x, torch.ones(1, 2), is_causal=False)
    with pytest.raises(UnsupportedModelError, match="SomeAttention: expected a mask"):
        capture_attention(SomeAttention(), x, x, x, None)


def test_dispatch_through_the_registry_is_seen_in_the_code():
    from transformers.models.bloom.modeling_bloom import BloomAttention
    from transformers.models.llama.modeling_llama import LlamaAttention

    class Derived(LlamaAttention):
        pass

    assert dispatches(LlamaAttention) and dispatches(Derived)
    assert not dispatches(BloomAttention)


class Branching(nn.Module):
    def forward(self, x):
        if x.sum() > 0:
            return x * 2
        return x


class Shared(nn.Module):
    """Keeps its first input, and adds it to the second."""

    def __init__(self, box):
        super().__init__()
        self.box = box

    def forward(self, x):
        self.box.append(x)
        return x + self.box[0]


class Pooling(nn.Module):
    def forward(self, x):
        return x - x.mean(1, keepdim=True)


def patched(*mlps):
    built = zoo.model("llama", 2)
    for layer, mlp in zip(built.model.layers, mlps):
        layer.mlp = mlp
    return built


def test_data_dependent_branches_are_located(capfd):
    with pytest.raises(UnsupportedModelError) as error:
        capture(patched(Branching()), zoo.batch([5, 7]), {})
    message = str(error.value)
    assert "model.layers.0.mlp (Branching), test_refusals.py:" in message
    assert "`if x.sum() > 0:`" in message
    printed = capfd.readouterr()
    assert "def forward" not in printed.out + printed.err, "torch prints the whole graph"


def test_values_that_bypass_the_hidden_stream_are_named():
    box: list = []
    shared = Shared(box)
    with pytest.raises(UnsupportedModelError, match=r"block 0: value '\w+' flows into block 1; only the hidden stream"):
        capture(patched(shared, shared), zoo.batch([5, 7]), {})


def test_a_mixing_layer_in_an_otherwise_stock_model():
    with pytest.raises(UnsupportedModelError) as error:
        capture(patched(nn.Identity(), Pooling()), zoo.batch([5, 7]), {})
    message = str(error.value)
    for part in ("block 1", "model.layers.1.mlp (Pooling)", "aten.mean", "node 'mean", "test_refusals.py:",
                 "x - x.mean(1, keepdim=True)", "reduces over the tokens"):
        assert part in message


def test_inputs_that_do_not_fit():
    built, batch = zoo.model("llama", 1), zoo.batch([5, 7])
    with pytest.raises(InputError, match=r"attention_mask: expected \[batch, tokens\], got shape \(2, 1, 7, 7\)"):
        capture(built, batch | {"attention_mask": torch.ones(2, 1, 7, 7), "input_ids": torch.ones(2, 1).long()}, {})
    with pytest.raises(InputError, match="same number of tokens in every input"):
        capture(built, batch | {"labels": torch.ones(2, 6).long()}, {})
    with pytest.raises(InputError, match=r"labels: expected 2 rows \(or 1 for all of them\), got 3|expected 3 rows"):
        capture(built, batch | {"labels": torch.ones(3, 7).long()}, {})
