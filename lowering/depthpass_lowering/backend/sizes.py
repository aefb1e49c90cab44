"""Let Dynamo trace a frame again with the symbolic sizes that a token loop needs.

Dynamo makes a size symbolic only after it has changed once, or when its tensor is marked, and with ``dynamic=True`` it
makes Python numbers of the model (the epsilon of a norm) inputs of the graph. Restarting the trace is what torch's own
passes do when they find that a number must be fixed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn


def restart_with_symbolic_sizes(gm: fx.GraphModule, arguments: Sequence[object], model: nn.Module) -> None:
    """Restart the trace when batch or tokens are fixed for want of a second example, or a number is not fixed.

    Sizes that the user has fixed (``dynamic=False``, ``mark_static``) stay so. Returns when there is nothing to change.
    """
    from torch._dynamo.exc import TensorifyScalarRestartAnalysis

    own = {id(t) for t in (*model.parameters(), *model.buffers())}
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    changed = [_fix_number(n.meta["example_value"]) for n in placeholders]
    if torch._dynamo.config.automatic_dynamic_shapes or not torch._dynamo.config.assume_static_by_default:
        for node, value in zip(placeholders, arguments, strict=True):
            if isinstance(value, Tensor) and id(value) not in own and value.dim() in (2, 3):
                changed.append(_free_sizes(value, node.meta["example_value"].shape))
    if any(changed):
        raise TensorifyScalarRestartAnalysis(restart_reason="depthpass needs symbolic sizes and fixed numbers")


def _free_sizes(tensor: Tensor, shape: torch.Size) -> bool:
    """Mark batch and tokens of an input as dynamic; whether that is new. A size of 1 is always fixed."""
    known = getattr(tensor, "_dynamo_weak_dynamic_indices", set()) | getattr(tensor, "_dynamo_static_indices", set())
    new = [d for d in (0, 1) if isinstance(shape[d], int) and shape[d] > 1 and d not in known]
    torch._dynamo.maybe_mark_dynamic(tensor, new)
    return bool(new)


def _fix_number(value: object) -> bool:
    """Ask for a Python float that became an input to be a constant; whether that is new."""
    from torch._dynamo.symbolic_convert import TensorifyState

    number = getattr(value, "item_memo", None)
    name = getattr(number.node._expr, "name", None) if isinstance(number, torch.SymFloat) else None
    if name is None or TensorifyState.should_specialize(name):
        return False
    TensorifyState.specialize(name)
    return True
