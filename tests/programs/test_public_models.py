"""Public checkpoints of looped models by remapped tensors, against the public forwards written anew from what they compute."""

import math

import pytest
import torch
import torch.nn.functional as F
from depthpass_lowering.executors.noise import cut_off, noise
from transformers import AutoConfig, AutoModelForCausalLM
from turbos import enliven

import depthpass as dp
from depthpass.errors import CheckpointError

HUGINN = {"n_embd": 24, "n_heads": 3, "intermediate_size": 20, "n_layers_in_prelude": 1, "n_layers_in_recurrent_block": 2,
          "n_layers_in_coda": 1, "mean_recurrence": 3, "block_size": 64, "norm_eps": 1e-6, "rope_base": 50_000.0, "qk_bias": True,
          "bias": False, "init_values": {"std": math.sqrt(2 / (5 * 24)), "embed_scale": math.sqrt(24)}, "pad_token_id": 0}
OURO = {"hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 6, "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "total_ut_steps": 3,
        "pad_token_id": 0}
WORDS = 41
# Stock norms and rotary tables compute in float32 whatever the dtype: hence the tolerance of 1e-4.


def drawn(shapes):
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in shapes.items():
        x = torch.randn(shape, generator=generator, dtype=torch.float64) * (0.3 if len(shape) > 1 else 0.2)
        weights[name] = x + 1 if "norm" in name or "ln_f" in name else x
    return weights


def huginn_tensors():
    w, inner = 24, 20
    shapes = {"transformer.wte.weight": (WORDS, w), "transformer.adapter.weight": (w, 2 * w), "transformer.ln_f.weight": (w,)}
    for part in ("prelude.0", "core_block.0", "core_block.1", "coda.0"):
        at = f"transformer.{part}"
        shapes |= {f"{at}.norm_{i}.weight": (w,) for i in (1, 2, 3, 4)}
        shapes |= {f"{at}.attn.Wqkv.weight": (3 * w, w), f"{at}.attn.qk_bias": (2, 1, 3, 8), f"{at}.attn.proj.weight": (w, w),
                   f"{at}.mlp.fc.weight": (2 * inner, w), f"{at}.mlp.proj.weight": (w, inner)}
    return drawn(shapes)


def ouro_tensors():
    w, inner = 24, 20
    shapes = {"model.embed_tokens.weight": (WORDS, w), "model.norm.weight": (w,), "lm_head.weight": (WORDS, w),
              "model.early_exit_gate.weight": (1, w), "model.early_exit_gate.bias": (1,)}
    for i in range(2):
        at = f"model.layers.{i}"
        shapes |= {f"{at}.{n}.weight": (w,) for n in ("input_layernorm", "input_layernorm_2", "post_attention_layernorm",
                                                      "post_attention_layernorm_2")}
        shapes |= {f"{at}.self_attn.q_proj.weight": (24, w), f"{at}.self_attn.k_proj.weight": (12, w),
                   f"{at}.self_attn.v_proj.weight": (12, w), f"{at}.self_attn.o_proj.weight": (w, 24),
                   f"{at}.mlp.gate_proj.weight": (inner, w), f"{at}.mlp.up_proj.weight": (inner, w),
                   f"{at}.mlp.down_proj.weight": (w, inner)}
    return drawn(shapes)


def rms(x, weight, eps=1e-6):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def angles(tokens, dim, base):
    return torch.outer(torch.arange(tokens).double(), base ** (-torch.arange(0, dim, 2).double() / dim))


def causal(q, k, v):
    """``[heads, tokens, dim]``."""
    score = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
    later = torch.ones(score.shape[1:], dtype=torch.bool).triu(1)
    return torch.softmax(score.masked_fill(later, -math.inf), -1) @ v


def huginn_block(p, at, x):
    """x = n2(x + attn(n1 x)); x = n4(x + mlp(n3 x)); rotary pairs are neighbours, taken as complex numbers."""
    n = len(x)
    q, k, v = (rms(x, p[f"{at}.norm_1.weight"]) @ p[f"{at}.attn.Wqkv.weight"].T).view(n, 3, 3, 8).unbind(1)
    turn = torch.polar(torch.ones(n, 4).double(), angles(n, 8, HUGINN["rope_base"]))[:, None]

    def turned(y, bias):
        pairs = torch.view_as_complex((y + bias[0]).reshape(n, 3, 4, 2).contiguous())
        return torch.view_as_real(pairs * turn).reshape(n, 3, 8)

    q, k = (turned(y, b) for y, b in zip((q, k), p[f"{at}.attn.qk_bias"], strict=True))
    y = causal(*(t.transpose(0, 1) for t in (q, k, v))).transpose(0, 1).reshape(n, 24)
    x = rms(x + y @ p[f"{at}.attn.proj.weight"].T, p[f"{at}.norm_2.weight"])
    first, second = (rms(x, p[f"{at}.norm_3.weight"]) @ p[f"{at}.mlp.fc.weight"].T).split(20, -1)
    return rms(x + (F.silu(first) * second) @ p[f"{at}.mlp.proj.weight"].T, p[f"{at}.norm_4.weight"])


def huginn(p, ids, steps, state):
    e = p["transformer.wte.weight"][ids] * HUGINN["init_values"]["embed_scale"]
    e = huginn_block(p, "transformer.prelude.0", e)
    for _ in range(steps):
        state = torch.cat((state, e), -1) @ p["transformer.adapter.weight"].T
        for j in range(2):
            state = huginn_block(p, f"transformer.core_block.{j}", state)
    x = huginn_block(p, "transformer.coda.0", rms(state, p["transformer.ln_f.weight"]))
    return rms(x, p["transformer.ln_f.weight"]) @ p["transformer.wte.weight"].T


def ouro_block(p, at, x):
    n = len(x)
    h = rms(x, p[f"{at}.input_layernorm.weight"])
    q, k, v = ((h @ p[f"{at}.self_attn.{m}_proj.weight"].T).view(n, -1, 6).transpose(0, 1) for m in "qkv")
    cos, sin = (f(angles(n, 6, OURO["rope_theta"])).repeat(1, 2) for f in (torch.cos, torch.sin))

    def turned(y):
        return y * cos + torch.cat((-y[..., 3:], y[..., :3]), -1) * sin

    y = causal(turned(q), turned(k).repeat_interleave(2, 0), v.repeat_interleave(2, 0)).transpose(0, 1).reshape(n, 24)
    x = x + rms(y @ p[f"{at}.self_attn.o_proj.weight"].T, p[f"{at}.input_layernorm_2.weight"])
    h = rms(x, p[f"{at}.post_attention_layernorm.weight"])
    h = F.silu(h @ p[f"{at}.mlp.gate_proj.weight"].T) * (h @ p[f"{at}.mlp.up_proj.weight"].T)
    return x + rms(h @ p[f"{at}.mlp.down_proj.weight"].T, p[f"{at}.post_attention_layernorm_2.weight"])


def ouro(p, ids):
    """Logits and exit probabilities after every pass of the stack, the final norm in between."""
    x, logits, exits = p["model.embed_tokens.weight"][ids], [], []
    for _ in range(OURO["total_ut_steps"]):
        for i in range(2):
            x = ouro_block(p, f"model.layers.{i}", x)
        x = rms(x, p["model.norm.weight"])
        logits.append(x @ p["lm_head.weight"].T)
        exits.append(torch.sigmoid(x @ p["model.early_exit_gate.weight"].T + p["model.early_exit_gate.bias"]))
    return logits, exits


IDS = torch.tensor([3, 17, 8, 25, 30, 9, 12])


def test_huginn_gives_the_public_numbers():
    p = huginn_tensors()
    start = cut_off(noise(0, torch.arange(7), 24).double(), 3.0) * math.sqrt(2 / 5)
    model = dp.recipes.from_huginn(HUGINN, p)
    assert [o["index"] for o in model.depth_program.visits] == [0, *[1, 2] * 3, 3]       # evaluated at the mean
    with torch.no_grad():
        torch.testing.assert_close(model(IDS[None]).logits[0], huginn(p, IDS, 3, start), rtol=1e-4, atol=1e-4)
        dp.set_loops(model, 5)
        want = huginn(p, IDS, 5, start)
        torch.testing.assert_close(model(IDS[None]).logits[0], want, rtol=1e-4, atol=1e-4)
        cache = dp.DepthCache(model)
        steps = [model(IDS[None, a:b], past_key_values=cache).logits[0] for a, b in ((0, 4), (4, 5), (5, 7))]
        torch.testing.assert_close(torch.cat(steps), want, rtol=1e-4, atol=1e-4)
    zeros = HUGINN | {"init_values": {"std": 0.0, "embed_scale": math.sqrt(24)}}
    fixed = dp.recipes.from_huginn(zeros, p, times=2)
    with torch.no_grad():
        torch.testing.assert_close(fixed(IDS[None]).logits[0], huginn(p, IDS, 2, torch.zeros(7, 24)), rtol=1e-4, atol=1e-4)


def test_ouro_gives_the_public_numbers():
    p = ouro_tensors()
    logits, exits = ouro(p, IDS)
    model = dp.recipes.from_ouro(OURO, p, skip=False, taps=True)
    with torch.no_grad():
        out = model(IDS[None])
    for t in range(3):
        torch.testing.assert_close(out.taps[f"loop.t{t + 1}"][0], logits[t], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(out.taps[f"loop.t{t + 1}.exit"][0], exits[t], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.logits[0], logits[-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("make", "config", "tensors", "name"), [
    (dp.recipes.from_huginn, HUGINN, huginn_tensors, "transformer.coda.0.norm_4.weight"),
    (dp.recipes.from_ouro, OURO, ouro_tensors, "model.layers.1.input_layernorm_2.weight"),
])
def test_checkpoints_that_do_not_fit(make, config, tensors, name):
    whole = tensors()
    for change, message in (
        ({name: None}, f"expected a tensor '{name}'"), ({name: torch.ones(23)}, r"expected shape \(24,\) of"),
        ({"model.more.weight": torch.ones(2)}, "got 'model.more.weight' as well"),
    ):
        given = {n: t for n, t in (whole | change).items() if t is not None}
        with pytest.raises(CheckpointError, match=message):
            make(config, given)


def fully_looped(weights, ids, heads, kv_heads, times, cap):
    """FuRuF-11/FullyLoopedTransformer: every iteration runs on the normed embedding; from the second on, the queries of all
    blocks are those of the normed result of the iteration before."""
    def rms_(x):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def turned(x):
        half = x.shape[-1] // 2
        angle = torch.arange(x.shape[1], dtype=torch.float64)[:, None] * 10000.0 ** (-torch.arange(half) / half)
        a, b, cos, sin = x[..., :half], x[..., half:], angle.cos()[:, None], angle.sin()[:, None]
        return rms_(torch.cat((a * cos + b * sin, b * cos - a * sin), -1))

    def split(x, name, count):
        return (x @ weights[name].T).unflatten(-1, (count, -1))

    first = rms_(weights["model.embed_tokens.weight"][ids])
    state, blocks = None, len({k.split(".")[2] for k in weights if k.startswith("model.layers.")})
    for _ in range(times):
        x = first
        for i in range(blocks):
            at = f"model.layers.{i}.self_attn"
            asking = rms_(x if state is None else state)
            q = turned(split(asking, f"{at}.q_proj.weight", heads)).transpose(1, 2)
            k = turned(split(rms_(x), f"{at}.k_proj.weight", kv_heads)).transpose(1, 2)
            v = split(rms_(x), f"{at}.v_proj.weight", kv_heads).transpose(1, 2)
            seen = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2)
            x = x + seen @ weights[f"{at}.o_proj.weight"].T
            inner = (rms_(x) @ weights[f"model.layers.{i}.mlp.fc1.weight"].T).relu().square()
            x = x + inner @ weights[f"model.layers.{i}.mlp.fc2.weight"].T
        state = rms_(x)
    logits = state @ weights["lm_head.weight"].T
    return torch.tanh(logits / cap) * cap


def test_fully_looped_is_the_public_forward():
    config = AutoConfig.for_model("nanochat", vocab_size=WORDS, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
                                  num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0)
    torch.manual_seed(0)
    stock = enliven(AutoModelForCausalLM.from_config(config).double().eval(), std=0.3)
    model = dp.transform(stock, dp.Loop(times=3, inject="attention", normalize="loop"))
    ids = torch.randint(3, WORDS, (2, 9), generator=torch.Generator().manual_seed(1))
    got = model(ids).logits
    weights = {n: p.detach().clone().requires_grad_() for n, p in stock.named_parameters()}
    want = fully_looped(weights, ids, 4, 2, 3, config.final_logit_softcapping)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    weight = torch.randn(got.shape, generator=torch.Generator().manual_seed(2), dtype=got.dtype)
    (got * weight).sum().backward(), (want * weight).sum().backward()
    for n, p in stock.named_parameters():
        torch.testing.assert_close(p.grad, weights[n].grad, rtol=1e-3, atol=1e-3 * weights[n].grad.abs().max().item())
    cached = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(cached, model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=False))
