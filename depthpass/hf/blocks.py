"""What a program asks of a model's blocks: whether they can be cut, scaled and adapted so, before anything runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from depthpass.capture.tried import TRIED
from depthpass.hf.calls.doors import call_names
from depthpass.hf.calls.host import depth_module
from depthpass.hf.calls.inputs import normalise
from depthpass.hf.calls.latents import as_embeddings, feeds
from depthpass.hf.modules.placement import home

if TYPE_CHECKING:
    from depthpass.hf.model import DepthModel
    from depthpass.plan import Plan


def check_blocks(model: DepthModel, plan: Plan) -> None:
    """Refuse a program whose visits run parts of blocks, scale branches or have a LoRA, where the blocks do not let them.

    Only a capture tells; the one of a plain call is made, and kept for the first call. So is that of an architecture of
    transformers that is not known to work, whatever the program: what it refuses is refused before anything runs.

    Raises:
        LoweringError: naming the block and what was expected of it.
        UnsupportedModelError: the model cannot be captured.
    """
    from depthpass_lowering.visits.checked import asks_of_blocks, check_visits

    decoder: Any = model.get_submodule(model._depth.decoder)
    stock = type(decoder)._stock_class
    ops, known = asks_of_blocks(plan.largest), decoder.config.model_type in TRIED
    if not ops and (known or not stock.__module__.startswith("transformers.")):
        return
    names = call_names(stock)
    ids = torch.zeros(1, 2, dtype=torch.long, device=home(model))
    call = normalise(model, decoder, names, {"input_ids": ids}, None)
    if feeds(model.depth_program):
        call = as_embeddings(model, call)
    check_visits(ops, model._captured(call, names).blocks, depth_module(model).get_submodule)
