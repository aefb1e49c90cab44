"""What decides how a processor multiplies and reads fastest."""

import torch


def vectors() -> str:
    """The vector instructions that torch's own kernels use here: ``AVX2``, ``AVX512``, or another architecture's."""
    return torch.backends.cpu.get_cpu_capability()


def intel() -> bool:
    """Whether this is one of Intel's processors."""
    return "Intel" in torch.cpu.get_capabilities().get("cpu_name", "")


def onednn_leads() -> bool:
    """Whether oneDNN's float32 products are the fastest: it compiles its own for AVX-512, MKL has wide ones for Intel only."""
    return vectors() == "AVX512" and not intel()


def ahead() -> tuple[int, int]:
    """How many bytes ahead memory is asked for that is read once, and how near it comes (``__builtin_prefetch``): 3 = the first
    cache, 2 = the second, which waits for more of it at a time."""
    return (8192, 2) if intel() else (4096, 3)
