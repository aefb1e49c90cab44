"""Pad tokens as parallel workspace (arXiv 2505.18948)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from depthpass.errors import PassError
from depthpass.ir.program import Op, Program, op
from depthpass.ir.verify import infer
from depthpass.passes.base import Context, Numerics, Pass, require


@dataclass(frozen=True)
class Pad(Pass):
    """Insert pad tokens after every row's prompt as parallel workspace; they are dropped again before the head.

    The prompt's tokens stand in positions 0 .. n-1, the pads in n .. n+m-1, the answer from n+m on. The last pad's logits
    predict the first answer token; the other pads' outputs, and those of the prompt's last token, are dropped. Without an
    answer yet (a prompt that is scored or prefilled) the pads come last.

    rewrite:
        pad(tokens=8)
        `%0 = embed` ..                        `output %9`
        `%0 = embed` `%1 = pad 8 (%0)` ..  `%10 = trim 8 (%9)` `output %10`

    Identity: ``tokens`` = 0.

    Args:
        tokens: pads per row.
        token: the token whose embedding the pads have; None = the model's ``pad_token_id``. (Many models keep that one's
            embedding at zero and do not train it; a reserved token is trained.)
    """

    name: ClassVar[str] = "pad"
    numerics: ClassVar[Numerics] = "changing"
    names: ClassVar[tuple[str, ...]] = ("token",)

    tokens: int
    token: int | None = None

    def validate(self) -> None:
        require(self.tokens >= 0, "pad.tokens", "at least 0", self.tokens)
        require(self.token is None or self.token >= 0, "pad.token", "a token of at least 0", self.token)

    def apply(self, program: Program, ctx: Context) -> Program:
        for o in program:
            if o.kind in ("zeros", "noise", "pad"):
                raise PassError(f"pad: expected a program whose streams all start from the embedding, got %{o.name} = "
                                f"{o.kind}. A state of its own does not know the pads.")
        if self.tokens == 0:
            return program
        for o in [o for o in program if o.kind == "embed"]:
            (name,) = program.fresh()
            padded = op("pad", o.name, name=name, tokens=self.tokens, token=self.token)
            program = program.insert_after(o.name, [padded]).replace_uses(o.name, name)
        ops: list[Op] = []
        types = infer(program)
        for o in program:
            # A tapped choice of tokens is no stream: it is handed out as it is, without the pads.
            if o.kind in ("tap", "output") and not types[o.args[0]].is_route:
                name = str(int(program.fresh()[0]) + len(ops))
                ops.append(op("trim", o.args[0], name=name, tokens=self.tokens))
                o = replace(o, args=(name,))
            ops.append(o)
        return replace(program, ops=tuple(ops))
