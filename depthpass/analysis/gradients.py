"""Gradients layer by layer and visit by visit: nuclear norms, Frobenius norms, and how much they differ across layers.

After arXiv 2410.23743: for each projection X and block l the nuclear norm s[X, l] of d loss / d W; MAD[X] is the mean
of |s[X, l+1] - s[X, l]| over neighbouring blocks, and RD the relative difference between two reports. Nothing is
updated, and no ``.grad`` is written.

A looped program visits a block several times, and ``.grad`` holds the sum over its visits. Here every visit gets its
own alias of the block's parameters for the time of one forward pass, so that each visit has a gradient of its own;
their sum is what ``backward`` would write.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast, overload

import torch
from torch import Tensor, nn

from depthpass.annotations import checked
from depthpass.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from depthpass.analysis.gradient_sets import GradientComparison
from depthpass.prompt import at_prompt, in_notebooks


@in_notebooks
@dataclass(frozen=True)
class MatrixGradient:
    """Gradient of one weight matrix.

    Attributes:
        block: physical block.
        visit: value name of the visit in the program (without ``%``), or None for the sum over the block's visits.
        projection: module path inside the block, e.g. ``self_attn.q_proj``.
        shape: of the weight. Stacked expert matrices count as one block-diagonal matrix.
        nuclear: sum of the singular values.
        frobenius: root of the sum of squares.
    """

    block: int
    visit: str | None
    projection: str
    shape: tuple[int, ...]
    nuclear: float
    frobenius: float


@at_prompt
@dataclass(frozen=True)
class GradientReport:
    """Gradients of one batch.

    Attributes:
        model: class name.
        loss: the value that was differentiated.
        blocks: number of physical blocks.
        layers: per block and projection, summed over visits.
        visits: per visit and projection, in program order; one visit per block in a stock model.
        tensors: the gradients themselves by (visit, parameter name inside the block), when asked for.
    """

    model: str
    loss: float
    blocks: int
    layers: tuple[MatrixGradient, ...]
    visits: tuple[MatrixGradient, ...]
    tensors: Mapping[tuple[str, str], Tensor] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def projections(self) -> tuple[str, ...]:
        """Projections in the order of the block's modules."""
        return tuple(dict.fromkeys(m.projection for m in self.layers))

    def profile(self, projection: str, value: str = "nuclear") -> dict[int, float]:
        """Norm by block of one projection.

        Raises:
            InputError: no such projection, or no such norm.
        """
        if projection not in self.projections:
            raise InputError(f"no projection {projection!r}.{did_you_mean(projection, self.projections)} "
                             f"Known: {', '.join(self.projections)}.")
        if value not in ("nuclear", "frobenius"):
            raise InputError(f"value: expected 'nuclear' or 'frobenius', got {value!r}.")
        return {m.block: getattr(m, value) for m in self.layers if m.projection == projection}

    def mad(self, start: int = 0, stop: int | None = None, value: str = "nuclear") -> dict[str, float]:
        """Mean absolute difference between neighbouring blocks in ``start..stop``, by projection.

        Projections that fewer than two blocks of the range have are left out.
        """
        differences = {}
        for projection in self.projections:
            norms = [v for b, v in self.profile(projection, value).items() if start <= b < (stop or self.blocks)]
            if len(norms) > 1:
                differences[projection] = sum(abs(b - a) for a, b in pairwise(norms)) / (len(norms) - 1)
        return differences

    def relative_difference(self, other: GradientReport) -> dict[tuple[int, str], float]:
        """(other - self) / self of the nuclear norms, by block and projection.

        Raises:
            InputError: the reports are of different models.
        """
        mine = {(m.block, m.projection): m.nuclear for m in self.layers}
        theirs = {(m.block, m.projection): m.nuclear for m in other.layers}
        if mine.keys() != theirs.keys():
            raise InputError("relative_difference: expected two reports of the same model and projections, got "
                             f"{self.model} with {len(mine)} matrices and {other.model} with {len(theirs)}.")
        return {k: (theirs[k] - v) / v if v else float("nan") for k, v in mine.items()}

    def rows(self, per_visit: bool = False) -> list[dict[str, object]]:
        """One mapping from column to value per matrix; norms are in units of loss per weight."""
        return [
            {"block": m.block, "visit": m.visit or "sum", "projection": m.projection, "shape": m.shape,
             "nuclear norm": m.nuclear, "Frobenius norm": m.frobenius}
            for m in (self.visits if per_visit else self.layers)
        ]

    def plot(self, value: str = "nuclear", per_visit: bool = False, path: str | None = None):
        """Heat map of the norms: blocks (or visits) by projections. Needs matplotlib (extra ``plot``).

        Args:
            value: ``nuclear`` or ``frobenius``.
            per_visit: a row per visit instead of a row per block.
            path: also write the figure to this file.

        Returns:
            the matplotlib figure.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise InputError("plot needs matplotlib; install it with the extra 'plot' (depthpass[plot]).") from None
        self.profile(self.projections[0], value)
        entries = self.visits if per_visit else self.layers
        names = [(m.block, m.visit) for m in entries]
        rows = list(dict.fromkeys(names))
        grid = [[float("nan")] * len(self.projections) for _ in rows]
        for m in entries:
            grid[rows.index((m.block, m.visit))][self.projections.index(m.projection)] = getattr(m, value)
        figure = Figure(figsize=(2 + 0.6 * len(self.projections), 1.5 + 0.25 * len(rows)), layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(grid, aspect="auto", cmap="viridis")
        axes.set_xticks(range(len(self.projections)), [p.rsplit(".", 1)[-1] for p in self.projections], rotation=45)
        axes.set_yticks(range(len(rows)), [f"{b}" if v is None else f"{b} (%{v})" for b, v in rows])
        axes.set_ylabel("block (visit)" if per_visit else "block")
        axes.set_title(f"{value} norm of the gradient, loss {self.loss:.4g}")
        figure.colorbar(image, ax=axes)
        if path is not None:
            figure.savefig(path)
        return figure


def nuclear_norm(gradient: Tensor) -> float:
    """Sum of singular values, as roots of the eigenvalues of the smaller Gram matrix, in float64.

    A stack of matrices ``[experts, in, out]`` counts as one block-diagonal matrix: the sum over the stack.
    """
    g = gradient.detach().double()
    gram = g @ g.mT if g.shape[-2] <= g.shape[-1] else g.mT @ g
    return float(torch.linalg.eigvalsh(gram).clamp_min(0).sqrt().sum())


@overload
def gradients(
    model: nn.Module, batch: Mapping[str, Tensor], *, loss: Callable[[Any], Tensor] | None = None,
    projections: Sequence[str] | None = None, keep: bool = False,
) -> GradientReport: ...


@overload
def gradients(
    model: nn.Module, batch: Mapping[str, Iterable[Any]], *, loss: Callable[[Any], Tensor] | None = None,
    projections: Sequence[str] | None = None, parts: tuple[int, int] | None = None,
) -> GradientComparison: ...


def gradients(model, batch, *, loss=None, projections=None, keep=False, parts=None):
    """Gradient norms of every weight matrix of every block: for one batch, or compared between sets of responses.

    Args:
        model: a stock or a transformed transformers decoder. It runs in eval mode and is left as it was.
        batch: keyword arguments of its forward; with ``labels`` the model's own loss is used (label -100 leaves a
            token out, so mask the prompt to differentiate the response only). Or sets of responses by name, as ``{"fast":
            [...], "slow": [...]}``, each a list of (prompt ids, response ids) pairs or of such calls: every response is
            differentiated by itself, as published, and norms are means over a set.
        loss: from the model's output to a scalar, instead of the model's own loss.
        projections: names to keep, by their last part (``q_proj``) or in full; None = every matrix.
        keep: keep the gradients themselves in ``tensors`` (one batch).
        parts: of sets: the two blocks at which tables cut the stack in three; None = in equal parts.

    Returns:
        a :class:`GradientReport`, or for sets a :class:`~depthpass.analysis.gradient_sets.GradientComparison` with the MAD
        and RD tables.

    Raises:
        InputError: no loss to differentiate, a loss that is no scalar, a projection that no block has, or sets that cannot be
            compared.
    """
    if isinstance(batch, Mapping) and batch and not any(isinstance(v, Tensor) for v in batch.values()):
        from depthpass.analysis.gradient_sets import compare_gradients

        if keep:
            raise InputError("gradients: keep: expected one batch beside it, got sets of responses.")
        return compare_gradients(model, batch, loss=loss, projections=projections, parts=parts)
    if parts is not None:
        raise InputError("gradients: parts: expected sets of responses beside it, got one batch.")
    return gradients_of(model, batch, loss=loss, projections=projections, keep=keep)


@checked("gradients")
def gradients_of(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    *,
    loss: Callable[[Any], Tensor] | None = None,
    projections: Sequence[str] | None = None,
    keep: bool = False,
) -> GradientReport:
    """:func:`gradients` of one batch."""
    if loss is None and "labels" not in batch:
        raise InputError("gradients: expected labels in the batch, or loss= (a function of the model's output).")
    by_visit, value = _visit_gradients(model, batch, loss, projections)
    layers: dict[tuple[int, str], Tensor] = {}
    visits = []
    for (block, visit, name), gradient in by_visit.items():
        visits.append(_matrix(block, visit, name, gradient))
        layers[block, name] = gradient if (block, name) not in layers else layers[block, name] + gradient
    return GradientReport(
        type(model).__name__, value, 1 + max(b for b, _ in layers),
        tuple(_matrix(b, None, name, t) for (b, name), t in sorted(layers.items(), key=lambda e: e[0][0])),
        tuple(visits), {(v, name): t for (_, v, name), t in by_visit.items()} if keep else {},
    )


def _matrix(block: int, visit: str | None, name: str, gradient: Tensor) -> MatrixGradient:
    return MatrixGradient(block, visit, name.removesuffix(".weight"), tuple(gradient.shape), nuclear_norm(gradient),
                          float(gradient.detach().double().norm()))


def _visit_gradients(
    model: nn.Module, batch: Mapping[str, Tensor], loss: Callable[[Any], Tensor] | None,
    projections: Sequence[str] | None,
) -> tuple[dict[tuple[int, str, str], Tensor], float]:
    """Gradients by (block, visit, parameter name), and the loss."""
    blocks = _blocks(model)
    names = _matrices(blocks, projections)
    aliases: dict[tuple[int, str, str], Tensor] = {}

    def alias(block: int, visit: str, name: str) -> Tensor:
        key = (block, visit, name)
        if key not in aliases:
            aliases[key] = blocks[block].get_parameter(name).detach().requires_grad_()
        return aliases[key]

    with _eval(model), _aliased(model, blocks, names, alias), torch.enable_grad():
        output = model(**batch)
        value = loss(output) if loss is not None else output["loss"]
        if not isinstance(value, Tensor) or value.dim() != 0:
            raise InputError("loss: expected a function that returns a scalar tensor, got "
                             f"{tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__}.")
        # A block that no token was routed to has no gradient: zero.
        grads = torch.autograd.grad(value, list(aliases.values()), allow_unused=True)
    by_visit = {k: torch.zeros_like(a) if d is None else d.detach() for (k, a), d in zip(aliases.items(), grads)}
    return by_visit, float(value.detach())


def _blocks(model: nn.Module) -> list[nn.Module]:
    from depthpass.capture.export import find_layers

    return list(cast(nn.ModuleList, model.get_submodule(find_layers(model))))


def _matrices(blocks: Sequence[nn.Module], projections: Sequence[str] | None) -> list[tuple[str, ...]]:
    """Names of the weight matrices of every block."""
    matrices = [tuple(k for k, p in b.named_parameters() if p.dim() >= 2 and p.is_floating_point()) for b in blocks]
    if projections is None:
        return matrices
    every = {k.removesuffix(".weight") for names in matrices for k in names}
    known = {p for k in every for p in (k, k.rsplit(".", 1)[-1])}
    for wanted in projections:
        if wanted not in known:
            raise InputError(f"projections: no block has {wanted!r}.{did_you_mean(wanted, known)} "
                             f"Known: {', '.join(sorted(every))}.")
    wanted = set(projections)
    return [
        tuple(k for k in names if {(p := k.removesuffix(".weight")), p.rsplit(".", 1)[-1]} & wanted) for names in matrices
    ]


@contextmanager
def _eval(model: nn.Module) -> Iterator[None]:
    """Eval mode, and the sequential eager level: others keep weight gradients out of autograd's sight."""
    modes = {m: m.training for m in model.modules()}
    runtime = getattr(model, "_depth", None)
    level, policy = getattr(runtime, "lowering", None), getattr(runtime, "fixed_point", None)
    model.eval()
    if runtime is not None:
        runtime.lowering, runtime.fixed_point = "eager", None
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        if runtime is not None:
            runtime.lowering, runtime.fixed_point = level, policy


@contextmanager
def _aliased(
    model: nn.Module, blocks: Sequence[nn.Module], names: Sequence[Sequence[str]],
    alias: Callable[[int, str, str], Tensor],
) -> Iterator[None]:
    """Let every call of a block run on the aliases of its visit."""
    stock = not hasattr(model, "depth_program")
    saved = [b.__dict__.get("forward") for b in blocks]

    def wrapped(index: int, block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            # A transformed model calls its blocks with the running visit beside the hidden stream.
            visit = str(index) if stock else kwargs["depth_call"].visit.op.name
            with _swapped(block, {name: alias(index, visit, name) for name in names[index]}):
                return forward(*args, **kwargs)

        return run

    try:
        for i, block in enumerate(blocks):
            block.forward = wrapped(i, block, block.forward)
        yield
    finally:
        for block, forward in zip(blocks, saved):
            if forward is None:
                del block.forward
            else:
                block.forward = forward


@contextmanager
def _swapped(block: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Put tensors in place of a block's parameters."""
    places = []
    for name, tensor in tensors.items():
        owner, _, last = name.rpartition(".")
        held = cast(dict[str, Any], block.get_submodule(owner)._parameters)
        places.append((held, last, held[last]))
        held[last] = tensor
    try:
        yield
    finally:
        for held, last, parameter in places:
            held[last] = parameter
