"""Generation modes that a transformed model cannot run, refused before ``generate`` has done anything."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from torch import Tensor

from depthpass.analysis.routing import reads_future
from depthpass.errors import InputError
from depthpass.hf.calls.columns import check_rows
from depthpass.hf.calls.growth import check_growth
from depthpass.hf.calls.pads import pad_op
from depthpass.ir.program import Op, Program
from depthpass.schedule.fixed_point import FixedPoint

if TYPE_CHECKING:
    from depthpass.hf.model import DepthModel

PROMPT = "_depth_prompt"
"""Rows and columns of the prompt, and how many of them count as ids, on the config of one call of ``generate``."""

LAYOUTS = ("static", "hybrid", "hybrid_chunked", "sliding_window")
"""How a checkpoint's own settings (Gemma's) would have the stock model lay out its keys: the same numbers, nothing to honour."""


def check_generation(model: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    """Check the arguments of ``generate``, which may be given by themselves or in a generation config.

    Raises:
        InputError: a cache implementation of transformers, continuous batching, or drafts by the model's own first blocks.
    """
    config = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
    configs = [c for c in (config, None if config else getattr(model, "generation_config", None)) if c is not None]

    def value(name: str):
        return next((v for v in (kwargs.get(name), *(getattr(c, name, None) for c in configs)) if v is not None), None)

    implementation = value("cache_implementation")
    if implementation is not None and str(implementation).startswith("paged"):
        model._paged("generate_batch")
    if value("use_cache") is not False and (config or kwargs.get("cache_implementation") or implementation not in LAYOUTS):
        check_implementation(implementation)
    if value("assistant_early_exit") is not None:
        raise InputError("assistant_early_exit: the draft would come from the model's own first blocks with their stock wiring, "
                         "for which transformers edits num_hidden_layers of the live model; a transformed model's program is not "
                         "cut that way. Pass an assistant_model, or leave it out.")


def check_implementation(name: str | None) -> None:
    """Raise InputError for a cache implementation other than the dynamic one."""
    if name not in (None, "dynamic"):
        raise InputError(f"cache_implementation={name!r}: a transformed model keeps its own DepthCache; leave it unset.")


def check_decoding(model: DepthModel, generation_config: Any, model_kwargs: dict[str, Any], mode: Any) -> None:
    """Refuse or warn of what this call of ``generate`` would decode other than it was trained; say where the prompt ends.

    Args:
        generation_config: this call's own copy.
        model_kwargs: of the model's forward; gains ``prompt_length`` where a program with pads needs it.
        mode: the generation mode, as transformers calls it.

    Raises:
        InputError: naming the part of the program and what to do.
    """
    if isinstance(mask := model_kwargs.get("attention_mask"), Tensor) and mask.dim() == 2:
        check_rows(mask)
    if generation_config.use_cache is not False:
        _check_cached(model, generation_config, model_kwargs)
    if generation_config.is_assistant or "ASSISTED" in str(mode).upper():
        _check_assisted(model.depth_program)
    if (pads := pad_op(model.depth_program)) is not None:
        _say_prompt(pads, generation_config, model_kwargs)


def _check_cached(model: DepthModel, generation_config: Any, model_kwargs: dict[str, Any]) -> None:
    """What only decoding with a cache does otherwise than scoring."""
    program = model.depth_program
    if future := reads_future(program):
        raise InputError(
            f"generate: {future} chooses tokens with scores of later tokens, so a token's logits change when more "
            "follow and decoding is not what was trained. Use mode='threshold' for generation; with use_cache=False "
            "the rule is applied afresh to the row so far at every step."
        )
    if "length" in model._depth.plan.varies:
        prompt, given_ids = getattr(generation_config, PROMPT, (None, None))
        longest = generation_config.max_length
        check_growth(model, model_kwargs.get("attention_mask"), prompt,
                     None if given_ids is None or longest is None else longest - given_ids)
    if program.reads_calls:
        warnings.warn(
            "generate: with kv='last', 'mod:k' or 'anchor' a decoded token reads other keys of earlier tokens than it does when "
            "the whole row is scored in one call, so what is generated is not what was trained, and depends on how "
            "the tokens are split into calls. kv='own' and kv='first' have one meaning.", UserWarning, stacklevel=5,
        )
    policy = model._depth.fixed_point
    if isinstance(policy, FixedPoint) and not policy.exact:
        warnings.warn(f"generate with {policy}: {policy.approximate}. With use_cache=False every step scores the row so "
                      "far as training does.", UserWarning, stacklevel=5)


def _check_assisted(program: Program) -> None:
    """Assisted decoding scores several tokens in a call and takes the rejected ones back."""
    reasons = {
        "its routed visits keep some tokens only, so tokens cannot be taken back": any(o.kind == "route" for o in program),
        "its KV policy makes a token's logits depend on how tokens are split into calls": program.reads_calls,
        "its workspace pads follow the prompt, which assisted decoding sends together with the first draft":
            pad_op(program) is not None,
    }
    if reason := next((r for r, holds in reasons.items() if holds), None):
        raise InputError(f"generate: assisted decoding is not possible with this program: {reason}. Leave the assistant (or "
                         "prompt_lookup_num_tokens) out.")


def _say_prompt(placed: Op, generation_config: Any, model_kwargs: dict[str, Any]) -> None:
    """Where the pads go: after the prompt, which is the first call of a cache, and must be said without one."""
    if generation_config.prefill_chunk_size is not None:
        raise InputError("prefill_chunk_size: the workspace pads follow the prompt, which has to come in one call. Leave "
                         "it unset.")
    if placed["at"] is not None or placed["behind"] is not None:
        return
    if generation_config.use_cache is False and generation_config.guidance_scale not in (None, 1):
        raise InputError("guidance_scale: without a cache the row without its prompt cannot be told where that would end, which "
                         "the workspace pads follow. Leave use_cache on, or guidance_scale out.")
    if generation_config.use_cache is False and "prompt_length" not in model_kwargs:
        mask, positions = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
        # generate drops a mask of ones.
        if mask is not None:
            model_kwargs["prompt_length"] = mask.sum(-1)
        elif positions is not None:
            model_kwargs["prompt_length"] = positions.shape[-1]
        else:
            raise InputError("generate: expected an attention_mask or prompt_length, got neither; without a cache every "
                             "step must be told where the prompt ends.")
