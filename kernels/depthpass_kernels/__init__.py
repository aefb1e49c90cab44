"""Kernels of depthpass: grouped slot attention and the fused bridge, each with a plain-torch reference.

Importing this package registers the ops in `torch.ops.depthpass_kernels` and needs torch alone; triton is
imported when a kernel first runs.
"""

from depthpass_kernels.bridge.api import bridge_in, bridge_out, fold_streams, fold_weights
from depthpass_kernels.gated_attention.api import gated_attention
from depthpass_kernels.select import KernelUnavailableError, set_auto
from depthpass_kernels.slot_attention.api import (
    slot_attention,
    slot_attention_backward,
    slot_attention_forward,
    slot_attention_naive,
)

__all__ = [
    "KernelUnavailableError",
    "bridge_in",
    "bridge_out",
    "fold_streams",
    "fold_weights",
    "gated_attention",
    "set_auto",
    "slot_attention",
    "slot_attention_backward",
    "slot_attention_forward",
    "slot_attention_naive",
]
