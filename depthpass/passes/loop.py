"""Looped stacks: prelude, core repeated, coda; with injection, damping, shared keys, exits and taps."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

from depthpass.ir.program import Program
from depthpass.passes.base import Context, Numerics, Pass
from depthpass.passes.loop_body import looped
from depthpass.passes.loop_options import check_loop, settled_times


@dataclass(frozen=True)
class Loop(Pass):
    """Run the visits [start, end) ``times`` times between what stands before (prelude) and after (coda).

        e = prelude(x); s = init(e)
        for t in range(T): s = core(inject(s, e))
        y = coda(s)

    Covers plain loops, damped loops (arXiv 2605.23872: s += (core(s) - s) / T), Huginn (arXiv 2502.05171: :meth:`huginn`), Ouro
    (arXiv 2510.25741: ``normalize="loop", exit=q``), relaxed recursive models (arXiv 2410.20672: ``lora_rank``), timestep-encoded
    loops (arXiv 2410.01405: ``timestep``) and fully looped ones (arXiv 2605.18797: ``inject="attention", normalize="loop"``).

    rewrite:
        loop(start=1, end=3, times=2)
        `0 1 2 3`  ->  `0 1 2 1 2 3`

    Identity: ``times`` = 1 (all other options at their defaults; ``damped`` and ``inject`` add no arithmetic to it).
    With ``inject="concat"`` the adapter starts as [0, I] on (s, e), so every iteration starts as core(e) and the new
    model equals the stock model at any ``times``. LoRA, modulation and exit gates start without effect.

    Parameters, under ``scope``: ``inject``, ``exit``, ``t{t}.v{visit}.lora``, ``t{t}.v{visit}.scale``,
    ``v{visit}.time`` and ``clock`` (shared by all iterations).

    Args:
        start: first position of the core.
        end: one past its last position; None = the end of the stack.
        times: T. A range ``[low, high]`` is drawn from for every call in training mode, as in Huginn:
            r ~ Poisson(LogNormal(ln mean - sigma^2/2, sigma)) + 1, clipped to the range; evaluation takes ``eval_times``.
            An expression in n, the real tokens of a row, such as ``ceil(2*log2(n)**1)`` gives each row its own T (at least
            1); a cache holds rows of one T and refuses tokens that would change it.
        mean: of the rate that is drawn; None = the middle of the range less one, so that r is in the middle on average.
        sigma: standard deviation of its logarithm.
        eval_times: T outside of training when it is drawn; None = the rounded mean plus one.
        bptt: gradients flow through the last so many iterations only: the state that enters them is detached. (Keys
            that iterations share stay attached.)
        damped: add 1/T of the change of each iteration only (True), or this part of it.
        inject: give e to every iteration: ``add`` it to s, ``concat`` both through a learned adapter, or ``bounded``:
            a s + b e with a learned in (0, 1) for every channel, so that what earlier iterations left cannot grow by
            being carried on (Parcae, arXiv 2604.12946); a = sigmoid(w / 2) and b start as 1/2. ``attention``: every iteration
            runs on e, and from the second on every visit's queries are those of s (Fully Looped Transformer, arXiv 2605.18797).
        state: what the loop starts from: its ``input`` e, ``zeros`` or ``noise``. With ``add`` and ``input`` the
            first iteration already reads e, and nothing is added to it.
        noise_std: standard deviation of the noise.
        noise_cut: draw the noise from a normal distribution cut off at so many ``noise_std``; None = from a whole one.
        kv: keys that iteration t reads: its ``own`` slots, those of the ``first`` iteration, or, of the tokens of earlier
            calls, those of the ``last`` iteration, (``mod:k``) of the last one congruent to t modulo k, or (``anchor:k``) its
            own in the first k iterations and the last one's in all later ones (``anchor``: k = 8, Huginn's); one slot per
            block (k of them, k + 1) then outlives a call. These score a whole row as ``own`` does, and decode another
            function. ``latest``, beside an exit that skips: those of iteration t, and of tokens that left before it
            those of the last one that they took (Huginn's latest and available).
        taps: return what the model would give after 1, 2, .. T iterations, as logits called ``{scope}.t{t}``; the
            coda runs again for each. (With ``damped`` iteration t of this T, which is not a run with T = t.)
        exit: let tokens leave the loop early, at this value of ``criterion``.
        criterion: ``cdf``: a learned gate gives an exit probability after each iteration; a token leaves when their
            cumulative probability reaches ``exit`` (Ouro's q). Huginn's compare an iteration with the one before; a token
            leaves when the distance is below ``exit``: ``state``: |s_t - s_(t-1)| / |s_t|, or ``cosine``: 1 - cos(s_t,
            s_(t-1)), s_0 the state that the loop starts from; of p_t, what coda and head make of s_t, ``kl``: KL(p_(t-1) ||
            p_t), p_0 uniform, or ``entropy``: |H(p_t) - H(p_(t-1))|, from the second iteration on. ``argmax``: it leaves when
            ``exit`` (a whole number) iterations in a row have not changed its most likely token. (The coda of a decision
            sees the earlier tokens that took the same iteration.)
        skip: tokens that left take no further iteration: no work, and no keys in it, so that in iteration t (with
            ``kv="own"``) a token sees the earlier tokens that ran iteration t. False (``cdf`` only): run all iterations
            with all keys and pick states afterwards; with ``taps`` also return the gates' probabilities
            ``{scope}.t{t}.exit``, to train them.
        lora_rank: rank of a LoRA of its own for every visit of the core.
        timestep: modulate the visits of the core by the iteration number t (adaLN): what attention and MLP read is
            scaled by 1 + s(t), what they add is gated. ``identity`` (or True) gates with 1 + g in iteration 0 and with g
            in later ones, so that the model starts as the stock model at any ``times``; ``zero`` gates with g always,
            as published: the core starts as the identity, for training from scratch.
        scales: give every visit of the core scales and gates of its own, as plain parameters, all starting as 1.
        residual: ``1/n``: the branches of the core's visits, attention and MLP, add 1/T of what they do (arXiv 2606.18524),
            T being the loop count that runs, plus a learned part of it for every block and channel that starts as zero.
        normalize: apply the stock final norm only at the end, or to s between iterations as well (Ouro).
        out_norm: apply it to s before the coda as well (Huginn).
        scope: first part of the parameter and tap names; set it to apply the pass twice.
    """

    name: ClassVar[str] = "loop"
    numerics: ClassVar[Numerics] = "changing"
    shown: ClassVar[tuple[str, ...]] = ("times",)
    loop_field: ClassVar[str | None] = "times"

    start: int = 0
    end: int | None = None
    times: int | tuple[int, int] | str = 2
    damped: bool | float = False
    inject: Literal["add", "concat", "bounded", "attention"] | None = None
    state: Literal["input", "zeros", "noise"] = "input"
    noise_std: float = 1.0
    noise_cut: float | None = None
    kv: str = "own"
    taps: bool = False
    exit: float | None = None
    criterion: Literal["cdf", "state", "cosine", "kl", "entropy", "argmax"] = "cdf"
    skip: bool = True
    lora_rank: int | None = None
    timestep: bool | Literal["identity", "zero"] = False
    scales: bool = False
    residual: Literal["full", "1/n"] = "full"
    normalize: Literal["last", "loop"] = "last"
    out_norm: bool = False
    scope: str = "loop"
    mean: float | None = None
    sigma: float = 0.5
    eval_times: int | None = None
    bptt: int | None = None

    @classmethod
    def huginn(cls, start: int, end: int | None = None, **overrides: Any) -> Loop:
        """The loop of Huginn's public code: e and s through an adapter in every iteration, the final norm before the coda,
        s_0 of standard deviation sqrt(2/5), cut off at three of them; with a ``mean``, so many iterations in evaluation."""
        mean = overrides.get("mean")
        evaluated = {} if mean is None else {"eval_times": max(1, round(mean))}
        return cls(**{"start": start, "end": end, "inject": "concat", "state": "noise", "noise_std": math.sqrt(2 / 5),
                      "noise_cut": 3.0, "out_norm": True, **evaluated, **overrides})

    def validate(self) -> None:
        check_loop(self)

    @property
    def varies(self) -> Literal["drawn", "length"] | None:
        return "drawn" if isinstance(self.times, tuple) else "length" if isinstance(self.times, str) else None

    def with_loops(self, times: int | tuple[int, int] | str) -> Self:
        """Another T; what belongs to a range of them goes with it."""
        if isinstance(times, tuple | list | range):
            return replace(self, times=times)
        return replace(self, times=times, mean=None, sigma=0.5, eval_times=None)

    def settled(self, *, tokens: int | None = None, drawn: bool = False, most: bool = False) -> Self:
        return self if isinstance(self.times, int) else self.with_loops(settled_times(self, tokens, drawn, most))

    def apply(self, program: Program, ctx: Context) -> Program:
        return looped(self.settled(), program, ctx)
