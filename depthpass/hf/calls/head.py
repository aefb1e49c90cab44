"""The stock head on a stream of a transformed model, as if the decoder had returned it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from depthpass.capture import Capture
from depthpass.errors import UnsupportedModelError
from depthpass.hf.caches.cache import NAMES
from depthpass.hf.calls.doors import Frame, inside
from depthpass.hf.calls.pads import FOR_LOSSES

if TYPE_CHECKING:
    from depthpass.hf.model import DepthModel

_NOT_FOR_HEADS = ("labels", "use_cache", "return_dict", "prompt_length", *FOR_LOSSES)
"""Arguments of a call that say nothing to its head, or ask it for more than logits."""


def apply_head(model: DepthModel, captured: Capture, normed: Tensor, arguments: Mapping[str, object] | None = None) -> Any:
    """What the stock code makes of a stream that the final norm has passed.

    Args:
        normed: ``[batch, k, width]``.
        arguments: of the call that it is a part of; None = of any tokens.
    """
    leaves = range(captured.out_spec.num_leaves)
    place = pytree.tree_unflatten(list(leaves), captured.out_spec)["last_hidden_state"]
    output: Any = pytree.tree_unflatten([normed if i == place else None for i in leaves], captured.out_spec)
    decoder = model.get_submodule(model._depth.decoder)
    if decoder is model:
        return output
    if arguments is None:
        given: dict[str, Any] = {"input_ids": torch.zeros(normed.shape[:2], dtype=torch.long, device=normed.device)}
    else:
        given = {n: x for n, x in arguments.items() if n not in (*_NOT_FOR_HEADS, *NAMES)}
    with inside(Frame(decoder, model, answer=output)):
        return type(model)._stock_class.forward(model, **given)


def logits_of(output: Any, what: str, instead: str) -> Tensor:
    """Logits that the stock head made of a stream.

    Raises:
        UnsupportedModelError: the model has no head.
    """
    if getattr(output, "logits", None) is None:
        raise UnsupportedModelError(f"{what} needs a model with a head; this one returns {', '.join(output.keys())}. Use one, or "
                                    f"{instead}.")
    return output.logits
