"""What decides which library multiplies fastest on a processor."""

import torch


def vectors() -> str:
    """The vector instructions that torch's own kernels use here: ``AVX2``, ``AVX512``, or another architecture's."""
    return torch.backends.cpu.get_cpu_capability()


def onednn_leads() -> bool:
    """Whether oneDNN's float32 products are the fastest: it compiles its own for AVX-512, MKL has wide ones for Intel only."""
    return vectors() == "AVX512" and "Intel" not in torch.cpu.get_capabilities().get("cpu_name", "")
