"""Contrast between loops at decode: tokens that later iterations have made more likely (LoopCD, arXiv 2610.02185)."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from depthpass.errors import InputError, SpecError
from depthpass.hf.switch import transformed
from depthpass.prompt import at_prompt


@at_prompt
class LoopContrast(LogitsProcessor):
    """Logits processor that contrasts the last iteration of a loop with an earlier one.

    With p_T and p_t what the model would say after the last and after iteration t, a token x gets

        score(x) + strength (log p_T(x) - log p_t(x))      where p_T(x) >= plausible max p_T, else -inf

    The paper is known second-hand; this is the contrast of its abstract with the usual plausibility constraint. Needs
    ``Loop(..., taps=True)``: iterations' logits are there anyway, so a token costs one more head::

        model = dp.transform(stock, dp.Loop(start=4, end=12, times=4, taps=True))
        with dp.LoopContrast(model, loop=1) as contrast:
            model.generate(ids, logits_processor=[contrast])

    It listens to the model from when it is made until :meth:`close` (or the end of the ``with`` block); one at a time, in one
    thread. Sampling, beams and left padding work as usual; a beam's score includes the contrast.

    Args:
        model: a transformed model, inside a PEFT wrapper or not.
        loop: t, from 1; a negative one counts from the last iteration, -1 being the one before it.
        strength: 0 = no contrast.
        plausible: share of the largest probability below which a token is ruled out; 0 = none is.
        scope: scope of the loop.

    Raises:
        SpecError: the model is not transformed, its loop is not tapped or has no such iteration, or a value is out of range.
    """

    hears_model = True
    """Decoding that calls the model otherwise than token by token refuses it."""

    def __init__(
        self, model: Any, loop: int = 1, *, strength: float = 1.0, plausible: float = 0.1, scope: str = "loop",
    ):
        inner = transformed(model, "LoopContrast")
        taps = [o["name"] for o in inner.depth_program.taps if o["head"]]
        names = [name for name in taps if re.fullmatch(rf"{re.escape(scope)}\.t\d+", name)]
        if len(names) < 2:
            raise SpecError(f"LoopContrast: expected a loop of at least 2 iterations with taps=True and scope {scope!r}, got "
                            f"taps {', '.join(taps) or 'of none'}.")
        if type(loop) is not int or not (1 <= loop < len(names) or -len(names) < loop < 0):
            raise SpecError(f"LoopContrast.loop: expected an iteration in 1..{len(names) - 1}, or a negative one from the last, "
                            f"got {loop!r}.")
        if not (isinstance(strength, int | float) and math.isfinite(strength) and strength >= 0):
            raise SpecError(f"LoopContrast.strength: expected a number of at least 0, got {strength!r}.")
        if not (isinstance(plausible, int | float) and 0 <= plausible <= 1):
            raise SpecError(f"LoopContrast.plausible: expected a share in [0, 1], got {plausible!r}.")
        self.strength, self.plausible = float(strength), float(plausible)
        self.last, self.earlier = names[-1], names[loop - 1 if loop > 0 else len(names) - 1 + loop]
        self._held: tuple[Tensor, Tensor] | None = None
        self._hook = inner.register_forward_hook(self._keep)

    def _keep(self, module: Any, args: Any, output: Any) -> None:
        taps = getattr(output, "taps", None) or {}
        tapped = [taps.get(name) for name in (self.last, self.earlier)]
        last, earlier = (None if x is None else x[:, -1].detach() for x in tapped)
        self._held = None if last is None or earlier is None else (last, earlier)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._held is None or self._held[0].shape != scores.shape:
            shape = None if self._held is None else tuple(self._held[0].shape)
            raise InputError(f"LoopContrast: expected the iterations' logits of shape {tuple(scores.shape)} from the call "
                             f"before, got {shape}. Use it in generate of the model it was made for, whose loop has taps=True.")
        last, earlier = (torch.log_softmax(x.to(torch.promote_types(x.dtype, torch.float32)), -1) for x in self._held)
        changed = scores + (self.strength * (last - earlier)).to(device=scores.device, dtype=scores.dtype)
        if self.plausible:
            low = last < last.amax(-1, keepdim=True) + math.log(self.plausible)
            changed = changed.masked_fill(low.to(scores.device), -float("inf"))
        return changed

    def close(self) -> None:
        """Stop listening."""
        self._hook.remove()
        self._held = None

    def __enter__(self) -> LoopContrast:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
