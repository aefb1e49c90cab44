"""Masked diffusion: a row of masks is filled in over several passes (arXiv 2510.13117)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

from depthpass.errors import PassError
from depthpass.ir.program import Program, op
from depthpass.passes.base import Context, Numerics, Pass, require
from depthpass.passes.bidirectional import seeing_ahead

Order = Literal["random", "ancestral", "confidence", "margin", "entropy", "left", "planner"]
ORDERS: tuple[str, ...] = get_args(Order)


@dataclass(frozen=True)
class MaskedDiffusion(Pass):
    """Run a stock decoder as a masked diffusion model: it sees the whole row, and T passes fill in the masked positions.

        x = prompt, MASK .. MASK
        for s in 1 .. T:  S = plan(x);  x[S] = predict(x)[S]

    A step passes on token ids only: log2 of the vocabulary in bits for each position of S, whatever the width. Train with
    :func:`depthpass.diffusion_loss`, sample with :func:`depthpass.denoise` or ``model.generate``. No new parameters.

    rewrite:
        masked_diffusion(steps=8, mask_token=99)
        `%0 = embed` ..  ->  `ahead 0` `denoise 8 token 99` `%0 = embed` ..

    Args:
        steps: T; with ``block`` for every block.
        mask_token: id of the mask; a token that no text has.
        unmask: which positions a step writes, among the masked ones: ``random`` ones; those of the greatest ``confidence``
            (probability of the token), ``margin`` (over the second best) or the least ``entropy``; the ``left``most; each
            by itself with the chance that the process gives it (``ancestral``); or what a ``planner``, given when
            sampling, scores highest.
        block: None: attention sees the whole row. B: it sees earlier blocks and its own one of B tokens; blocks are
            filled one after another, and keys and values of finished ones are kept.
        shift: predict a token from the logits of the position before it, as a causal model was trained to; else from its
            own. Not with ``block``, whose first position sees no token before it in its pass.
        carry: values per token of a continuous state that goes from step to step beside the tokens;
            :class:`depthpass.CoevolutionaryDiffusion` sets it.
    """

    name: ClassVar[str] = "masked_diffusion"
    numerics: ClassVar[Numerics] = "changing"
    names: ClassVar[tuple[str, ...]] = ("mask_token",)

    steps: int
    mask_token: int
    unmask: Order = "confidence"
    block: int | None = None
    shift: bool = False
    carry: int = 0

    def validate(self) -> None:
        require(self.steps >= 1, f"{self.name}.steps", "at least 1 step", self.steps)
        require(self.mask_token >= 0, f"{self.name}.mask_token", "a token of at least 0", self.mask_token)
        require(self.block is None or self.block >= 1, f"{self.name}.block", "at least 1 token", self.block)
        require(self.block is None or self.steps <= self.block, f"{self.name}.steps",
                f"at most one step per token of a block of {self.block}", self.steps)
        require(self.carry >= 0, f"{self.name}.carry", "at least 0 values", self.carry)
        require(self.block is None or not self.shift, f"{self.name}.shift", "False with block", self.shift)

    def apply(self, program: Program, ctx: Context) -> Program:
        size = ctx.facts.get("vocab_size")
        if isinstance(size, int) and self.mask_token >= size:
            raise PassError(f"{self.name}.mask_token: expected a token below the vocabulary of {size}, got {self.mask_token}. "
                            "Call model.resize_token_embeddings first, or take a token that no text has.")
        program = seeing_ahead(program, self.block, self.name)
        ahead, *rest = program.ops
        steps = op("denoise", steps=self.steps, order=self.unmask, token=self.mask_token, carry=self.carry)
        return replace(program, ops=(ahead, steps, *rest))
