"""Matrix products of a token loop: the same few weights, many times, with few rows each.

On a CPU such a product is bound by how its weight is read. Weights packed for it are multiplied
several times faster than a plain product of a few dozen rows, and a loop of many chunks repays the packing. Weights that
multiply one stream (q, k, v) or whose results are summed (bridges into one block) are packed side by side and make one
product; on CUDA that is all that packing means. Packed copies live as long as the pass over the chunks that reads them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from depthpass_kernels.packed_linear import blocked, pack, packed_product, repays
from torch import Tensor

Tensors = tuple[Tensor, ...] | list[Tensor]

LEAST_USES = 4
"""Products with one weight that repay packing it."""


@dataclass(frozen=True)
class Weights:
    """Weights of one product ``x W^T + b``.

    Attributes:
        weights: ``[out, in]`` each, or one of ``[in, out]`` when ``transposed`` (GPT-2's Conv1D).
        biases: one for each weight, None = without.
        joined: the weights read one stream each and their results are summed (W is their columns side by side);
            otherwise all read the same stream (W is their rows below one another).
        gain: ``[in]``, factors of the stream that are taken into W; not of joined weights.
    """

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    joined: bool = False
    transposed: bool = False
    gain: Tensor | None = None

    @property
    def key(self) -> tuple[int, ...]:
        """Identifies the weights while they live; of joined ones the order matters as well."""
        return (self.joined, id(self.gain), *(id(w) for w in self.weights))

    def sizes(self) -> list[int]:
        """Columns of W by weight if joined, else rows."""
        return [w.shape[1 if self.joined or self.transposed else 0] for w in self.weights]

    def shape(self) -> tuple[int, int]:
        """Of W."""
        rows, columns = reversed(self.weights[0].shape) if self.transposed else self.weights[0].shape
        return (rows, sum(self.sizes())) if self.joined else (sum(self.sizes()), columns)

    def matrix(self) -> Tensor:
        """W, ``[out, in]``."""
        if self.transposed:
            matrix = self.weights[0].t()
        else:
            matrix = self.weights[0] if len(self.weights) == 1 else torch.cat(self.weights, 1 if self.joined else 0)
        return matrix if self.gain is None else matrix * self.gain

    def bias(self) -> Tensor | None:
        """b, ``[out]``; None = without."""
        if all(b is None for b in self.biases):
            return None
        if self.joined:
            return functools.reduce(torch.add, [b for b in self.biases if b is not None])
        biases = [w.new_zeros(size) if b is None else b for w, b, size in zip(self.weights, self.biases, self.sizes())]
        return biases[0] if len(biases) == 1 else torch.cat(biases)


class Products:
    """Products with the weights of one loop.

    Args:
        uses: how often the loop multiplies each weight.
    """

    def __init__(self, uses: int = 0):
        self.uses = uses
        self._packed: dict[tuple, tuple[Weights, Tensor, Tensor | None]] = {}
        self._packed_back: dict[tuple[int, ...], tuple[Weights, Tensor]] = {}

    def forward(self, w: Weights, xs: Tensors) -> list[Tensor]:
        """Results by weight, without gradient; of joined weights one, the sum.

        Args:
            xs: the stream ``[..., in]``, or of joined weights one for each.
        """
        if self.packs(w, xs[0]):
            matrix, bias = self.packed(w, xs[0])
            y = packed_product(xs[0] if len(xs) == 1 else torch.cat(xs, -1), matrix, bias)
            return [y] if w.joined or len(w.weights) == 1 else list(y.split(w.sizes(), -1))
        return plain(w, xs)

    def backward(self, w: Weights, grads: Tensors) -> list[Tensor]:
        """Gradients of the streams from those of the results, without gradient."""
        if self.packs(w, grads[0]):
            dx = packed_product(grads[0] if len(grads) == 1 else torch.cat(grads, -1), self.packed_back(w, grads[0]), None)
            return list(dx.split(w.sizes(), -1)) if w.joined and len(w.weights) > 1 else [dx]
        if w.joined:
            return [grads[0] @ weight for weight in w.weights]
        if w.transposed:
            return [F.linear(grads[0], w.weights[0])]
        total = grads[0] @ w.weights[0]
        for g, weight in zip(grads[1:], w.weights[1:]):
            total = total + g @ weight
        return [total]

    def packed(self, w: Weights, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """W packed (on CUDA as it is), and b."""
        held = self._packed.get(w.key)
        if held is None:
            # The weights are kept as well: their ids must not be given to other tensors.
            held = self._packed[w.key] = w, pack(w.matrix().detach(), x), w.bias()
        return held[1:]

    def packed_back(self, w: Weights, g: Tensor) -> Tensor:
        """The transpose of W, packed (on CUDA a view of W)."""
        held = self._packed_back.get(w.key)
        if held is None:
            back = pack(w.matrix().detach().t(), g) if blocked(g, w.weights[0]) else self.packed(w, g)[0].t()
            held = self._packed_back[w.key] = w, back
        return held[1]

    def whole(self, w: Weights, x: Tensor) -> tuple[Tensor, Tensor | None, bool]:
        """W and b, and whether W is packed: of several weights always one product."""
        if self.packs(w, x) and blocked(x, w.weights[0]):
            return *self.packed(w, x), True
        key = ("whole", *w.key)
        if key not in self._packed:
            self._packed[key] = w, w.matrix().detach(), w.bias()
        return *self._packed[key][1:], False

    def whole_back(self, w: Weights, g: Tensor) -> tuple[Tensor, bool]:
        """What the gradient of the whole result is multiplied with from the right: the packed transpose of W,
        or W as it is."""
        if self.packs(w, g) and blocked(g, w.weights[0]):
            return self.packed_back(w, g), True
        return self.whole(w, g)[0], False

    def packs(self, w: Weights, x: Tensor) -> bool:
        """Whether a product is taken from packed weights: those that a CPU packs, and several that CUDA takes as one."""
        if self.uses < LEAST_USES or not repays(x, sum(t.numel() for t in w.weights)):
            return False
        return blocked(x, w.weights[0]) or (len(w.weights) > 1 and joins(x, w.weights[0]))

    def forget(self) -> None:
        """Free the packed weights."""
        self._packed.clear()
        self._packed_back.clear()


def plain(w: Weights, xs: Sequence[Tensor]) -> list[Tensor]:
    """Results by weight through torch's own products; of joined weights one, the sum."""
    if w.transposed:
        return [F.linear(xs[0], w.weights[0].t(), w.biases[0])]
    if not w.joined:
        return [F.linear(xs[0], weight, bias) for weight, bias in zip(w.weights, w.biases)]
    total = F.linear(xs[0], w.weights[0], w.biases[0])
    for x, weight, bias in zip(xs[1:], w.weights[1:], w.biases[1:]):
        total = total + F.linear(x, weight, bias)
    return [total]


def joins(x: Tensor, weight: Tensor) -> bool:
    """Whether weights that make one product are copied side by side: fewer, wider products fill a GPU better."""
    return x.is_cuda and x.dtype == weight.dtype
