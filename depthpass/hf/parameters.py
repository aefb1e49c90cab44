"""New parameters of a program as modules under ``depth.``."""

from __future__ import annotations

import torch
from torch import nn

from depthpass.errors import UnsupportedModelError
from depthpass.ir.program import Program
from depthpass.ir.verify import infer, parameters


class DepthParameters(nn.Module):
    """Container of the new parameters; prints as the program they belong to."""

    def __init__(self, text: str = ""):
        super().__init__()
        self.text = text

    def __repr__(self) -> str:
        return self.text or super().__repr__()


class Weigh(nn.Module):
    """Times a learned vector ``[width]``."""

    def __init__(self, width: int, fill: float):
        super().__init__()
        self.weight = nn.Parameter(torch.full((width,), fill))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


def build(program: Program, like: torch.Tensor) -> DepthParameters:
    """Create the new parameters of a program.

    Args:
        like: a parameter of the stock model; the new ones get its dtype and device.
    """
    types = infer(program)
    declared = parameters(program, types)
    root = DepthParameters(str(program))
    for o in program.ops:
        name = o["name"] if o.kind in ("linear", "weigh", "rms") else None
        if not name or _has(root, name):
            continue
        if o.kind == "linear":
            weight = declared[f"{name}.weight"]
            module: nn.Module = nn.Linear(weight.shape[1], weight.shape[0], bias=bool(o["bias"]), device=like.device)
            _initialise(module, weight.init, bool(o["identity"]))
        else:
            weight = declared[f"{name}.weight"]
            module = Weigh(weight.shape[0], float(weight.fill)).to(like.device)
        _attach(root, name, module.to(dtype=like.dtype))
    return root


def _initialise(module: nn.Linear, std: float, identity: bool) -> None:
    if module.weight.is_meta:
        return
    with torch.no_grad():
        if std:
            module.weight.normal_(0.0, std)
        else:
            module.weight.zero_()
        if identity:
            # The trailing square block is the identity: of concatenated inputs, the last one passes through.
            out = module.out_features
            module.weight.zero_()
            module.weight[:, -out:].fill_diagonal_(1.0)
        if module.bias is not None:
            module.bias.zero_()


def _has(root: nn.Module, name: str) -> bool:
    try:
        root.get_submodule(name)
    except AttributeError:
        return False
    return True


def _attach(root: nn.Module, name: str, module: nn.Module) -> None:
    *parents, leaf = name.split(".")
    for part in parents:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root._modules[part]
    if leaf in root._modules:
        raise UnsupportedModelError(f"new parameter {name!r} clashes with another one.")
    root.add_module(leaf, module)
