"""TurboConn (arXiv 2602.17993): learned bridges from higher blocks to lower blocks of later tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from depthpass.ir.program import Program
from depthpass.passes.base import Context, Numerics, Pass
from depthpass.passes.turboconn_layout import check_turboconn, resolve
from depthpass.passes.turboconn_ops import bridged


@dataclass(frozen=True)
class TurboConn(Pass):
    """Add learned bridges: token i at block d also gets what token i - g knew after block s > d.

    With m = ``gain`` = 0.01 * ``alpha`` and g = ``group``, every bridge b = (s -> d) adds on the output of block d

        h_d[i] = Block_d(..)[i] + sum_b Up_b(m * Down_b(h_s[i - g]))

    where h_s is the stream after block s *and* after any bridge that lands on s. Nothing is added at the first g
    real tokens of a row. Up starts from zero (weight and bias), so a new model equals the stock model. Tokens of one
    group of g run in parallel, groups run one after another; depth grows by the longest bridge once per group.

    rewrite:
        turboconn(bridges=((2, 0),), group=4, rank=8), on four blocks
        `%1 = block 0 (%0) slot 0`
        `%2 = block 1 (%1) slot 1`
        `%3 = block 2 (%2) slot 2`
        ->
        `%1 = block 0 (%0) slot 0`
        `%2 = delay 4 (%7)`
        `%3 = linear turboconn.s2_d0.up (%2) out 64 init 0.0`
        `%4 = add (%1, %3)`
        `%5 = block 1 (%4) slot 1`
        `%6 = block 2 (%5) slot 2`
        `%7 = linear turboconn.s2_d0.down (%6) out 8`

    Parameters (under ``depth.`` in the state dict): ``turboconn.s{source}_d{destination}.{down,up}.{weight,bias}``,
    or ``.full.`` when ``rank`` is None. Identity: any zero ``up`` (the initial state): bit for bit where the row is one
    chunk, to rounding (1e-6 in float32) where it is cut into several, whose products are those of smaller matrices.

    Args:
        bridges: explicit (source, destination) pairs, as positions in the program's list of visits: block numbers in
            a stock model, visit numbers where blocks repeat. Negative positions count from the end, so (-1, 0) is
            last to first. None = the rule: every pair of a source and a destination at least ``min_span`` apart.
        group: g, the delay of every bridge in tokens.
        rank: width of Down's output; None = one full linear map of the delayed stream instead of Down and Up.
        alpha: strength; 100 gives m = 1.
        gain: m itself, instead of ``alpha``.
        stride: rule: step of the source and the destination ranges.
        min_span: rule: smallest source - destination. None = 6 as for Llama 1B, and on stacks too shallow for a span
            of 6 the largest span there is.
        sources: rule: half-open range (start, stop) of sources; None = all visits.
        destinations: rule: half-open range (start, stop) of destinations; None = all visits.
        preset: a layout of the official code by name, instead of bridges or rule: ``llama-1b`` (16 blocks, 15
            bridges), ``llama-8b`` (32 blocks, 45 bridges), or the control ``sparse`` (last to first).
        write: add on the destination block's ``output`` (as the official code) or on its ``input``.
        wiring: ``paper``, as above; ``code``, as the public code runs, which the published numbers were made with: *every*
            bridge reads the source of the last bridge in the list (a loop variable is not unpacked), through the Down of
            that source's first, second, .. bridge for the first, second, .. bridge of its own source. Those bridges have
            an Up of their own only; Down maps of other sources do not exist here (there they get no gradient).
        init_std: standard deviation of Down's initial weight; its bias starts from zero.
        scope: first part of the parameter names; set it to apply the pass twice to one program.

    Example:
        >>> from depthpass.ir import plain
        >>> from depthpass.passes import Context, apply_spec
        >>> stock = plain("LlamaForCausalLM", blocks=16, width=64)
        >>> turbo = apply_spec(stock, TurboConn.llama_1b(group=8), Context.of(stock))
        >>> sum(o.kind == "delay" for o in turbo)
        15
    """

    name: ClassVar[str] = "turboconn"
    numerics: ClassVar[Numerics] = "changing"
    shown: ClassVar[tuple[str, ...]] = ("group",)

    bridges: Sequence[tuple[int, int]] | None = None
    group: int = 4
    rank: int | None = 120
    alpha: float = 100.0
    gain: float | None = None
    stride: int = 2
    min_span: int | None = None
    sources: tuple[int, int] | None = None
    destinations: tuple[int, int] | None = None
    preset: Literal["llama-1b", "llama-8b", "sparse"] | None = None
    write: Literal["output", "input"] = "output"
    wiring: Literal["paper", "code"] = "paper"
    init_std: float = 0.02
    scope: str = "turboconn"

    @classmethod
    def llama_1b(cls, **overrides: Any) -> TurboConn:
        """The band of Llama-3.2-1B (16 blocks, 15 bridges)."""
        return cls(**{"preset": "llama-1b", **overrides})

    @classmethod
    def llama_8b(cls, **overrides: Any) -> TurboConn:
        """The band of Llama-3.1-8B (32 blocks, 45 bridges)."""
        return cls(**{"preset": "llama-8b", **overrides})

    @classmethod
    def sparse(cls, **overrides: Any) -> TurboConn:
        """The sparse control: one bridge, from the last block to the first."""
        return cls(**{"preset": "sparse", **overrides})

    @property
    def label(self) -> str:
        return f"{self.name}(group={self.group})"

    @property
    def multiplier(self) -> float:
        """m of the equations: ``gain``, or 0.01 * ``alpha``."""
        # Not 0.01 * alpha: 0.01 has no exact binary form, alpha / 100 is exact at the documented settings.
        return self.alpha / 100 if self.gain is None else self.gain

    def validate(self) -> None:
        check_turboconn(self)

    def resolve(self, visits: int) -> tuple[tuple[int, int], ...]:
        """The bridges for a program of so many visits, all positions non-negative.

        Raises:
            PassError: a position out of range, a source that is not above its destination, a duplicate, or a rule
                that gives no bridge at all.
        """
        return resolve(self, visits)

    def apply(self, program: Program, ctx: Context) -> Program:
        return bridged(self, program)
