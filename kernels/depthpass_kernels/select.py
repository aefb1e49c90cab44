"""Which implementation of an op runs: the plain-torch reference or the Triton kernel.

`implementation` is one of

- `"naive"`: the torch reference, on every device and floating dtype;
- `"triton"`: the Triton kernel, or `KernelUnavailableError` with the reason. Never another implementation in
  its place;
- `"auto"`: for CUDA tensors that the Triton kernel supports, when triton is installed, the faster one in the
  table of measurements (`depthpass_kernels.measured`); the reference everywhere else.

`set_auto(op, "naive")` takes an op off the rule for the whole process; passing `implementation=` overrides it
for one call. The choice is made when the op *runs*, so a graph traced on fake or meta tensors does not freeze
it.
"""

import functools
import importlib.util
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from depthpass_kernels import measured

IMPLEMENTATIONS = ("auto", "naive", "triton")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MIN_CAPABILITY = (8, 0)

_auto_on_cuda = {"slot_attention": "measured", "bridge_in": "measured", "gated_attention": "measured"}


class KernelUnavailableError(RuntimeError):
    """A kernel was asked for by name and cannot run here."""


def set_auto(op: str, implementation: str) -> str:
    """Set what `implementation="auto"` means for `op` on supported CUDA tensors; return the previous choice.

    Args:
        op: `"slot_attention"`, `"gated_attention"` or `"bridge_in"`.
        implementation: `"measured"` (the table), `"triton"` or `"naive"`.

    Example:
        >>> previous = set_auto("slot_attention", "naive")
        >>> set_auto("slot_attention", previous)
        'naive'
    """
    if op not in _auto_on_cuda:
        raise ValueError(f"set_auto: op: expected one of {sorted(_auto_on_cuda)}, got {op!r}")
    if implementation not in ("measured", "naive", "triton"):
        raise ValueError(f"set_auto: implementation: expected 'measured', 'naive' or 'triton', got {implementation!r}")
    previous, _auto_on_cuda[op] = _auto_on_cuda[op], implementation
    return previous


def check_name(op: str, implementation: str) -> None:
    """Raise ValueError unless `implementation` is a known name."""
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"{op}: implementation: expected one of {IMPLEMENTATIONS}, got {implementation!r}")


@functools.cache
def triton_installed() -> bool:
    """Whether triton can be imported, found out without importing it."""
    return importlib.util.find_spec("triton") is not None


def traced() -> bool:
    """Whether somebody records or interprets ops, so that a call has to appear as one registered op."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def remembered(size: int) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Return a cache of so many tensors, which are the same for all calls of a process.

    It is passed by while somebody records or interprets ops: a tensor of `FakeTensorMode` must not reach a later call.
    """

    def decorate(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.lru_cache(size)
        def kept(*args: Any) -> Tensor:
            # A tensor made in inference mode could not be used where gradients are.
            with torch.inference_mode(False), torch.no_grad():
                return make(*args)

        return functools.wraps(make)(lambda *args: make(*args) if traced() else kept(*args))

    return decorate


def interpreted() -> bool:
    """Whether triton runs its kernels in the CPU interpreter (imports triton)."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


def obstacle(tensor: Tensor, limit: str | None = None) -> str | None:
    """Say why a Triton kernel cannot take `tensor`, or return None if it can.

    Args:
        tensor: a representative operand (its device and dtype are read).
        limit: a reason of the op's own (a size the kernel does not support), or None.
    """
    if not triton_installed():
        return "triton is not installed (Linux: pip install 'depthpass[triton]')"
    if tensor.dtype not in KERNEL_DTYPES:
        return f"dtype {tensor.dtype} is not one of {', '.join(map(str, KERNEL_DTYPES))}"
    if limit is not None:
        return limit
    if tensor.device.type == "cuda":
        return _gpu_obstacle(tensor.device)
    if tensor.device.type == "meta" or interpreted():
        return None
    return f"tensors are on {tensor.device.type}, not cuda (TRITON_INTERPRET=1 allows the CPU, for tests)"


def _gpu_obstacle(device: torch.device) -> str | None:
    if torch.version.hip is not None:
        return "the kernels are compiled and tested for NVIDIA targets only"
    if torch.cuda.is_available() and torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        return f"compute capability {torch.cuda.get_device_capability(device)} is below {MIN_CAPABILITY}"
    return None


@functools.cache
def _say_reference(op: str, reason: str) -> None:
    """Once per reason: a GPU runs what is not its fastest."""
    logging.getLogger("depthpass").info("%s runs as plain torch ops on the GPU, because %s", op, reason)


def resolve(
    op: str,
    implementation: str,
    tensor: Tensor,
    limit: str | None = None,
    size: tuple[int, int, int] = (1, 1, 1),
    what: str = "forward",
) -> str:
    """Return `"naive"` or `"triton"` for a call on `tensor`, or raise KernelUnavailableError.

    Args:
        size: rows, queries and keys of the call, as the table of measurements has them.
        what: `"forward"` or `"forward and backward"`.
    """
    if implementation == "naive":
        return "naive"
    if implementation == "auto" and (tensor.device.type != "cuda" or _auto_on_cuda[op] == "naive"):
        return "naive"
    reason = obstacle(tensor, limit)
    if reason is None:
        if implementation == "auto" and _auto_on_cuda[op] == "measured" and torch.cuda.is_available():
            return measured.fastest(op, what, torch.cuda.get_device_capability(tensor.device), *size)
        return "triton"
    if implementation == "auto":
        _say_reference(op, reason)
        return "naive"
    raise KernelUnavailableError(
        f"{op}: implementation='triton' cannot run: {reason}. Use 'naive' or 'auto'."
    )
