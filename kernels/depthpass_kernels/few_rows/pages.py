"""Weights on huge pages: a token that reads all of them spends a tenth of its time and more on looking up small ones."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import Parameter

HUGE = 1 << 21
"""Bytes of a huge page, and the smallest stretch that is worth asking for one."""
_COLLAPSE = 25
"""MADV_COLLAPSE of Linux 6.1 and later: moves what lies on small pages to huge ones, where it stands."""


def on_huge_pages(tensors: Iterable[Tensor]) -> int:
    """Ask the system to hold CPU tensors on huge pages, which changes no value and no address.

    Returns:
        bytes that it has moved; 0 where it knows no such thing, or is told never to.
    """
    if sys.platform != "linux":
        return 0
    libc = ctypes.CDLL(None, use_errno=True)
    moved = 0
    for tensor in tensors:
        # Others (quantised weights, sharded ones) may have no storage of their own.
        if type(tensor) not in (Tensor, Parameter) or tensor.device.type != "cpu" or tensor.layout is not torch.strided:
            continue
        storage = tensor.untyped_storage()
        begin = -(-storage.data_ptr() // HUGE) * HUGE
        size = (storage.data_ptr() + storage.nbytes()) // HUGE * HUGE - begin
        if size > 0 and libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), _COLLAPSE) == 0:
            moved += size
    return moved
