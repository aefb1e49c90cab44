"""Child process: compile the Triton kernels for one architecture, no GPU needed, and print what came out.

Started by test_triton.py without TRITON_INTERPRET, with 80, 90 or 100. One JSON object per kernel. The
launches are the ones a real call would make, planned on meta tensors.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from depthpass_kernels.bridge import triton as bridge_kernels
from depthpass_kernels.bridge.problem import BridgeIn
from depthpass_kernels.gated_attention import triton as gated_kernels
from depthpass_kernels.gated_attention.problem import Gated
from depthpass_kernels.launch import Launch
from depthpass_kernels.slot_attention import columns_triton
from depthpass_kernels.slot_attention import triton as attention_kernels
from depthpass_kernels.slot_attention.problem import Problem
from torch import Tensor

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
HALF = torch.bfloat16
MATRIX = ("mma.sync", "wgmma.mma_async", "tcgen05.mma")


def empty(*shape: int, dtype: torch.dtype = HALF) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def attention(width: int, length: int, everything: bool, dtype: torch.dtype = HALF, **more: Any) -> Problem:
    """A group of 4 heads, a chunk of `length` against 4096 keys, with every option on or none."""
    batch, heads, key_heads, keys = 8, 32, 8, 4096
    options: dict[str, Any] = dict.fromkeys(
        ("valid", "row_start", "sinks", "q_offset", "window", "chunk", "softcap"), None
    )
    if everything:
        options |= dict(valid=empty(batch, keys, dtype=torch.bool), row_start=empty(batch, dtype=torch.int64))
        options |= dict(sinks=empty(heads, dtype=dtype), q_offset=empty(1, dtype=torch.int64))
        options |= dict(window=1024, chunk=2048, softcap=30.0)
    return Problem(
        q=empty(batch, length, heads, width, dtype=dtype).transpose(1, 2),
        k=empty(batch, key_heads, keys, width, dtype=dtype),
        v=empty(batch, key_heads, keys, width, dtype=dtype),
        **options | dict(q_start=160, scale=width**-0.5) | more,
    )


def attention_launches(p: Problem, splits: int = 1, accumulate: bool = False) -> list[Launch]:
    out, lse, (dk, dv) = p.new_output(), p.new_lse(), p.new_dkv()
    if accumulate:
        dk, dv = dk.float(), dv.float()
    forward = attention_kernels.plan_forward(p, out, lse, splits)
    return forward + attention_kernels.plan_backward(p, out, out, lse, lse, p.new_dq(), dk, dv, accumulate)


def gated_launches(width: int, length: int, everything: bool) -> list[Launch]:
    """A group of 4 heads against 4096 shared keys and a window of 64, as prefill and as decoding."""
    batch, heads, key_heads, keys = 8, 32, 8, 4096
    start = keys - length
    own = empty(batch, key_heads, length + min(64, start), width)
    shared = empty(batch, key_heads, keys, width)
    p = Gated(
        empty(batch, length, heads, width).transpose(1, 2), shared, shared, own, own, empty(batch, length, heads),
        empty(batch, keys, dtype=torch.bool) if everything else None, start, width**-0.5, 64, 1024 if everything else None,
    )
    out, lse, dq = p.new_output(), p.new_lse(), empty(batch, length, heads, width)
    saved = (out, out, lse, lse) if everything else (None,) * 4
    return [
        *gated_kernels.plan_forward(p, out, *saved),
        *gated_kernels.plan_backward(p, out, out, out, lse, lse, lse, lse, dq, shared, shared, own, own, p.score),
    ]


def bridge_launches(rows: int, dim: int, rank: int) -> list[Launch]:
    present = empty(rows, dtype=torch.bool)
    p = BridgeIn(
        empty(rows, dim), empty(rows, rank), empty(dim, rank), empty(dim), present, empty(dim), 0.1, 1e-5, 0.0
    )
    y, z, rstd = p.new_outputs()
    partial = empty(bridge_kernels.MAX_PARTIALS, dim, dtype=torch.float32)
    return [
        *bridge_kernels.plan_forward(p, y, z, rstd),
        bridge_kernels.plan_norm_backward(p, y, z, y, rstd, y, partial),
    ]


def launches(arch: int) -> Iterator[tuple[str, Launch]]:
    """What to compile, by name. A chunk of 64 fills the large tiles; 4, and 1 (decoding), the small."""
    for width in (64, 128):
        for launch in attention_launches(attention(width, 64, everything=True)):
            yield f"head_dim {width}", launch
    for launch in gated_launches(128, 64, everything=True):
        yield "gated, head_dim 128", launch
    for launch in bridge_launches(128, 2048, 120):
        yield "bridge", launch
    own = [empty(32, 8, 8, 64).transpose(1, 2)] * 2
    yield "columns", columns_triton.plan([empty(32, 8, 160, 64, dtype=torch.float32)[:, :, :8]] * 2, own)
    if arch != 90:
        return
    for launch in gated_launches(64, 4096, everything=False):
        yield "gated, head_dim 64, a whole row", launch
    yield "gated, head_dim 128, one token", gated_launches(128, 1, everything=True)[0]
    for launch in attention_launches(attention(128, 4, everything=False)):
        yield "head_dim 128, chunk of 4, causal only", launch
    for launch in attention_launches(attention(128, 1, everything=True), splits=8)[:2]:
        yield "head_dim 128, one token, 8 shares", launch
    yield (
        "head_dim 64, into float32 buffers",
        attention_launches(attention(64, 64, True), accumulate=True)[-1],
    )
    for launch in attention_launches(attention(96, 64, True, torch.float16)):
        yield "head_dim 96, float16", launch


def main() -> None:
    arch = int(sys.argv[1])
    for name, launch in launches(arch):
        compiled = launch.compile(arch)
        cubin, ptx = compiled.asm["cubin"], compiled.asm["ptx"]
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(cubin)
            file.flush()
            command = [CUOBJDUMP, "--dump-resource-usage", file.name]
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        actual = {key.lower(): int(n) for key, n in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
        record = {"name": name, "kernel": launch.kernel.__name__, "rows": launch.tile.m, "cubin": len(cubin)}
        record |= {"shared": compiled.metadata.shared, "matrix": [m for m in MATRIX if m in ptx]}
        print(
            json.dumps(record | actual | {"copies": len(re.findall(r"cp\.async\.c[ag]\.", ptx))}), flush=True
        )


if __name__ == "__main__":
    main()
