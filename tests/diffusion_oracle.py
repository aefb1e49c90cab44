"""Stock models under explicit masks: what masked and block diffusion compute, written down without depthpass."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def visible(seen, window=None, chunk=None, block=None, ahead=True):
    """``[rows, tokens, tokens]``: which keys each token sees; pads see themselves, so that nothing is NaN."""
    rows, n = seen.shape
    actual = torch.zeros(rows, n, n, dtype=torch.bool)
    for r in range(rows):
        start = int(seen[r].long().argmax())
        for q in range(n):
            for k in range(n):
                ok = bool(seen[r, k])
                if not ahead:
                    ok &= k <= q
                elif block is not None:
                    ok &= (k - start) // block <= (q - start) // block
                if window is not None:
                    ok &= abs(q - k) < window
                if chunk is not None:
                    ok &= (k - start) // chunk == (q - start) // chunk
                actual[r, q, k] = ok or k == q
    return actual


def bias(actual, dtype):
    return torch.zeros(actual.shape, dtype=dtype).masked_fill(~actual, torch.finfo(dtype).min)[:, None]


def logits(model, seen, block=None, window=None, **inputs):
    """A stock model on whole rows under the mask of :func:`visible`, the same for every layer."""
    tokens = next(iter(inputs.values()))
    at = torch.arange(tokens.shape[1])[None].expand(len(tokens), -1)
    mask = bias(visible(seen, window=window, block=block), next(model.parameters()).dtype)
    return model(attention_mask=mask, position_ids=at, use_cache=False, **inputs).logits


def elbo(model, ids, masked, weight, mask_token, may, block=None):
    """The loss of one draw of noise: whole rows, or one row of clean blocks and a noised one for every block."""
    total, n = 0.0, ids.shape[1]
    size = n if block is None else block
    for start in range(0, n, size):
        end = min(n, start + size)
        x = ids[:, :end].clone()
        x[:, start:end] = torch.where(masked[:, start:end], mask_token, ids[:, start:end])
        out = logits(model, torch.ones_like(x), block, input_ids=x)[:, start:end]
        out = out.clone()
        out[..., mask_token] = float("-inf")
        each = F.cross_entropy(out.transpose(1, 2), ids[:, start:end], reduction="none")
        total = total + (torch.where(masked[:, start:end], each, 0.0) * weight[:, start:end]).sum()
    return total / may.sum()


def denoise(model, prompts, new, steps, mask_token, order, block=None):
    """Row by row, whole rows at every step: the most confident (or leftmost, or least uncertain) masks first."""
    rows = []
    for prompt in prompts:
        x = list(prompt) + [mask_token] * new
        start = 0 if block is None else len(prompt) - len(prompt) % block
        while start < len(x):
            end = len(x) if block is None else min(len(x), start + block)
            todo = [i for i in range(start, end) if x[i] == mask_token and i >= len(prompt)]
            rounds = min(steps, len(todo))
            for s in range(rounds):
                row = torch.tensor([x[:end]])
                p = logits(model, torch.ones_like(row), block, input_ids=row)[0]
                p[:, mask_token] = float("-inf")
                p = p.softmax(-1)
                scores = {i: _score(order, p[i], i) for i in todo}
                count = -(-len(todo) // (rounds - s))
                chosen = sorted(todo, key=lambda i: (-scores[i], i))[:count]
                for i in chosen:
                    x[i] = int(p[i].argmax())
                todo = [i for i in todo if i not in chosen]
            start = end
        rows.append(x)
    return rows


def _score(order, p, place):
    best = sorted(p.tolist(), reverse=True)
    return {"confidence": best[0], "margin": best[0] - best[1], "left": -place,
            "entropy": sum(a * math.log(a) for a in best if a > 0)}[order]
