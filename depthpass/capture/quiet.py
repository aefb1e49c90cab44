"""Trace a model as if nothing else were going on: no modes, transforms, hooks or autocast of the caller.

The first call of a transformed model may come from anywhere: inside ``torch.func.grad``, under FlopCounterMode, in a
profiler's global hooks, in inference mode. What it captures is kept, so it must not depend on that.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
from torch._C import _len_torch_function_stack
from torch._C._autograd import _top_saved_tensors_default_hooks
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.nn.modules import module as _module
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode_temporarily
from torch.utils._python_dispatch import _disable_current_modes

from depthpass.errors import UnsupportedModelError

_GLOBAL_HOOKS = (
    "_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks", "_global_backward_pre_hooks",
    "_global_forward_hooks_always_called", "_global_forward_hooks_with_kwargs",
)


def _keep_the_device_guard() -> None:
    """What tracing sets by this call goes away, in torch 2.11, with the thread that called it first: when that was over, the next
    capture of the process was a segmentation fault. So a thread that never ends calls it first."""
    done = threading.Event()

    def work() -> None:
        torch._C._ensureCUDADeviceGuardSet()
        done.set()
        threading.Event().wait()

    threading.Thread(target=work, name="depthpass-device-guard", daemon=True).start()
    done.wait()


if not torch.cuda.is_available() and hasattr(torch._C, "_ensureCUDADeviceGuardSet"):
    if threading.current_thread() is threading.main_thread():
        torch._C._ensureCUDADeviceGuardSet()
    else:
        _keep_the_device_guard()


@contextmanager
def quiet(device: torch.device) -> Iterator[None]:
    """Leave the caller's context for the time of a capture.

    Args:
        device: where the model's tensors are: autocast is switched off for it and for the CPU.
    """
    with ExitStack() as stack:
        stack.enter_context(_disable_current_modes())
        # Modes of functions: `with torch.device(...)` above all.
        while _len_torch_function_stack():
            stack.enter_context(_pop_mode_temporarily())
        stack.enter_context(temporarily_clear_interpreter_stack())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(without_autocast(torch.device("cpu")))
        stack.enter_context(without_autocast(device))
        # Hooks on saved tensors (offloading, checkpoints) cannot be taken off, only covered.
        if _top_saved_tensors_default_hooks(True) is not None:
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t))
        stack.enter_context(torch.autograd.set_detect_anomaly(False))
        stack.enter_context(_without_global_hooks())
        yield


def without_autocast(device: torch.device) -> AbstractContextManager:
    """No autocast on a device; the meta device has none."""
    return torch.autocast(device.type, enabled=False) if torch.amp.is_autocast_available(device.type) else nullcontext()


def global_hook_tables() -> tuple[dict, ...]:
    """Where torch keeps the hooks of all modules of the process."""
    return tuple(getattr(_module, name) for name in _GLOBAL_HOOKS)


def function_modes() -> list[TorchFunctionMode]:
    """The modes around a call that see the functions which it calls, except torch's own (``with torch.device(...)``)."""
    return [m for m in _get_current_function_mode_stack() if not type(m).__module__.startswith("torch.")]


def check_modes() -> None:
    """Refuse modes of functions: a captured graph calls the ops below ``torch.nn.functional``.

    Raises:
        UnsupportedModelError: naming such a mode.
    """
    for mode in function_modes():
        raise UnsupportedModelError(
            f"{type(mode).__qualname__} is a TorchFunctionMode around the call: stock blocks would hand it the functions that "
            "they call, those of a transformed model, which run as captured graphs, only the ops below them. Use a "
            "TorchDispatchMode, or hooks on modules."
        )


@contextmanager
def _without_global_hooks() -> Iterator[None]:
    tables = global_hook_tables()
    kept = [dict(t) for t in tables]
    for table in tables:
        table.clear()
    try:
        yield
    finally:
        for table, items in zip(tables, kept):
            table.update(items)
