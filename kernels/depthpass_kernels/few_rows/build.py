"""The C++ of a decoded token by name and dtype."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from depthpass_kernels import cpp, processor
from depthpass_kernels.few_rows import attention, product

TYPES = {torch.bfloat16: "at::BFloat16", torch.float16: "at::Half"}
SOURCES = {"product": product, "attention": attention}


@functools.cache
def load(name: str, dtype: torch.dtype) -> Callable[..., None] | Exception:
    """One of :data:`SOURCES` for a dtype of :data:`TYPES`, compiled, or why it cannot be had (no compiler, say)."""
    own, source = TYPES[dtype], SOURCES[name]
    count, near = processor.ahead()
    include = f"#include <torch/csrc/inductor/cpp_prefix.h>\n#include <vector>\nusing T = {own};\n"
    include += f"[[maybe_unused]] constexpr int AHEAD = {count} / sizeof(T), NEAR = {near};\n"
    return cpp.build(tuple(a.replace("T*", f"{own}*") for a in source.ARGUMENTS), include + source.SOURCE)


def obstacle(dtype: torch.dtype) -> str | None:
    """Why the compiled code is not to be had for a dtype on this machine, or None. Builds it at the first call."""
    if dtype not in TYPES:
        return f"it is for bfloat16 and float16, not {dtype}"
    failed = (built for name in SOURCES if isinstance(built := load(name, dtype), Exception))
    return next((f"{type(e).__name__}: {e}" for e in failed), None)
