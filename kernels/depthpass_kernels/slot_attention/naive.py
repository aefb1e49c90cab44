"""Slot attention in plain torch: the reference of the kernel, and what runs on the CPU.

Dense, in the accumulation dtype (float32, or float64 for float64 inputs). `forward` is differentiable as it
stands; `backward` is the hand-written gradient that the registered op uses, so the two check each other.
`chunk_forward` and `chunk_backward` are the same in fewer ops, for the plain case of a token loop.
"""


import torch
from torch import Tensor

from depthpass_kernels.operands import accumulation_dtype
from depthpass_kernels.select import remembered
from depthpass_kernels.slot_attention.problem import Problem

NEVER = float("-inf")


def visibility(problem: Problem, low: int, high: int) -> Tensor:
    """Return the boolean mask [B or 1, C, high - low] of which key columns each query column sees."""
    p = problem
    start = p.q_start if p.q_offset is None else p.q_start + p.q_offset.reshape(())
    i = (start + torch.arange(p.q.shape[2], device=p.q.device))[None, :, None]
    j = torch.arange(low, high, device=p.q.device)[None, None, :]
    mask = j <= i
    if p.window is not None:
        mask = mask & (i - j < p.window)
    if p.chunk is not None:
        origin = 0 if p.row_start is None else p.row_start[:, None, None]
        mask = mask & (_chunk_index(j, origin, p.chunk) == _chunk_index(i, origin, p.chunk))
    return mask if p.valid is None else mask & p.valid[:, None, low:high]


def _chunk_index(column: Tensor, origin: Tensor | int, chunk: int) -> Tensor:
    return torch.div(column - origin, chunk, rounding_mode="floor")


def key_span(problem: Problem) -> tuple[int, int]:
    """Return the half-open range of keys that some query may see; all of them when the start is a tensor."""
    p = problem
    if p.q_offset is not None:
        return 0, p.k.shape[2]
    reach = [r for r in (p.window, p.chunk) if r is not None]
    return (max(0, p.q_start - min(reach) + 1) if reach else 0), p.q_start + p.q.shape[2]


def every_key_is_seen(problem: Problem) -> bool:
    """Whether each key of the span is seen by some query, so that none has to be hidden from the products."""
    return problem.valid is None and problem.chunk is None and problem.q_offset is None


class _Scores:
    """Operands in the accumulation dtype, grouped by key head, and their masked logits [B, Hkv, G, C, N']."""

    def __init__(self, problem: Problem) -> None:
        p = problem
        acc = accumulation_dtype(p.q.dtype)
        self.group = p.group
        self.span = low, high = key_span(p)
        mask = visibility(p, low, high)
        self.k, self.v = p.k[:, :, low:high].to(acc), p.v[:, :, low:high].to(acc)
        if not every_key_is_seen(problem):
            # What no query sees may be uninitialised memory, and 0 * NaN would leak it.
            seen = mask.any(1)[:, None, :, None]
            self.k, self.v = torch.where(seen, self.k, 0), torch.where(seen, self.v, 0)
        # The scale goes to the short side of the product.
        self.q = self.fold(p.q.to(acc) * p.scale)
        logits = per_key_head(self.q, self.k.mT)
        self.slope = None
        if p.softcap is not None:
            squashed = torch.tanh(logits / p.softcap)
            self.slope, logits = 1 - squashed * squashed, p.softcap * squashed
        self.logits = logits.masked_fill(~mask[:, None, None], NEVER)

    def fold(self, x: Tensor) -> Tensor:
        """[B, Hq, ...] -> [B, Hkv, G, ...]."""
        return x.unflatten(1, (-1, self.group))


def per_key_head(a: Tensor, b: Tensor) -> Tensor:
    """[B, Hkv, G, C, X] @ [B, Hkv, X, Y] -> [B, Hkv, G, C, Y]."""
    return (a.flatten(2, 3) @ b).unflatten(2, a.shape[2:4])


def over_queries(a: Tensor, b: Tensor) -> Tensor:
    """Contract the queries of a key head: [B, Hkv, G, C, X], [B, Hkv, G, C, Y] -> [B, Hkv, X, Y]."""
    return a.flatten(2, 3).mT @ b.flatten(2, 3)


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """Return out [B, Hq, C, Dv] and the log-sum-exp [B, Hq, C] (sinks included; -inf where it is empty)."""
    s = _Scores(problem)
    if problem.sinks is None and every_key_is_seen(problem):
        # Every query sees its own key at least: no denominator is empty.
        lse = torch.logsumexp(s.logits, -1, keepdim=True)
        out = per_key_head(torch.exp(s.logits - lse), s.v)
        return out.flatten(1, 2).to(problem.q.dtype), lse.squeeze(-1).flatten(1, 2)
    top = s.logits.amax(-1, keepdim=True)
    sink = None
    if problem.sinks is not None:
        sink = problem.sinks.to(top.dtype).view(1, -1, s.group, 1, 1)
        top = torch.maximum(top, sink)
    top = torch.where(top == NEVER, 0, top).detach()
    weights = torch.exp(s.logits - top)
    total = weights.sum(-1, keepdim=True)
    if sink is not None:
        total = total + torch.exp(sink - top)
    safe = torch.where(total == 0, 1, total)
    out = per_key_head(weights, s.v) / safe
    lse = torch.where(total == 0, NEVER, top + torch.log(safe))
    return out.flatten(1, 2).to(problem.q.dtype), lse.squeeze(-1).flatten(1, 2)


def backward(
    problem: Problem, grad: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, tuple[int, int]]:
    """Return dq, dk, dv, dsinks (or None) in the accumulation dtype, and the key range that dk and dv cover.

    With p = exp(logit - lse) and delta = sum(grad * out): dv = pᵀ grad, dlogit = p (grad vᵀ - delta).
    """
    s = _Scores(problem)
    finite = lse if problem.valid is None else torch.where(lse == NEVER, 0, lse)
    p = torch.exp(s.logits - s.fold(finite)[..., None])
    grad = s.fold(grad.to(lse.dtype))
    delta = (grad * s.fold(out.to(lse.dtype))).sum(-1, keepdim=True)
    dlogits = p * (per_key_head(grad, s.v.mT) - delta)
    if s.slope is not None:
        dlogits = dlogits * s.slope
    dq = per_key_head(dlogits, s.k) * problem.scale
    dk = over_queries(dlogits, s.q)
    dv = over_queries(p, grad)
    dsinks = None
    if problem.sinks is not None:
        dsinks = sink_gradient(problem.sinks, lse, delta.squeeze(-1).flatten(1, 2))
    return dq.flatten(1, 2), dk, dv, dsinks, s.span


def is_plain(problem: Problem) -> bool:
    """Whether nothing but order and window says what is seen, and nothing changes the logits."""
    return every_key_is_seen(problem) and problem.sinks is None and problem.softcap is None


class _Chunk:
    """Operands of a plain problem by key head, [B·Hkv, rows, width], and its logits; queries of a head below one another."""

    def __init__(self, problem: Problem) -> None:
        p = problem
        acc = accumulation_dtype(p.q.dtype)
        self.span = low, high = key_span(p)
        self.count, self.shape = p.q.shape[2], p.q.shape[:2]
        self.q = self.rows(p.q.to(acc), p)
        self.k, self.v = (t[:, :, low:high].to(acc).flatten(0, 1) for t in (p.k, p.v))
        # The scale goes to the short side of the product.
        self.scaled = self.q * p.scale
        self.logits = torch.bmm(self.scaled, self.k.mT)
        if self.count > 1:
            # Only the chunk's own keys can be ahead of a query, and only the first ones too far back.
            self.logits[:, :, -self.count :].add_(_ahead(self.count, p.group, acc, p.q.device))
            if p.window is not None and (reach := p.q_start - p.window - low) > -self.count:
                self.logits[:, :, : self.count].add_(_behind(self.count, p.group, reach, acc, p.q.device))

    def rows(self, x: Tensor, problem: Problem) -> Tensor:
        return x.reshape(problem.q.shape[0] * problem.k.shape[1], problem.group * self.count, x.shape[-1])

    def heads(self, x: Tensor) -> Tensor:
        return x.reshape(*self.shape, self.count, x.shape[-1])


@remembered(64)
def _ahead(count: int, group: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What hides later keys of the own chunk, [group * count, count]."""
    return torch.full((count, count), NEVER, dtype=dtype, device=device).triu_(1).repeat(group, 1)


@remembered(64)
def _behind(count: int, group: int, reach: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What hides keys that a window has passed: key t of the span from query c with t <= c + reach."""
    hidden = torch.ones(count, count, dtype=torch.bool, device=device).tril(reach)
    return torch.zeros(count, count, dtype=dtype, device=device).masked_fill_(hidden, NEVER).repeat(group, 1)


def chunk_forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """As `forward`, for a plain problem and without gradient."""
    c = _Chunk(problem)
    lse = torch.logsumexp(c.logits, -1, keepdim=True)
    out = torch.bmm(c.logits.sub_(lse).exp_(), c.v)
    return c.heads(out), c.heads(lse).squeeze(-1)


def chunk_backward(problem: Problem, grad: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor, tuple[int, int]]:
    """As `backward`, for a plain problem: dq, dk, dv and the key range that dk and dv cover."""
    c = _Chunk(problem)
    grad, out = (c.rows(t.to(lse.dtype), problem) for t in (grad, out))
    p = c.logits.sub_(c.rows(lse[..., None], problem)).exp_()
    dlogits = torch.bmm(grad, c.v.mT).sub_((grad * out).sum(-1, keepdim=True)).mul_(p)
    dq = torch.bmm(dlogits, c.k).mul_(problem.scale)
    per_head = problem.k.shape[:2]
    dk, dv = (torch.bmm(a.mT, b).unflatten(0, per_head) for a, b in ((dlogits, c.scaled), (p, grad)))
    return c.heads(dq), dk, dv, c.span


def sink_gradient(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """Return dsinks [Hq] from sinks [Hq], lse and delta [B, Hq, C].

    The value vector of a sink is zero, which leaves -p_sink * delta.
    """
    share = torch.exp(sinks.to(lse.dtype)[None, :, None] - torch.where(lse == NEVER, 0, lse))
    return -(share * delta).sum((0, 2))
