"""Keys and values of a chunk to and from the columns of a buffer."""

from torch import Tensor

from depthpass_kernels.select import KERNEL_DTYPES, obstacle, traced

Pair = tuple[Tensor, Tensor] | list[Tensor]


def copy_columns(to: Pair, source: Pair, implementation: str = "auto") -> None:
    """Copy keys and values to tensors of their shapes, whatever their strides and dtypes.

    A token loop does so for every chunk and block: on CUDA both are one launch. Without gradients.

    Args:
        to: keys [B, H, C, D] and values [B, H, C, Dv], written.
        source: the same, read.
        implementation: `"auto"`, `"naive"` (two copies) or `"triton"`.
    """
    if implementation == "triton" or (implementation == "auto" and _runs_here(to, source)):
        from depthpass_kernels.slot_attention import columns_triton as kernels

        kernels.plan(to, source).run()
        return
    for target, x in zip(to, source, strict=True):
        target.copy_(x)


def _runs_here(to: Pair, source: Pair) -> bool:
    first = to[0]
    if not first.is_cuda or traced() or obstacle(first) is not None or not first.numel():
        return False
    return all(t.dtype in KERNEL_DTYPES and t.stride(-1) == 1 for t in (*to, *source))
