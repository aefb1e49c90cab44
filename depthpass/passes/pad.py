"""Pad tokens as parallel workspace (arXiv 2505.18948), pause and thinking tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from depthpass.errors import PassError
from depthpass.ir.program import Op, Program, op
from depthpass.ir.verify import infer
from depthpass.passes.base import Context, Numerics, Pass, require

PROMPT = "prompt"
_TOKEN = "token:"


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
        after: where they go: after the ``prompt``; an integer: after so many real tokens of the row; ``token:7``: after the
            row's first token 7. A row without that position is an error.
    """

    name: ClassVar[str] = "pad"
    numerics: ClassVar[Numerics] = "changing"
    names: ClassVar[tuple[str, ...]] = ("token",)

    tokens: int
    token: int | None = None
    after: int | str = PROMPT

    def validate(self) -> None:
        require(self.tokens >= 0, "pad.tokens", "at least 0", self.tokens)
        require(self.token is None or self.token >= 0, "pad.token", "a token of at least 0", self.token)
        place(self.name, self.after)

    def apply(self, program: Program, ctx: Context) -> Program:
        return insert_pads(self.name, program, self.tokens, token=self.token, **place(self.name, self.after))


def place(who: str, after: int | str) -> dict[str, int]:
    """Where pads go, as attributes of the op ``pad``; none = after the prompt.

    Raises:
        SpecError: the place cannot be read.
    """
    if isinstance(after, int):
        require(after >= 1, f"{who}.after", "at least 1 real token", after, "The first token of a row has none before it.")
        return {"at": after}
    known = after == PROMPT or (after.startswith(_TOKEN) and after.removeprefix(_TOKEN).isdecimal())
    require(known, f"{who}.after", "'prompt', a number of real tokens, or 'token:ID'", after)
    return {} if after == PROMPT else {"behind": int(after.removeprefix(_TOKEN))}


def insert_pads(who: str, program: Program, tokens: int, **attrs: Any) -> Program:
    """The program on rows with so many more tokens, which are dropped before the head and from taps.

    Raises:
        PassError: the rows have pads already.
    """
    if padded := next((o for o in program if o.kind == "pad"), None):
        whose = f" of {padded.note}" if padded.note else ""
        raise PassError(f"{who}: expected a program without pads, got %{padded.name} = pad{whose}. "
                        "Rows have one place for pads: use one pass that inserts them.")
    if tokens == 0:
        return program
    # A state that a loop starts from has pads like the row has.
    program = program.map_ops(lambda o: o.with_attrs(pads=tokens) if o.kind in ("zeros", "noise") else o)
    for o in [o for o in program if o.kind == "embed"]:
        (name,) = program.fresh()
        padded = op("pad", o.name, name=name, tokens=tokens, **attrs)
        program = program.insert_after(o.name, [padded]).replace_uses(o.name, name)
    ops: list[Op] = []
    types = infer(program)
    for o in program:
        # A tapped choice of tokens is no stream: it is handed out as it is, without the pads.
        if o.kind in ("tap", "output") and not types[o.args[0]].is_route:
            name = str(int(program.fresh()[0]) + len(ops))
            ops.append(op("trim", o.args[0], name=name, tokens=tokens))
            o = replace(o, args=(name,))
        ops.append(o)
    return replace(program, ops=tuple(ops))
