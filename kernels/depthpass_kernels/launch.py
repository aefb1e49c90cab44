"""One Triton launch as a value: what a GPU call runs is also what ahead-of-time compilation checks.

triton is imported inside the functions, so importing this module costs nothing.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

POINTER = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}


@dataclass(frozen=True)
class Tile:
    """Block sizes and compile options of one kernel."""

    m: int
    n: int
    warps: int = 4
    stages: int = 2


@dataclass(frozen=True)
class Launch:
    """A kernel with its grid and arguments by name, ready to run or to compile.

    Args:
        kernel: a `triton.jit` function.
        grid: number of programs along each axis.
        args: every argument by name: tensors, None for an absent tensor, ints, floats, constexpr values.
        tile: supplies `num_warps` and `num_stages`.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: Mapping[str, Any]
    tile: Tile

    @property
    def options(self) -> dict[str, Any]:
        """Compile options. FMA contraction is named because triton 3.10 changes its default."""
        return {"num_warps": self.tile.warps, "num_stages": self.tile.stages, "enable_fp_fusion": True}

    def run(self) -> None:
        """Launch on the device of the tensor arguments; an empty grid does nothing."""
        if 0 in self.grid:
            return
        device = next(a.device for a in self.args.values() if isinstance(a, Tensor))
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            self.kernel[self.grid](**self.args, **self.options)

    def compile(self, arch: int) -> Any:
        """Compile for compute capability `arch` (80, 90, 100) on a machine with or without a GPU.

        Pointers and integers divisible by 16 are marked so, as a launch would infer. Must not share a process
        with the interpreter, which patches `triton.language` for good.
        """
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        signature, constants, attributes = {}, {}, {}
        unspecialized = {p.name for p in self.kernel.params if p.do_not_specialize}
        for position, param in enumerate(self.kernel.params):
            value = self.args[param.name]
            if param.is_constexpr or value is None:
                signature[param.name], constants[param.name] = "constexpr", value
            elif isinstance(value, Tensor):
                signature[param.name] = POINTER[value.dtype]
                attributes[(position,)] = [["tt.divisibility", 16]]
            elif isinstance(value, float):
                signature[param.name] = "fp32"
            elif value == 1 and param.name not in unspecialized:
                signature[param.name], constants[param.name] = "constexpr", 1
            else:
                signature[param.name] = "i32" if abs(value) < 2**31 else "i64"
                if value % 16 == 0 and param.name not in unspecialized:
                    attributes[(position,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constants, attributes)
        return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=self.options)


def power_of_two(n: int) -> int:
    """Return the least power of two >= `n`, at least 16, the smallest block a matrix instruction takes."""
    return max(16, 1 << (n - 1).bit_length())


def cdiv(a: int, b: int) -> int:
    """Return `a / b` rounded up."""
    return -(-a // b)
