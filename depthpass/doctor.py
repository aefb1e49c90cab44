"""What this installation can do, and whether a config can be treated: versions, devices, capture."""

from __future__ import annotations

import importlib.util
import platform
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from depthpass.errors import UnsupportedModelError
from depthpass.prompt import at_prompt

REQUIRED = ("torch", "transformers", "safetensors", "networkx", "sympy", "pyyaml", "rich")
OPTIONAL = ("triton", "peft", "accelerate", "matplotlib")


@at_prompt
@dataclass(frozen=True)
class Finding:
    """One line.

    Attributes:
        topic: what was looked at.
        result: what was found.
        ok: False when depthpass cannot work with it; None for plain information.
    """

    topic: str
    result: str
    ok: bool | None = None


def examine(config: Any = None) -> list[Finding]:
    """Look at the installation and, when given, at a model or config.

    Args:
        config: as for :func:`depthpass.report.report`.

    Raises:
        InputError: the config cannot be read; a model that cannot be treated is a finding.
    """
    import depthpass

    findings = [
        Finding("depthpass", depthpass.__version__),
        Finding("python", f"{platform.python_version()} on {platform.platform()}"),
        *(_package(name, required=True) for name in REQUIRED),
        *(_package(name, required=False) for name in OPTIONAL),
        *_devices(),
        *(_part(name) for name in ("depthpass_lowering", "depthpass_kernels")),
    ]
    return findings if config is None else findings + _model(config)


def _package(name: str, *, required: bool) -> Finding:
    try:
        return Finding(name, metadata.version(name), True if required else None)
    except metadata.PackageNotFoundError:
        return Finding(name, "not installed" if required else "not installed (optional)", False if required else None)


def _part(name: str) -> Finding:
    """Whether one of our own packages can be found, without importing it."""
    there = importlib.util.find_spec(name) is not None
    return Finding(name, "found" if there else "not found: install depthpass, or put its folder on the path", there)


def _devices() -> list[Finding]:
    import torch

    findings = [Finding("cpu", f"{torch.get_num_threads()} threads")]
    if not torch.cuda.is_available():
        return [*findings, Finding("cuda", "no device; everything runs on the CPU")]
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        findings.append(Finding(f"cuda:{i}", f"{p.name}, {p.total_memory / 2**30:.0f} GiB, sm_{p.major}{p.minor}"))
    return findings


def _model(config: Any) -> list[Finding]:
    import torch

    from depthpass.capture import capture
    from depthpass.hf.facts import model_facts, stock_model

    findings: list[Finding] = []
    try:
        model = stock_model(config)
        findings.append(Finding("model", type(model).__name__, True))
        facts = model_facts(model)
        findings.append(Finding("blocks", f"{facts.blocks} of width {facts.width} at {facts.layers}", True))
        findings.append(Finding("KV values per token", "not known" if facts.kv_widths is None else
                                f"{sum(facts.kv_widths)} over all blocks"))
        ids = torch.zeros(2, 8, dtype=torch.long, device=next(model.parameters()).device)
        with torch.no_grad():
            captured = capture(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, {"use_cache": False})
    except UnsupportedModelError as error:
        return [*findings, Finding("capture" if findings else "model", f"refused: {error}", False)]
    templates = list({id(b.template): b.template for b in captured.blocks}.values())
    sites = sum(len(b.template.sites) for b in captured.blocks)
    return [*findings, Finding("capture", f"works: {len(templates)} different blocks, {sites} attention calls", True)]
