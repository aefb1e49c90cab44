"""How much of the added depth a model uses: the rate at which sweeps of its serial regions contract.

Values pass a delay once per sweep, so the network after k sweeps is the network with k - 1 hops. Where c, what the delays
inject, stops changing after a few sweeps, longer chains of hops carry nothing: the depth is there, the model does not use it.
A rate near 1 or above says that every hop matters. It is a property of weights and data, not of the program.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from depthpass.errors import InputError
from depthpass.prompt import at_prompt
from depthpass.schedule.fixed_point import FixedPoint, Measure


@dataclass(frozen=True)
class Hop:
    """The network cut off after so many hops.

    Attributes:
        hops: passes through a delay.
        change: how far the next sweep moves c, relative to c.
        error: of c against the exact one, relative.
        output_error: of the region's results against the exact ones, relative.
    """

    hops: int
    change: float
    error: float
    output_error: float


@at_prompt
@dataclass(frozen=True)
class RegionContraction:
    """One serial region.

    Attributes:
        blocks: physical blocks of its visits.
        tokens, chunk, chunks: columns of a row, of a chunk, and chunks in a row.
        hops: by number of hops, from 0, until the results are right up to rounding or the row ends.
    """

    blocks: tuple[int, ...]
    tokens: int
    chunk: int
    chunks: int
    hops: tuple[Hop, ...]

    @property
    def available(self) -> int:
        """Hops that the row is long enough for."""
        return self.chunks - 1

    def used(self, eps: float) -> int | None:
        """Least number of hops whose results are right up to ``eps``; None if more than were measured."""
        return next((h.hops for h in self.hops if h.output_error <= eps), None)

    def rate(self, eps: float) -> float | None:
        """rho: geometric mean by which a sweep shrinks the change of c, until it is below ``eps``; None below two sweeps.

        The sweep that ends the row is left out: it changes nothing whatever the rate. 0 = the bridges inject nothing.
        """
        changes = []
        for hop in self.hops[: self.available]:
            changes.append(hop.change)
            if hop.change <= eps:
                break
        if len(changes) < 2 or not all(map(math.isfinite, changes)):
            return 0.0 if changes and changes[0] == 0 else None
        return (changes[-1] / changes[0]) ** (1 / (len(changes) - 1))


@at_prompt
@dataclass(frozen=True)
class ContractionReport:
    """Contraction of every serial region for one batch. ``print`` it, or :meth:`to_json`.

    Attributes:
        model: class name.
        eps: relative error that counts as right.
        regions: in execution order.
        losses: (hops, loss) of the network cut off after so many hops, when the batch has labels.
        loss: with all hops; None without labels.
    """

    model: str
    eps: float
    regions: tuple[RegionContraction, ...]
    losses: tuple[tuple[int, float], ...] = ()
    loss: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data: the fields, and per region ``rate``, ``hops_used``, ``sweeps_to_eps`` and ``hops_available``."""
        regions = []
        for region in self.regions:
            used = region.used(self.eps)
            regions.append(asdict(region) | {
                "rate": region.rate(self.eps), "hops_available": region.available, "hops_used": used,
                "sweeps_to_eps": None if used is None else used + 1,
            })
        losses = [{"hops": hops, "loss": loss} for hops, loss in self.losses]
        return {"model": self.model, "eps": self.eps, "regions": regions, "losses": losses, "loss": self.loss}

    def to_json(self, indent: int | None = 2) -> str:
        """:meth:`to_dict` as JSON text; numbers that are not finite become null."""
        return json.dumps(_finite(self.to_dict()), indent=indent, allow_nan=False)

    def __str__(self) -> str:
        lines = [f"Contraction of {self.model}: how much of the added depth it uses (right = relative error {self.eps:g})"]
        for region in self.regions:
            lines += ["", *_table(region, self.eps)]
        if self.losses:
            lines += ["", f"loss with all hops {self.loss:.4f}; "
                      + "; ".join(f"{hops} {'hop' if hops == 1 else 'hops'} {loss:.4f}" for hops, loss in self.losses)]
        return "\n".join(lines)


def contraction(
    model: nn.Module, batch: Mapping[str, Tensor], *, eps: float = 1e-3, max_sweeps: int | None = None
) -> ContractionReport:
    """Measure how fast the sweeps of a transformed model's serial regions contract on one batch.

    Costs one forward pass in the token loop and one plain forward pass of each region per sweep; with labels also a forward
    pass for each power of two below the number of chunks. The model runs in eval mode and is left as it was.

    Args:
        model: a transformed model with a delay cycle.
        batch: keyword arguments of its forward; with ``labels`` the loss by number of hops is reported as well. Use
            representative text: the rate depends on it.
        eps: relative error of a region's results that counts as right.
        max_sweeps: stop after so many; None = as many as there are chunks.

    Raises:
        InputError: nothing to measure: not transformed, no serial region, or rows of one chunk only.
        LoweringError: a region cannot be swept (routes on a delay cycle).
    """
    runtime = getattr(model, "_depth", None)
    if runtime is None:
        raise InputError(f"contraction: expected a transformed model, got a stock {type(model).__name__}. Call "
                         "dp.transform(model, spec) first.")
    if not isinstance(eps, int | float) or not 0 < eps < math.inf:
        raise InputError(f"eps: expected a positive number, got {eps!r}.")
    if not runtime.plan.schedule.serial_regions:
        raise InputError("contraction: expected a program with a delay cycle, got one whose regions all run over the whole "
                         "row at once: no value passes a delay more than once.")
    measure = Measure(max_sweeps)
    with _eval(model, runtime), torch.no_grad():
        runtime.fixed_point = measure
        output = model(**{**batch, "use_cache": False, "return_dict": True})
        regions = tuple(
            RegionContraction(m.blocks, m.tokens, m.chunk, m.chunks, tuple(Hop(**asdict(s)) for s in m.sweeps))
            for m in output.sweeps
        )
        if not regions:
            raise InputError(f"contraction: expected rows of more than one chunk ({runtime.plan.schedule.chunk} tokens), got "
                             "shorter ones. Give a longer batch.")
        loss, losses = getattr(output, "loss", None), []
        if loss is not None:
            most = max(r.chunks for r in regions)
            for sweeps in (2**i for i in range(most.bit_length()) if 2**i < most):
                runtime.fixed_point = FixedPoint(max_sweeps=sweeps, exact=False)
                losses.append((sweeps - 1, float(model(**{**batch, "use_cache": False, "return_dict": True}).loss)))
    return ContractionReport(
        type(model).__name__, float(eps), regions, tuple(losses), None if loss is None else float(loss)
    )


@contextmanager
def _eval(model: nn.Module, runtime: Any) -> Iterator[None]:
    modes, policy = {m: m.training for m in model.modules()}, runtime.fixed_point
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        runtime.fixed_point = policy


def _table(region: RegionContraction, eps: float) -> list[str]:
    rate, used = region.rate(eps), region.used(eps)
    blocks = ", ".join(map(str, region.blocks))
    lines = [f"blocks {blocks}: {region.tokens} tokens, {region.chunks} chunks of {region.chunk}, "
             f"{region.available} hops available"]
    if used is None:
        lines.append(f"  hops used: more than the {region.hops[-1].hops} measured")
    else:
        lines.append(f"  hops used: {used} of {region.available} ({used + 1} {'sweep' if used == 0 else 'sweeps'})")
    lines.append("  contraction rate rho: " + ("not measured (one sweep)" if rate is None else f"{rate:.3g}"))
    lines.append(f"  {'hops':>6} {'change of c':>12} {'error of c':>12} {'error of results':>17}")
    lines += [f"  {h.hops:>6} {h.change:>12.2e} {h.error:>12.2e} {h.output_error:>17.2e}" for h in _shown(region.hops)]
    return lines


def _shown(hops: Sequence[Hop]) -> list[Hop]:
    """The first ones, powers of two after them, and the last."""
    return [h for h in hops if h.hops < 9 or h is hops[-1] or h.hops & (h.hops - 1) == 0]


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {k: _finite(v) for k, v in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(v) for v in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
