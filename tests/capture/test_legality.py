"""Token-local or not: small modules, exported and checked; what mixes tokens is refused by the op's name."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from depthpass.capture.functional import functionalise
from depthpass.capture.legality import check_token_local
from depthpass.errors import UnsupportedModelError

# Bounds that torch.export itself asks for in some of the cases below.
BATCH, TOKENS = torch.export.Dim("batch", min=3), torch.export.Dim("tokens", min=4, max=60)
WIDTH = 12


class Calls(nn.Module):
    """A module whose forward is a function of itself and its inputs."""

    def __init__(self, fn, **parts):
        super().__init__()
        self.fn = fn
        for name, part in parts.items():
            if isinstance(part, nn.Module):
                self.add_module(name, part)
            else:
                self.register_parameter(name, nn.Parameter(part, requires_grad=part.is_floating_point()))

    def forward(self, *inputs):
        return self.fn(self, *inputs)


def check(fn, *more, **parts):
    """Check ``fn(module, x, *more)`` on x ``[batch, tokens, WIDTH]``; every ``more`` has tokens in dimension 1."""
    inputs = (torch.randn(3, 7, WIDTH), *more)
    dims = tuple({0: BATCH, 1: TOKENS} if t.shape[0] == 3 else {1: TOKENS} for t in inputs)
    program = torch.export.export(Calls(fn, **parts), inputs, dynamic_shapes=(dims,), strict=False,
                                  prefer_deferred_runtime_asserts_over_guards=True)  # torch 2.11 guards on strides, for all n
    functionalise(program.graph_module)
    given = program.graph_signature.user_inputs
    x = next(n for n in program.graph.nodes if n.name == given[0])
    batch, tokens = (s.node.expr for s in x.meta["val"].shape[:2])
    nodes = [n for n in program.graph.nodes if n.op != "placeholder"]
    return check_token_local(nodes, batch, tokens, "block 0")


MIXING = {
    "mean over tokens": (lambda m, x: x - x.mean(1, keepdim=True), "aten.mean", "reduces over the tokens"),
    "sum of everything": (lambda m, x: x * x.sum(), "aten.sum", "reduces over the tokens|rows"),
    "batch statistics": (lambda m, x: x - x.mean(0, keepdim=True), "aten.mean", "reduces over the rows"),
    "softmax over tokens": (lambda m, x: x.softmax(1), "aten.softmax", "takes a softmax over the tokens"),
    "cumsum": (lambda m, x: x.cumsum(1), "aten.cumsum", "accumulates along the tokens"),
    "flip": (lambda m, x: x.flip(1), "aten.flip", "reverses the tokens"),
    "roll": (lambda m, x: x.roll(1, 1), "aten.roll", "rotates the tokens"),
    "sort": (lambda m, x: x.sort(1).values, "aten.sort", "ranks the tokens"),
    "topk over tokens": (lambda m, x: x.topk(1, 1).values, "aten.topk", "ranks the tokens"),
    "max over tokens": (lambda m, x: x + x.amax(1, keepdim=True), "aten.amax", "reduces over the tokens"),
    "shift by slices": (
        lambda m, x: x + F.pad(x, (0, 0, 1, 0))[:, :-1], "aten.pad|aten.constant_pad_nd", "pads the tokens"
    ),
    "later tokens by a slice": (lambda m, x: x[:, 1:], "aten.slice", "shifts or picks the tokens"),
    "every second token": (lambda m, x: x[:, ::2], "aten.slice", "shifts or picks the tokens"),
    "last token": (lambda m, x: x + x[:, -1:], "aten.slice", "shifts or picks the tokens"),
    "one token": (lambda m, x: x + x[:, 0][:, None], "aten.select", "picks one of the tokens"),
    "concatenation along tokens": (
        lambda m, x: torch.cat((x, x), 1), "aten.cat", "joins along the tokens"
    ),
    "prefix tokens": (
        lambda m, x: torch.cat((m.p.expand(x.shape[0], -1, -1), x), 1), "aten.cat", "joins along the tokens"
    ),
    "pairs of tokens": (
        lambda m, x: x @ x.transpose(1, 2), "aten.matmul", r"multiplies tokens with tokens.*AttentionInterface"
    ),
    "pairs by einsum": (
        lambda m, x: torch.einsum("bsd,btd->bst", x, x), "aten.einsum", "multiplies tokens with tokens"
    ),
    "pairs under an ellipsis": (
        lambda m, x: torch.einsum("bs...,bt...->bst...", x, x), "aten.einsum", "multiplies tokens with tokens"
    ),
    "a sum that an ellipsis hides": (lambda m, x: torch.einsum("...sd->...d", x), "aten.einsum", "sums over the tokens"),
    "pairs by broadcasting": (
        lambda m, x: (x[:, :, None] - x[:, None]).amax(-1), "aten.sub", "pairs of tokens"
    ),
    "weights over tokens": (
        lambda m, x: (x.transpose(1, 2) @ x), "aten.matmul", "sums over the tokens"
    ),
    "own attention": (
        lambda m, x: F.scaled_dot_product_attention(x, x, x, is_causal=True), "aten.scaled_dot_product_attention",
        "attends over the tokens by itself",
    ),
    "view mixing tokens and channels": (
        lambda m, x: x.transpose(1, 2).flatten().view(x.shape), "aten.view", "tears tokens apart or mixes them with channels"
    ),
    "view mixing rows and tokens": (
        lambda m, x: x.reshape(x.shape[1], x.shape[0], WIDTH), "aten.reshape", "tears tokens apart"
    ),
    "transposed flattening": (
        lambda m, x: x + x.transpose(0, 1).reshape(-1, WIDTH).reshape(x.shape), "aten.reshape", "tears tokens apart"
    ),
    "scaling by the number of tokens": (
        lambda m, x: x * x.shape[1], "aten.mul", "computes with the number of tokens"
    ),
    "scaling by the log of the number": (
        lambda m, x: x / torch.full((1,), float(2)) * torch.sym_float(x.shape[1]), "aten.mul", "number of tokens"
    ),
    "a constant of the number of tokens": (
        lambda m, x: x + torch.full((1, 1, 1), x.shape[1]), "aten.full", "computes with the number of tokens"
    ),
    "scaling by the number of rows": (lambda m, x: x * x.shape[0], "aten.mul", "computes with the number of rows"),
    "grid over the call": (
        lambda m, x: x * torch.linspace(0, x.shape[1], WIDTH), "aten.linspace", "computes with the number of tokens"
    ),
    "indices from one": (
        lambda m, x: x + torch.arange(1, x.shape[1] + 1)[None, :, None], "aten.arange", "numbers the tokens"
    ),
    "first entries of a table": (
        lambda m, x: x + m.table[: x.shape[1]], "aten.slice", "takes the first entries of a table"
    ),
    "gather along tokens": (
        lambda m, x: x.gather(1, x.argsort(-1)), "aten.gather", "gathers from the tokens"
    ),
    "index by token": (lambda m, x: x[:, m.index], "aten.index", "picks by index among the tokens"),
    "data-dependent selection": (
        lambda m, x: x.new_zeros(()) + x[x[..., 0] > 0].sum(), "aten.index", "keeps the entries where a mask is true"
    ),
    "scatter among tokens": (
        lambda m, x: torch.zeros_like(x).scatter(1, x.argsort(-1), x), "aten.scatter", "scatters among the tokens"
    ),
    "norm over tokens": (
        lambda m, x: F.group_norm(x, 1), "aten.group_norm", "normalises over the tokens"
    ),
    "one channel statistics": (
        lambda m, x: F.batch_norm(x.transpose(1, 2), None, None, training=True), "batch_norm",
        "takes statistics over rows and tokens|is not known",
    ),
    "unfolding": (lambda m, x: F.pad(x, (0, 0, 2, 0)).unfold(1, 3, 1), "pad", "pads the tokens"),
    "a lone token's dimension": (
        lambda m, x: x.squeeze(1).reshape(x.shape), "aten.squeeze", "would drop, when there is only one"
    ),
    "an op without a rule": (lambda m, x: torch.fft.fft2(x).real, "aten.fft_fft2", "is not known to be token-local"),
    "fourier over tokens": (lambda m, x: torch.fft.fft(x, dim=1).real, "fft", "transforms the tokens"),
}


@pytest.mark.parametrize("what", MIXING)
def test_mixing_is_refused_by_name(what):
    fn, op, reason = MIXING[what]
    parts = {"p": torch.randn(1, 2, WIDTH), "table": torch.randn(64, WIDTH), "index": torch.tensor([1, 0])}
    with pytest.raises(UnsupportedModelError, match=reason) as error:
        check(fn, **parts)
    message = str(error.value)
    assert message.startswith("block 0: ")
    assert any(f"{o}" in message for o in op.split("|")), message
    assert "test_legality.py" in message, "names the source line"
    assert "/" not in message.split("test_legality.py")[0].split("node")[-1], "only the base name of the file"


@pytest.mark.parametrize("padding", [2, "same"])
def test_a_convolution_over_tokens(padding):
    conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=padding, groups=WIDTH)
    with pytest.raises(UnsupportedModelError, match=r"conv \(Conv1d\), aten.conv1d .*convolves over the tokens"):
        check(lambda m, x: m.conv(x.transpose(1, 2)).transpose(1, 2), conv=conv)


def heads(x, n=3):
    return x.view(*x.shape[:2], n, -1).transpose(1, 2)


def norm_per_head(m, x):
    y = heads(x)
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
    return y.transpose(1, 2).reshape(x.shape)


def rotate(m, x, cos):
    y = heads(x)
    half = torch.cat((-y[..., 2:], y[..., :2]), -1)
    return (y * cos[:, None] + half * cos[:, None]).transpose(1, 2).flatten(2)


def pick_experts(m, x):
    """Dense mixture of experts: every expert on every token, weighted by a top-2 softmax."""
    flat = x.view(-1, WIDTH)
    score, index = flat.matmul(m.router).softmax(-1).topk(2, -1)
    weights = torch.zeros(flat.shape[0], 4).scatter(1, index, score / score.sum(-1, keepdim=True))
    each = torch.einsum("td,edf->tef", flat, m.experts)
    return (each * weights[..., None]).sum(1).view(x.shape)


def loop_over_experts(m, x):
    """Llama 4's layout: tokens repeated once per expert, experts as the batch of one product."""
    flat = x.reshape(-1, WIDTH)
    score = torch.sigmoid(flat @ m.router)
    routed = flat.repeat(4, 1) * score.transpose(0, 1).reshape(-1, 1)
    out = torch.bmm(routed.view(4, -1, WIDTH), m.experts)
    total = flat * 0
    total.add_(out.reshape(4, -1, WIDTH).sum(0))
    return total.view(x.shape)


def write_halves(m, x):
    """Two writes into slices of a new tensor."""
    out = x.new_empty(*x.shape)
    out[..., :5].copy_(x[..., 7:])
    out[..., 5:] = x[..., :7] * 2
    return out


LEGAL = {
    "mlp": lambda m, x: F.linear(F.gelu(F.linear(x, m.up)), m.up.T),
    "gated mlp": lambda m, x: F.silu(x @ m.square) * (x @ m.square),
    "glu over channels": lambda m, x: F.glu(F.linear(x, m.up)),
    "chunk of channels": lambda m, x: torch.mul(*F.linear(x, m.up).chunk(2, -1)),
    "split of channels": lambda m, x: x.split([4, 8], -1)[1].relu(),
    "layer norm": lambda m, x: F.layer_norm(x, (WIDTH,), m.scale, m.scale),
    "rms norm": lambda m, x: F.rms_norm(x, (WIDTH,), m.scale),
    "norm per head": norm_per_head,
    "dense mixture of experts": pick_experts,
    "experts as a batch": loop_over_experts,
    "writes into slices": write_halves,
    "addmm on flattened tokens": lambda m, x: torch.addmm(m.scale, x.view(-1, WIDTH), m.square).view(x.shape),
    "tokens before rows": lambda m, x: x.transpose(0, 1).contiguous().view(x.shape[1], x.shape[0], 3, 4).flatten(2)
    .transpose(0, 1),
    "pointwise convolution": lambda m, x: F.conv1d(x.transpose(1, 2), m.square[:, :, None]).transpose(1, 2),
    "convolution over channels": lambda m, x: F.conv1d(x.reshape(-1, 1, WIDTH), m.kernel, padding=1).view(x.shape),
    "einsum": lambda m, x: torch.einsum("bsd,de->bse", x, m.square),
    "einsum with an ellipsis": lambda m, x: torch.einsum(
        "...rk, rkc -> ...rc", x.unflatten(-1, (2, 6)), m.square.view(2, 6, 12)).sum(-2),
    "a Fourier transform of channels": lambda m, x: torch.fft.irfft(torch.fft.rfft(x) * m.angle.sum(), n=WIDTH) + torch.fft.ifft(
        torch.fft.fft(x, dim=-1) * m.scale).real,
    "einsum without a result": lambda m, x: torch.einsum("dxy,ed", x.permute(2, 0, 1), m.square).permute(1, 2, 0),
    "table by position": lambda m, x: x + m.table[torch.arange(x.shape[1])][None],
    "embedding of positions": lambda m, x: x + F.embedding(torch.arange(x.shape[1])[None], m.table),
    "constant for every token": lambda m, x: x + torch.ones(x.shape[0], x.shape[1], 1),
    "constant for flattened tokens": lambda m, x: (
        x.view(-1, WIDTH) + torch.zeros(x.shape[0] * x.shape[1], WIDTH)
    ).view(x.shape),
    "repeated heads": lambda m, x: heads(x).repeat_interleave(2, 1).transpose(1, 2).flatten(2)[..., :WIDTH],
    "expanded heads": lambda m, x: heads(x)[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2).amax(1).repeat(1, 1, 3),
    "sums and softmax over channels": lambda m, x: x.softmax(-1) * x.sum(-1, keepdim=True) + x.cumsum(-1),
    "sorted channels": lambda m, x: x.sort(-1).values.flip(-1).roll(1, -1),
    "padded channels": lambda m, x: F.pad(x, (1, 1))[..., 1:-1],
    "complex pairs": lambda m, x: torch.view_as_real(
        torch.view_as_complex(x.view(*x.shape[:2], -1, 2)) * torch.polar(m.angle, m.angle)
    ).flatten(2),
    "dropout": lambda m, x: F.dropout(x, 0.5, training=True),
    "masked": lambda m, x: torch.where(x > 0, x, 0.0).masked_fill(x < -1, -1.0).clamp(-1, 1),
    "functions of constants": lambda m, x: x + torch.linalg.matrix_exp(m.square).sum() + m.table.mean(0),
    "the same tensor twice": lambda m, x: torch.stack((x, x), -1).mean(-1) + torch.cat((x, x), -1)[..., :WIDTH],
}


@pytest.mark.parametrize("what", LEGAL)
def test_token_local_ops_are_accepted(what):
    torch.manual_seed(0)
    parts = {
        "up": torch.randn(2 * WIDTH, WIDTH), "square": torch.randn(WIDTH, WIDTH), "scale": torch.randn(WIDTH),
        "router": torch.randn(WIDTH, 4), "experts": torch.randn(4, WIDTH, WIDTH), "kernel": torch.randn(1, 1, 3),
        "table": torch.randn(64, WIDTH), "angle": torch.rand(WIDTH // 2),
    }
    check(LEGAL[what], **parts)
    if what in ("dropout", "table by position", "embedding of positions"):
        return
    # They are what they are said to be: a chunk of rows and tokens gives that chunk of the result.
    module, x = Calls(LEGAL[what], **parts), torch.randn(3, 7, WIDTH)
    torch.testing.assert_close(module(x)[1:2, 2:5], module(x[1:2, 2:5]), rtol=1e-4, atol=1e-4)


def test_a_side_input_is_lined_up_by_token():
    check(rotate, torch.randn(1, 7, 4))
    check(rotate, torch.randn(3, 7, 4))


@torch.no_grad()
def test_graphs_without_gradient_are_followed():
    def table(m, x):
        with torch.no_grad():
            angle = torch.outer(torch.arange(4).float(), m.scale).sum(0)
        return x * angle

    def mixing(m, x):
        with torch.no_grad():
            y = x.cumsum(1)
        return x * y

    def numbered(m, x):
        with torch.no_grad():
            y = torch.arange(x.shape[1])
        return x * y[None, :, None]

    with torch.enable_grad():
        check(table, scale=torch.randn(WIDTH))
        with pytest.raises(UnsupportedModelError, match="accumulates along the tokens"):
            check(mixing)
        # Inside, indices cannot be replaced by the columns of the call.
        with pytest.raises(UnsupportedModelError, match="numbers the tokens"):
            check(numbered)


def test_a_fixed_number_of_tokens_is_refused():
    program = torch.export.export(Calls(lambda m, x: x * 2), (torch.randn(3, 7, WIDTH),), strict=False)
    with pytest.raises(UnsupportedModelError, match="number of tokens was fixed to 7"):
        check_token_local(list(program.graph.nodes), 3, 7, "block 0")
