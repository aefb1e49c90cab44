"""Programs that see later tokens: which caches they can have, and how ``generate`` fills in masks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from depthpass.errors import InputError, did_you_mean
from depthpass.hf.calls.pads import pad_op

if TYPE_CHECKING:
    from depthpass.hf.caches.cache import DepthCache
    from depthpass.ir.program import Program


def cached(program: Program, cache: DepthCache | None, name: str, use_cache: object, valid: Tensor | None, past: int) -> bool:
    """Whether a call keeps a cache: only where it was asked for, and only of whole blocks.

    Raises:
        InputError: the program sees whole rows, or the cached tokens end inside a block.
    """
    if cache is None and not use_cache:
        return False
    if not program.ahead:
        raise InputError(
            f"{name if cache is not None else 'use_cache'}: attention of this program sees the whole row, so every token changes "
            "when one is added and nothing can be kept. Leave it out, or use a block-causal program (block=B)."
        )
    # A row that has no further tokens may end anywhere.
    real = None if valid is None else valid[:, :past].sum(-1)[valid[:, past:].any(-1)]
    counts = [past] if real is None else sorted(set(real.tolist()))
    # Workspace pads stand among the tokens that were cached, and count in their blocks.
    pads = op["tokens"] if past and (op := pad_op(program)) is not None else 0
    if any((c + pads) % program.ahead for c in counts):
        beside = f" and {pads} pads" if pads else ""
        raise InputError(f"{name}: attention sees blocks of {program.ahead} tokens as a whole, so a cache has to end with one in "
                         f"every row, got rows of {', '.join(map(str, counts))} real tokens{beside}. Run the block again.")
    return cache is not None if use_cache is None else bool(use_cache)


_KNOWN = ("input_ids", "inputs", "attention_mask", "max_new_tokens", "do_sample", "temperature", "generation_config", "use_cache")


def generate(model: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """``model.generate`` of a masked diffusion model: :func:`depthpass.denoise` with the arguments that mean the same.

    Raises:
        InputError: an argument that only makes sense token by token, or no number of new tokens.
    """
    from depthpass.diffusion.sampler import denoise

    options = {k: v for k, v in kwargs.items() if v is not None and v is not False}
    if unknown := [k for k in options if k not in _KNOWN]:
        raise InputError(f"generate: {unknown[0]} means nothing to a masked diffusion model, which fills in all new tokens "
                         f"together.{did_you_mean(unknown[0], _KNOWN)} Known: {', '.join(_KNOWN)}; dp.denoise has more.")
    prompt = args[0] if args else options.get("input_ids", options.get("inputs"))
    config = options.get("generation_config", args[1] if len(args) > 1 else None) or model.generation_config
    if not isinstance(prompt, Tensor) or prompt.dim() != 2:
        raise InputError("generate: expected input_ids [batch, tokens], got none.")
    new = options.get("max_new_tokens", getattr(config, "max_new_tokens", None))
    if new is None:
        raise InputError("generate: expected max_new_tokens, the number of masks that are filled in, got none.")
    sample = options.get("do_sample", getattr(config, "do_sample", False))
    heat = options.get("temperature", getattr(config, "temperature", None) or 1.0) if sample else 0.0
    with torch.no_grad():
        return denoise(model, prompt, options.get("attention_mask"), new_tokens=new, temperature=heat)


def refuse_shifted_loss(program: Program) -> None:
    """Raise InputError for labels of next tokens where every token already sees them."""
    if program.ahead is not None and program.ahead != 1:
        raise InputError("labels: attention of this program sees later tokens, so the stock loss of predicting the next would "
                         "measure copying. Use dp.diffusion_loss, or a loss of your own on the logits.")


def refuse_generation(program: Program) -> None:
    """Raise InputError for a program that sees later tokens and does not say how they are filled in."""
    if program.ahead is not None:
        raise InputError("generate: attention of this program sees later tokens, so no token can be decoded before they are "
                         "there. Transform with dp.MaskedDiffusion to fill in masks, or with a causal program.")
