"""Contrast between loops at decode: tokens that later iterations have made more likely (arXiv 2610.02185, 2609.24196)."""

from __future__ import annotations

import math
import re
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import LogitsProcessor

from depthpass.annotations import checked
from depthpass.errors import InputError, SpecError
from depthpass.hf.switching.switch import transformed
from depthpass.passes.base import require
from depthpass.prompt import at_prompt

DEFAULTS = {"guidance": (1.0, 0.0), "penalty": (0.3, 0.1)}
"""Strength and plausible share of each formula, as published."""


@at_prompt
class LoopContrast(LogitsProcessor, AbstractContextManager):
    """Logits processor that contrasts the last iteration of a loop with an earlier one.

    With z_T and z_t the logits after the last and after iteration t, p_T and p_t their softmax, a token x gets

        guidance    z_T(x) + w (log p_T(x) - log p_t(x))          w = strength               LoopCD, arXiv 2610.02185
                    w = strength (1 - (p_T's largest - its second largest)), if adaptive
        penalty     log p_T(x) - strength log p_t(x)                                         LoopCD, arXiv 2609.24196

    and is ruled out where p_T(x) < plausible max p_T. z_T is what the processors before this one made of it. Needs
    ``Loop(..., taps=True)``: iterations' logits are there anyway, so a token costs one more head::

        model = dp.transform(stock, dp.Loop(start=4, end=12, times=4, taps=True))
        with dp.LoopContrast(model, loop=1) as contrast:
            model.generate(ids, logits_processor=[contrast])

    Where a coda follows the loop, that of iteration t reads its own keys of earlier tokens, as a row scored at once has them;
    the second paper's public code for Huginn lets it read the last iteration's when it decodes.

    It listens to the model from when it is made until :meth:`close` (or the end of the ``with`` block); one at a time, in one
    thread. Sampling, beams and left padding work as usual; a beam's score includes the contrast.

    Args:
        model: a transformed model, inside a PEFT wrapper or not.
        loop: t, from 1; a negative one counts from the last iteration, -1 being the one before it.
        strength: w or its cap, or the penalty's factor, 0 = no contrast; None = 1 for guidance, 0.3 for a penalty.
        form: ``guidance`` or ``penalty``, see above.
        adaptive: guide most where the last iteration is least certain.
        plausible: share of the largest probability below which a token is ruled out, 0 = none is; None = 0 for guidance, 0.1
            for a penalty, as published.
        scope: scope of the loop.

    Raises:
        SpecError: the model is not transformed, its loop is not tapped or has no such iteration, or a value is out of range.
    """

    hears_model = True
    """Decoding that calls the model otherwise than token by token refuses it."""

    @checked("LoopContrast", SpecError)
    def __init__(
        self, model: Any, loop: int = 1, *, strength: float | None = None, form: Literal["guidance", "penalty"] = "guidance",
        adaptive: bool = False, plausible: float | None = None, scope: str = "loop",
    ):
        inner = transformed(model, "LoopContrast")
        tapped = [o["name"] for o in inner.depth_program.taps if o["head"]]
        names = [name for name in tapped if re.fullmatch(rf"{re.escape(scope)}\.t\d+", name)]
        require(len(names) > 1, "LoopContrast", f"a loop of at least 2 iterations with taps=True and scope {scope!r}", tapped)
        require(1 <= loop < len(names) or -len(names) < loop < 0, "LoopContrast.loop",
                f"an iteration in 1..{len(names) - 1}, or a negative one from the last", loop)
        require(form == "guidance" or not adaptive, "LoopContrast.adaptive", "False with form='penalty'", adaptive)
        strength, plausible = (x if given is None else given for given, x in zip((strength, plausible), DEFAULTS[form]))
        for name, value, most in (("strength", strength, math.inf), ("plausible", plausible, 1.0)):
            require(0 <= value <= most, f"LoopContrast.{name}", f"a number from 0 to {most}", value)
        self.strength, self.plausible, self.form, self.adaptive = strength, plausible, form, adaptive
        self.last, self.earlier = names[-1], names[loop - 1 if loop > 0 else len(names) - 1 + loop]
        self._held: tuple[Tensor, Tensor] | None = None
        self._hook = inner.register_forward_hook(self._keep)

    def _keep(self, module: Any, args: Any, output: Any) -> None:
        taps = getattr(output, "taps", None) or {}
        logits = [taps[name][:, -1].detach() for name in (self.last, self.earlier) if name in taps]
        self._held = (logits[0], logits[1]) if len(logits) == 2 else None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._held is None or self._held[0].shape != scores.shape:
            raise InputError(f"LoopContrast: expected the iterations' logits of shape {tuple(scores.shape)} from the call before,"
                             f" got {self._held and tuple(self._held[0].shape)}. Use it in generate of the model that it is for.")
        last, earlier = (torch.log_softmax(x.to(torch.promote_types(x.dtype, torch.float32)), -1) for x in self._held)
        if self.form == "penalty":
            scores, change = torch.log_softmax(scores, -1), -earlier
        else:
            best = last.topk(2, -1).values.exp()
            change = (last - earlier) * (1 - best[:, :1] + best[:, 1:] if self.adaptive else 1.0)
        changed = scores + (self.strength * change).to(device=scores.device, dtype=scores.dtype)
        if self.plausible:
            least = last.amax(-1, keepdim=True) + math.log(self.plausible)
            return changed.masked_fill((last < least).to(scores.device), -float("inf"))
        return changed

    def close(self) -> None:
        """Stop listening."""
        self._hook.remove()
        self._held = None

    def __exit__(self, *error: object) -> None:
        self.close()
