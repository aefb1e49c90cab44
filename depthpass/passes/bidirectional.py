"""Attention that sees later tokens: the whole row, or a token's own block."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from depthpass.errors import PassError
from depthpass.ir.program import Program, op
from depthpass.ir.structural_ops import waits
from depthpass.passes.base import Context, Numerics, Pass, require


@dataclass(frozen=True)
class Bidirectional(Pass):
    """Let every visit attend to later tokens, too: to the whole row, or block-causally to the end of a token's own block.

    For encoders, RELAY's looped model (arXiv 2502.08482) and masked diffusion. Blocks are counted from a row's first real
    token. A window of the stock model then reaches so far in both directions; its chunks are seen as a whole. Such a model
    scores whole rows; ``block`` lets a cache hold whole blocks.

    rewrite:
        bidirectional()
        `%0 = embed` ..  ->  `ahead 0` `%0 = embed` ..

    Args:
        block: tokens per block; None = the whole row.
    """

    name: ClassVar[str] = "bidirectional"
    numerics: ClassVar[Numerics] = "changing"

    block: int | None = None

    def validate(self) -> None:
        require(self.block is None or self.block >= 1, f"{self.name}.block", "at least 1 token", self.block)

    def apply(self, program: Program, ctx: Context) -> Program:
        return seeing_ahead(program, self.block, self.name)


def seeing_ahead(program: Program, block: int | None, who: str) -> Program:
    """The program with attention to later tokens.

    Raises:
        PassError: it sees later tokens already, or goes from token to token.
    """
    if program.ahead is not None:
        raise PassError(f"{who}: expected a causal program, got one that sees later tokens already. Leave one of the passes out.")
    for o in program.ops:
        if waiting := waits(o):
            raise PassError(f"{who}: expected a program whose tokens can run together, got %{o.name} = {o.kind} with {waiting}, "
                            "which lets a token wait for earlier ones. Leave the pass that adds it out.")
    return replace(program, ops=(op("ahead", tokens=block or 0), *program.ops))
