"""Mixture-of-Recursions (arXiv 2507.10524): a shared stack that every token runs as often as a router says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from depthpass.errors import PassError
from depthpass.ir.program import Op, Program
from depthpass.passes.base import Context, Numerics, Pass
from depthpass.passes.layer_program import check_range
from depthpass.passes.recursion_options import check_recursions
from depthpass.passes.recursions import Recursions
from depthpass.passes.sharing import Shared, Sharing, Start, shared_stack
from depthpass.passes.streams import Builder, straight
from depthpass.passes.thresholds import check_thresholds


@dataclass(frozen=True)
class MixtureOfRecursions(Pass):
    """Run a shared stack up to R times per token; recursion r takes only tokens that r - 1 took.

    Expert choice, with s = theta_r H, w = alpha sigmoid(s) and A_r the active tokens:

        H[i] <- H[i] + w[i] Stack(H)[i]   for i in A_r;   unchanged otherwise

    A_r are the top-k of A_(r-1) with k = capacity_r times the tokens of the row (training as published, not causal),
    or those of A_(r-1) with sigmoid(s) >= 0.5 (causal, decodes as it scores). Token choice, with p = softmax(theta H):

        depth = argmax(p) + 1;   H <- H + p[depth] Stack^depth(H)

    **Which stack.** Without ``start`` and ``end`` a model of L unique layers becomes one with a shared stack of
    b = (L - 2) / R (``middle_*``) or L / R blocks. The blocks that stay are the stock model's own modules, visited R
    times, so their weights are one tensor; the blocks that no visit runs any more keep their stock names in the state
    dict and are frozen. Only ``init="average"`` makes new weights; the given model never changes. With ``start`` or
    ``end`` the model keeps all its layers and the visits [start, end) are repeated.

    rewrite:
        mixture_of_recursions(start=1, end=2, recursions=2), on three blocks
        `0 1 2`  ->  `0`, H = H + w1 block 1 (H), H[A_2] += w2 block 1 (H[A_2]), `2`

    Parameters: ``{scope}.r{r}.router.weight`` (one score, no bias), and ``{scope}.r{r}.strength.weight`` with
    ``combine="delta"``; ``{scope}.router.weight`` for token choice, with loss-free balancing also the buffer
    ``{scope}.balance.bias``. With ``sequence`` each block has its own, under ``{scope}.s{j}``. Identity: none with the
    paper's combine; ``delta`` with start and end starts exactly as the stock model.

    Args:
        recursions: R.
        sharing: ``middle_cycle``, ``cycle``: the stack R times; ``middle_sequence``, ``sequence``: each of its blocks R
            times before the next one, routed for itself. ``middle_*``: the first and the last layer are not shared.
        init: the shared blocks are the layers at regular steps from first to last (``stepwise``), the ``first`` or
            ``last`` b, or the ``average`` of the layers that are tied. Steps are rounded as in the public code: halves to
            the even layer number.
        start: first position of a stack that is repeated as it is; None with ``end`` given = 1.
        end: one past its last position; None with ``start`` given = all but the last visit.
        router: ``expert`` (a router per recursion chooses tokens) or ``token`` (a token chooses its depth at once).
        kv: every ``recursion`` has its own slots, which hold its active tokens only; ``shared``: all read the keys of
            the first one, which then runs for every token; ``updated``: so, but with an active token's own keys in the place
            of its first ones (``update_cache`` of the public code).
        mode: expert choice by ``topk`` or ``threshold``.
        capacity: share of a row's tokens for each recursion, not growing; None = (R - r + 1) / R. Only ``topk``.
        threshold: what sigmoid(s) has to reach in mode ``threshold``; a list has one for every router in program order
            (``depthpass.calibrate`` sets them).
        alpha: factor of the expert router's sigmoid.
        combine: ``paper`` as above; ``delta``: H = Stack(H) in recursion 1 and H + w (Stack(H) - H) after it, with a
            learned strength that starts from 0 in place of alpha. Expert choice.
        aux: coefficient of the loss ``{scope}.aux``: every expert router's cross-entropy against the choice, over
            those it chose from, summed over r. Mode ``topk``: a threshold chooses by itself.
        balance: coefficient of the token router's loss ``{scope}.balance``, R sum_j f_j mean(p_j).
        balancing: ``loss`` as above, or ``loss_free``: a bias for the choice alone, moved by ``rate`` after each
            training pass towards depths chosen by fewer tokens than the mean.
        rate: step of that bias.
        z: coefficient of the loss ``{scope}.z``, the squared logsumexp of the scores, for every expert router over the
            tokens that it chose from, summed over r; None = 0 (expert), 1e-5 (token).
        taps: return scores, ``{scope}.r{r}`` (token choice: the probabilities ``{scope}.p``), and which tokens are taken,
            ``{scope}.r{r}.taken``.
        scope: first part of the parameter, loss and tap names.
    """

    name: ClassVar[str] = "mixture_of_recursions"
    numerics: ClassVar[Numerics] = "changing"
    shown: ClassVar[tuple[str, ...]] = ("recursions",)
    loop_field: ClassVar[str | None] = "recursions"

    recursions: int = 3
    sharing: Sharing = "middle_cycle"
    init: Start = "stepwise"
    start: int | None = None
    end: int | None = None
    router: Literal["expert", "token"] = "expert"
    kv: Literal["recursion", "shared", "updated"] = "recursion"
    mode: Literal["topk", "threshold"] = "topk"
    capacity: Sequence[float] | None = None
    threshold: float | Sequence[float] = 0.5
    alpha: float = 0.1
    combine: Literal["paper", "delta"] = "paper"
    aux: float = 1e-3
    balance: float = 0.1
    balancing: Literal["loss", "loss_free"] = "loss"
    rate: float = 1e-3
    z: float | None = None
    taps: bool = False
    scope: str = "mor"

    @property
    def keeps_layers(self) -> bool:
        """Whether the model keeps all its own layers."""
        return self.start is not None or self.end is not None

    def validate(self) -> None:
        check_recursions(self)

    def apply(self, program: Program, ctx: Context) -> Program:
        visits = straight(program, self.name)
        plan = self._range(visits) if self.keeps_layers else shared_stack(
            self.name, visits, self.recursions, self.sharing, self.init
        )
        build, x = Builder(program), visits[0].args[0]
        build.ops += plan.directives
        for v in plan.before:
            x = build.visit(v, x)
        for j, stack in enumerate(plan.stacks):
            prefix = f"{self.scope}.s{j}" if self.sharing.endswith("sequence") else self.scope
            x = Recursions(self, build, stack, prefix).run(x)
        for v in plan.after:
            x = build.visit(v, x)
        check_thresholds(self.name, build, self.threshold if self.mode == "threshold" else 0.5)
        return build.splice(visits, x)

    def _range(self, visits: tuple[Op, ...]) -> Shared:
        start = 1 if self.start is None else self.start
        end = len(visits) - 1 if self.end is None else self.end
        if end <= start:
            raise PassError(f"{self.name}.start: expected a position below end={end}, got {start}: the program "
                            f"has {len(visits)} visits. Set end, or start=0 for Cycle.")
        check_range(self.name, start, end, len(visits))
        stack = visits[start:end]
        stacks = tuple((v,) for v in stack) if self.sharing.endswith("sequence") else (stack,)
        return Shared(visits[:start], stacks, visits[end:])
