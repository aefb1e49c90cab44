"""Norms of sums: the stream is normed behind every residual addition, as Huginn's blocks do."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from depthpass.errors import PassError
from depthpass.ir.program import Op, Program, op
from depthpass.passes.base import Context, Numerics, Pass, require
from depthpass.passes.streams import check_scope


@dataclass(frozen=True)
class SumNorms(Pass):
    """Pass both sums of every visit through a root-mean-square norm with a gain (the blocks of Huginn, arXiv 2502.05171).

        a = n_attention(x + Attention(x));   y = n_ffn(a + FFN(a))

    With the norms that a pre-norm block has in front of its branches these are sandwich blocks whose second norms take the
    residual stream as well. The gains belong to the physical block: all its visits share them. Comes after passes that rewrite
    the list of visits.

    rewrite:
        sum_norms()
        `%1 = block 0 (%0) slot 0`
        ->
        `%1 = block 0 (%0) slot 0 part attention` `%2 = rms sums.b0.attention (%1)`
        `%3 = ffn 0 (%2, %2)` `%4 = rms sums.b0.ffn (%3)`

    Parameters, under ``scope``: ``b{block}.attention`` and ``b{block}.ffn``, which start as ones. No setting is the stock model.

    Args:
        eps: of the norms.
        scope: first part of the parameter names.
    """

    name: ClassVar[str] = "sum_norms"
    numerics: ClassVar[Numerics] = "changing"

    eps: float = 1e-6
    scope: str = "sums"

    def validate(self) -> None:
        require(self.eps >= 0, "sum_norms.eps", "at least 0", self.eps)
        require(self.scope.isidentifier(), "sum_norms.scope", "a plain name of letters, digits and _", self.scope)

    def apply(self, program: Program, ctx: Context) -> Program:
        check_scope(self.name, self.scope, program)
        names = iter(program.fresh(3 * len(program.visits)))
        ops: list[Op] = []
        for o in program.ops:
            ops += self._visit(o, [next(names) for _ in range(3)]) if o.kind == "block" else [o]
        return replace(program, ops=tuple(ops))

    def _visit(self, visit: Op, names: list[str]) -> list[Op]:
        if visit["part"] != "whole" or visit["lora"] or visit["modulate"] or len(visit.args) > 1:
            raise PassError(f"{self.name}: expected visits of whole blocks of one stream without a LoRA or scales, got "
                            f"%{visit.name}. Leave those options out.")
        (attention, a, y), index = names, visit["index"]

        def normed(x: str, name: str, branch: str) -> Op:
            return op("rms", x, name=name, eps=self.eps).with_attrs(name=f"{self.scope}.b{index}.{branch}")

        return [
            replace(visit, name=attention).with_attrs(part="attention"), normed(attention, a, "attention"),
            op("ffn", a, a, name=y, index=index), normed(y, visit.name, "ffn"),
        ]
