"""What the stock code does not know is added to its outputs: training losses, taps, sweeps."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from depthpass.hf.calls.doors import Frame, Left
from depthpass.hf.calls.head import apply_head, logits_of
from depthpass.hf.calls.outer import as_index

if TYPE_CHECKING:
    from depthpass.hf.model import DepthModel


def finish(model: DepthModel, output: Any, frame: Frame, left: Left) -> Any:
    """The outputs of an outer class with what its decoder's run has left."""
    loss: Tensor | float = 0.0
    if left.losses is not None and model.training:
        targets = next((x for n in ("labels", "start_positions") if isinstance(x := frame.arguments.get(n), Tensor)), None)
        if targets is not None:
            loss = _share(model, frame.arguments, targets) * left.losses[1]
        elif frame.arguments.get("num_items_in_batch") is not None:  # Trainer with label smoothing or a loss of its user's
            warn_losses(left, f"a transformed {type(model).__name__} was called without labels by what takes a loss of its own")
    if isinstance(output, tuple):
        return (output[0] + loss, *output[1:]) if isinstance(loss, Tensor) else output
    if isinstance(loss, Tensor) and getattr(output, "loss", None) is not None:
        output["loss"] = output.loss + loss.to(output.loss)
    keep = frame.arguments.get("logits_to_keep")
    return decorate(model, output, left, as_index(keep), frame.arguments)


def decorate(
    model: DepthModel, output: Any, left: Left, keep: slice | Tensor | None = None, arguments: Mapping[str, object] | None = None
) -> Any:
    """Hand out what a run left as plain attributes: not entries, so tuples and gathers of outputs stay as they are.

    Args:
        keep: the tokens whose streams are handed out; None = all.
        arguments: of the outer call; heads of taps get them, too.
    """
    if left.losses is not None:
        output.losses, output.losses_total = left.losses
    if left.heads:
        output.taps = {
            n: logits_of(apply_head(model, left.captured, x, arguments), f"tap {n!r}", "head=False") if left.heads[n] else
            x if keep is None else x[:, keep]
            for n, x in left.streams.items() if n in left.heads
        }
    if left.sweeps is not None:
        output.sweeps = left.sweeps
    return output


def _share(model: DepthModel, arguments: Mapping[str, Any], targets: Tensor) -> Tensor | float:
    """Factor of a loss that is a mean over this call, beside a loss that is summed over ``num_items_in_batch`` labels.

    Trainer splits a batch into several calls and divides each one's summed loss by the labels of all of them.
    """
    if arguments.get("num_items_in_batch") is None:
        return 1.0
    if (shifted := arguments.get("shift_labels")) is not None:
        targets = shifted
    elif getattr(model, "loss_type", None) in (None, "ForCausalLM", "ForConditionalGeneration"):
        targets = targets[..., 1:]  # the others take theirs where they stand
    return (targets != arguments.get("ignore_index", -100)).sum() / arguments["num_items_in_batch"]


def warn_losses(left: Left, why: str) -> None:
    """Losses of routers and exits are added to the loss of the outer class: where it takes none, nothing can add them."""
    if left.losses is not None and left.losses[0] and torch.is_grad_enabled():
        warnings.warn(
            f"{why}, so its losses ({', '.join(left.losses[0])}) are in no loss. Add outputs.losses_total to yours: their sum "
            "with coefficients.", UserWarning, stacklevel=5,
        )
