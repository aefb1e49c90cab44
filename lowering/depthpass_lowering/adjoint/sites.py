"""Products with parameters as a taped chunk calls them: weights side by side, weight gradients sunk."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from depthpass_kernels.packed_linear import multiply
from torch import Tensor

from depthpass_lowering.adjoint.reverse import SiteSpec
from depthpass_lowering.products.packed import Weights
from depthpass_lowering.products.sink import Sink, landed


class Site:
    """One product of a chunk's graph in one loop.

    Args:
        sink: of the loop.
        w: its weights.
        like: a tensor of the loop's rows, device and dtype.
    """

    def __init__(self, sink: Sink, w: Weights, like: Tensor):
        self.sink, self.w, self.like = sink, w, like
        self.sizes = w.sizes()
        self.trained = sink.trains(w)
        self.matrix: Tensor | None = None
        self.bias: Tensor | None = None
        self.back_matrix: Tensor | None = None
        self.packed = False

    def forward(self, x: Tensor) -> Tensor:
        """``x W^T + b`` of all weights side by side."""
        if self.matrix is None:
            self.matrix, self.bias, self.packed = self.sink.products.whole(self.w, self.like)
        if self.packed:
            return multiply(x, self.matrix, self.bias)
        return F.linear(x, self.matrix, self.bias)

    def head_sizes(self, dim: int) -> Sequence[int]:
        """Heads of each weight's result."""
        return [size // dim for size in self.sizes]

    def parts(self, y: Tensor) -> Sequence[Tensor]:
        """The result of each weight."""
        return torch.split_with_sizes(y, self.sizes, -1)

    def land(self, present: Tensor | None, x: Tensor, *cs: Tensor) -> Tensor:
        """``x`` plus what bridges bring to it."""
        if x.is_cuda:
            return landed(self.sink, self.w, present, x, cs)
        y = self.forward(self.side_by_side(*cs))
        return x + (y if present is None else torch.where(present, y, 0))

    def side_by_side(self, *cs: Tensor) -> Tensor:
        return cs[0] if len(cs) == 1 else torch.cat(cs, -1)

    # Backward.

    def whole(self, grads: Sequence[Tensor | None]) -> Tensor:
        """Gradients of the parts as one of the whole result."""
        known = next(g for g in grads if g is not None)
        parts = [known.new_zeros(*known.shape[:-1], size) if g is None else g for g, size in zip(grads, self.sizes)]
        return torch.cat(parts, -1)

    def back(self, g: Tensor) -> Tensor:
        """Gradient of what the product read."""
        if self.back_matrix is None:
            self.back_matrix, self.packed = self.sink.products.whole_back(self.w, self.like)
        if self.packed:
            return multiply(g, self.back_matrix, None)
        return torch.matmul(g, self.back_matrix)

    def columns(self, whole: Tensor) -> Sequence[Tensor]:
        """The gradient of each stream that a joined product read."""
        return torch.split_with_sizes(whole, self.sizes, -1)

    def hold(self, x: Tensor, g: Tensor) -> None:
        """Keep the operands of the weight gradients."""
        if self.trained is None:
            self.sink.add(self.w, [x], [g])
        else:
            self.sink.hold(self.trained, x, g)

    def release(self) -> None:
        """Let go of the weights of the forward pass."""
        self.matrix = self.bias = None


def sites_of(specs: Sequence[SiteSpec], params: Sequence[Tensor], sink: Sink, like: Tensor) -> list[Site]:
    """The products of a chunk's graph with these parameters."""
    sites = []
    for spec in specs:
        weights = Weights(
            tuple(params[i] for i in spec.weights), tuple(None if i is None else params[i] for i in spec.biases),
            spec.joined, spec.transposed, None if spec.gain is None else params[spec.gain],
        )
        sites.append(Site(sink, weights, like))
    return sites
