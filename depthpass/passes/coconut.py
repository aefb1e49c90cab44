"""Coconut: continuous thoughts, latent positions that are fed with the model's own last state (arXiv 2412.06769)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from depthpass.ir.program import Program
from depthpass.passes.base import Context, Numerics, Pass, require
from depthpass.passes.pad import PROMPT, insert_pads, place


@dataclass(frozen=True)
class Coconut(Pass):
    """Insert k latent positions: each one's embedding is the final normed state of the position before it.

        x_j = embed(token_j)            j a token
        x_j = norm(h_(j-1))             j a latent

    What stands before the latents runs at once, then every latent by itself, then what follows at once: k + 2 passes over
    keys that are kept, not n. The last latent's logits predict the token behind the latents; logits of the other latents,
    and those of the token before them, are dropped. Callers see their own tokens only. Gradients flow through all latents.

    As published the row has a token before the latents and one behind them (``<bot>``, ``<eot>``): write both into the
    row, ``after="token:<id of bot>"``, and no labels up to ``<eot>``. :class:`depthpass.LatentCurriculum` replaces steps of
    a chain of thought by latents, stage by stage.

    rewrite:
        coconut(latents=3)
        `%0 = embed` ..                        `output %9`
        `%0 = embed` `%1 = pad 3 (%0) feed true` ..  `%10 = trim 3 (%9)` `output %10`

    Identity: ``latents`` = 0. No parameters.

    Args:
        latents: k.
        after: where they go: after the ``prompt`` (see :class:`Pad`); an integer: after so many real tokens of the row;
            ``token:7``: after the row's first token 7. A row without that position is an error.
    """

    name: ClassVar[str] = "coconut"
    numerics: ClassVar[Numerics] = "changing"
    shown: ClassVar[tuple[str, ...]] = ("latents",)
    loop_field: ClassVar[str | None] = "latents"

    latents: int = 1
    after: int | str = PROMPT

    def validate(self) -> None:
        require(self.latents >= 0, "coconut.latents", "at least 0", self.latents)
        place(self.name, self.after)

    def apply(self, program: Program, ctx: Context) -> Program:
        return insert_pads(self.name, program, self.latents, feed=True, **place(self.name, self.after))


def check_mark(latents: Pass, mark: int | None) -> None:
    """Hold the token that rows have before their latents against the one that the pass looks for.

    A program without latents (the first stage of a curriculum) looks at no row, so nobody else would see it there.

    Raises:
        SpecError: they differ.
    """
    token = place(latents.name, getattr(latents, "after", PROMPT)).get("behind")
    require(None in (token, mark) or token == mark, "LatentCurriculum.bot", f"{token}, as {latents.name} has "
            f"after='token:{token}'", mark, "Rows have their latents between bot and eot.")
