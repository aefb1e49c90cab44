"""Small models, samples, and layer programs run by stock code on a stock model whose list of blocks is another one."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 13


def build(kind: str = "llama", blocks: int = 4, **more):
    torch.manual_seed(0)
    config = dict(vocab_size=VOCABULARY, pad_token_id=None, bos_token_id=None, eos_token_id=None)
    if kind == "gpt2":
        config |= dict(n_embd=32, n_layer=blocks, n_head=4, n_positions=16, initializer_range=0.4)
    else:
        config |= dict(hidden_size=32, intermediate_size=48, num_hidden_layers=blocks, num_attention_heads=4,
                       num_key_value_heads=2, head_dim=8, max_position_embeddings=64, initializer_range=0.4)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config | more)).double().eval()


def draw(count: int, seed: int = 1):
    """Prompts of 2 to 6 and answers of 1 and 2 tokens."""
    g = torch.Generator().manual_seed(seed)
    return [(torch.randint(VOCABULARY, (2 + i % 5,), generator=g).tolist(),
             torch.randint(VOCABULARY, (1 + i % 2,), generator=g).tolist()) for i in range(count)]


def reordered(stock, layers):
    """A stock model that runs these blocks. Only without a cache: repeated blocks would share their keys."""
    model = copy.deepcopy(stock)
    decoder, name = (model.transformer, "h") if hasattr(model, "transformer") else (model.model, "layers")
    blocks = getattr(decoder, name)
    setattr(decoder, name, nn.ModuleList([blocks[i] for i in layers]))
    model.config.num_hidden_layers = len(layers)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [stock.config.layer_types[i] for i in layers]
    return model


def say(model, prompt, count):
    """Greedy tokens, without generate and without a cache."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt):]


def answered(stock, count: int, seed: int = 1):
    """The same prompts with the answers of programs that are not the stock one, so that some programs are right."""
    others = [reordered(stock, p) for p in ((0, 1, 1, 2, 3), (0, 2, 3), (0, 1, 2, 3))]
    with torch.no_grad():
        return [(p, say(others[i % 3], p, len(a))) for i, (p, a) in enumerate(draw(count, seed))]


def log_prob(model, prompt, answer) -> float:
    logits = model(input_ids=torch.tensor([[*prompt, *answer]]), use_cache=False).logits[0].log_softmax(-1)
    return sum(float(logits[len(prompt) - 1 + i, a]) for i, a in enumerate(answer))


def is_right(model, prompt, answer) -> float:
    return float(say(model, prompt, len(answer)) == list(answer))


def by_hand(stock, samples, programs, score):
    """The score of every program on every sample."""
    with torch.no_grad():
        return {layers: [score(reordered(stock, layers), p, a) for p, a in samples] for layers in programs}
