"""Cases shared by the reference and kernel tests: operands from a description, and an error measure."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Attention:
    """One slot-attention problem; `starts` are the first real columns of its rows (left padding)."""

    heads: int = 4
    key_heads: int = 2
    length: int = 5
    keys: int = 44
    width: int = 20
    value_width: int = 12
    q_start: int = 33
    starts: tuple[int, ...] = (0, 27)
    validity: bool = True
    holes: tuple[int, ...] = ()
    window: int | None = None
    chunk: int | None = None
    softcap: float | None = None
    sinks: bool = False

    def build(self, dtype: torch.dtype, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Any], Tensor]:
        """Return the differentiable operands by name, the other options, and a gradient of the output."""
        draw = torch.Generator("cpu").manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return on_default(
                torch.randn(*shape, generator=draw, dtype=torch.float64, device="cpu").to(dtype)
            )

        batch = len(self.starts)
        operands = {
            "q": random(batch, self.heads, self.length, self.width),
            "k": random(batch, self.key_heads, self.keys, self.width),
            "v": random(batch, self.key_heads, self.keys, self.value_width),
        }
        if self.sinks:
            operands["sinks"] = random(self.heads)
        options: dict[str, Any] = {"q_start": self.q_start, "row_start": torch.tensor(self.starts)}
        options |= {"window": self.window, "chunk": self.chunk, "softcap": self.softcap}
        if self.validity:
            valid = torch.arange(self.keys)[None, :] >= options["row_start"][:, None]
            valid[:, list(self.holes)] = False
            options["valid"] = valid
        return operands, options, random(batch, self.heads, self.length, self.value_width)


BASE = Attention()
ATTENTION = {
    "causal": replace(BASE, starts=(0, 0), validity=False),
    "left_padding": BASE,
    "holes": replace(BASE, holes=(3, 30, 33, 35)),
    "window": replace(BASE, window=3),
    "chunk": replace(BASE, chunk=4),
    "chunk_over_blocks": replace(BASE, chunk=19),
    "softcap": replace(BASE, softcap=1.5),
    "sinks": replace(BASE, sinks=True),
    "everything": replace(BASE, window=9, chunk=16, softcap=2.0, sinks=True, holes=(34,)),
    "first_chunk": replace(BASE, q_start=0, length=7, starts=(0, 3)),
    "empty_rows": replace(BASE, q_start=20, starts=(0, 23), window=8),
    "empty_rows_sinks": replace(BASE, q_start=20, starts=(2, 40), sinks=True),
    "one_query": replace(BASE, length=1, q_start=43),
    "multi_query": replace(BASE, heads=6, key_heads=1, length=9),
    "odd_group": replace(BASE, heads=6, key_heads=2, width=16, value_width=16),
    "equal_heads": replace(BASE, heads=2, key_heads=2, length=19, q_start=22),
    "wide_values": replace(BASE, width=7, value_width=33),
    "start_beyond_chunk": replace(BASE, q_start=30, starts=(29, 31), chunk=3),
}


def on_default(x: Tensor) -> Tensor:
    """Move to the default device: the same numbers everywhere."""
    return x.to(torch.get_default_device())


def gradients(out: Tensor, operands: dict[str, Tensor], grad: Tensor) -> dict[str, Tensor]:
    """Return the gradient of every operand, by name with a leading `d`."""
    grads = torch.autograd.grad(out, list(operands.values()), grad, materialize_grads=True)
    return {f"d{name}": g for name, g in zip(operands, grads, strict=True)}


def leaves(operands: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return detached copies that require gradients."""
    return {name: x.detach().clone().requires_grad_() for name, x in operands.items()}


def rms_error(got: Tensor, want: Tensor) -> float:
    """Return the RMS of the difference over that of `want` (over 1 if that is zero); NaN if `got` has NaN."""
    got, want = got.double(), want.double()
    size = want.square().mean().sqrt()
    return ((got - want).square().mean().sqrt() / (size if size > 0 else 1)).item()


@dataclass(frozen=True)
class Bridge:
    """One bridge entry: `rows` tokens, which of them are present, with or without bias and norm."""

    shape: tuple[int, ...] = (2, 5)
    dim: int = 40
    rank: int = 12
    bias: bool = True
    present: bool = True
    norm: bool = True
    gain: float = 0.3
    norm_offset: float = 0.0

    def build(
        self, dtype: torch.dtype, seed: int = 0
    ) -> tuple[dict[str, Tensor], dict[str, Any], list[Tensor]]:
        """Return the differentiable operands by name, the other options, and gradients of y and z."""
        draw = torch.Generator("cpu").manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return on_default(
                torch.randn(*shape, generator=draw, dtype=torch.float64, device="cpu").to(dtype)
            )

        operands = {"x": random(*self.shape, self.dim), "c": random(*self.shape, self.rank)}
        operands["up_weight"] = random(self.dim, self.rank)
        if self.bias:
            operands["up_bias"] = random(self.dim)
        if self.norm:
            operands["norm_weight"] = random(self.dim)
        options: dict[str, Any] = {"gain": self.gain, "norm_offset": self.norm_offset, "eps": 1e-5}
        if self.present:
            options["present"] = on_default(torch.rand(self.shape, generator=draw, device="cpu") > 0.4)
        return operands, options, [random(*self.shape, self.dim) for _ in range(2)]


BRIDGE = {
    "plain": Bridge(),
    "no_norm": Bridge(norm=False),
    "no_bias": Bridge(bias=False),
    "always_present": Bridge(present=False),
    "gemma_norm": Bridge(norm_offset=1.0, gain=1.0),
    "ragged": Bridge(shape=(3, 7), dim=70, rank=37),
    "one_token": Bridge(shape=(1, 1), dim=16, rank=3),
    "several_tiles": Bridge(shape=(35,), dim=150, rank=70),
}


@dataclass(frozen=True)
class Gated:
    """One gated-attention problem; `past` own keys stand before the queries' own."""

    heads: int = 4
    key_heads: int = 2
    length: int = 9
    extra: int = 3
    width: int = 20
    value_width: int = 12
    q_start: int = 33
    past: int = 5
    window: int = 4
    far_window: int | None = None
    starts: tuple[int, ...] = (0, 27)
    validity: bool = True
    holes: tuple[int, ...] = ()

    def build(self, dtype: torch.dtype, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Any], Tensor]:
        """Return the differentiable operands by name, the other options, and a gradient of the output."""
        draw = torch.Generator("cpu").manual_seed(seed)
        batch, keys = len(self.starts), self.q_start + self.length + self.extra

        def random(*shape: int) -> Tensor:
            return on_default(torch.randn(*shape, generator=draw, dtype=torch.float64, device="cpu").to(dtype))

        own = self.past + self.length
        operands = {
            "q": random(batch, self.heads, self.length, self.width),
            "k": random(batch, self.key_heads, keys, self.width),
            "v": random(batch, self.key_heads, keys, self.value_width),
            "near_k": random(batch, self.key_heads, own, self.width),
            "near_v": random(batch, self.key_heads, own, self.value_width),
            "score": random(batch, self.length, self.heads),
        }
        options: dict[str, Any] = {"q_start": self.q_start, "window": self.window, "far_window": self.far_window}
        if self.validity:
            valid = torch.arange(keys)[None, :] >= torch.tensor(self.starts)[:, None]
            valid[:, list(self.holes)] = False
            options["valid"] = valid
        return operands, options, random(batch, self.length, self.heads, self.value_width)


GATED = {
    "plain": Gated(starts=(0, 0), validity=False),
    "left_padding": Gated(),
    "holes": Gated(holes=(3, 30, 35, 36, 37, 38, 39)),
    # Tiles of 16 rows: the window of the last tile begins behind the first block of keys, which the pads of row 1 fill.
    "whole_row": Gated(q_start=0, length=28, past=0, starts=(0, 0), validity=False),
    "whole_padded_row": Gated(q_start=0, length=28, past=0, starts=(0, 18), window=7),
    "no_past": Gated(past=0, window=6, starts=(0, 0), validity=False),
    "one_key": Gated(window=1),
    "long_past": Gated(past=30, window=3),
    "long_window": Gated(window=100, past=20),
    "far_window": Gated(far_window=6, window=3),
    "one_query": Gated(length=1, past=3),
    "first_token": Gated(length=1, q_start=0, past=0, extra=0, starts=(0, 0), validity=False),
    # A window over three blocks of 16 keys and two of 32; the last tile, partly filled, skips the blocks before it.
    "several_blocks": Gated(heads=2, key_heads=1, q_start=2, length=55, past=2, window=19, starts=(0, 5)),
    "odd_group": Gated(heads=6, key_heads=2, width=16, value_width=16),
    "equal_heads": Gated(heads=2, key_heads=2, width=7, value_width=33),
}
