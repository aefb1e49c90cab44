"""What a program does to stock weights once: blocks that start from an average, blocks that no visit runs any more."""

from __future__ import annotations

import torch
from torch import nn

from depthpass.errors import UnsupportedModelError
from depthpass.ir.program import Program


def check_weights(blocks: nn.ModuleList, program: Program) -> None:
    """Refuse an average of blocks that are not alike.

    Raises:
        UnsupportedModelError: naming the blocks and the parameter in which they differ.
    """
    for o in program.ops:
        if o.kind != "average":
            continue
        first, *others = ({n: tuple(p.shape) for n, p in blocks[i].named_parameters()} for i in o["blocks"])
        for index, other in zip(o["blocks"][1:], others):
            if different := sorted(n for n in first.keys() | other.keys() if first.get(n) != other.get(n)):
                raise UnsupportedModelError(
                    f"blocks {o['blocks'][0]} and {index} cannot be averaged: {different[0]} is {first.get(different[0])} in "
                    f"one and {other.get(different[0])} in the other. Use init='stepwise', 'first' or 'last'."
                )


@torch.no_grad()
def start_weights(blocks: nn.ModuleList, program: Program) -> None:
    """Give a model, which shares its parameters with the given one, the weights its program starts from.

    Averages become new parameters and retired blocks frozen aliases, so the given model does not change.
    """
    new: list[tuple[nn.Module, str, nn.Parameter]] = []
    for o in program.ops:
        if o.kind == "average":
            sources = [dict(blocks[i].named_parameters()) for i in o["blocks"]]
            for path, p in blocks[o["index"]].named_parameters():
                wide = p.dtype if p.dtype == torch.float64 else torch.float32
                mean = torch.stack([s[path].to(wide) for s in sources]).mean(0)
                new.append((*_owner(blocks[o["index"]], path), nn.Parameter(mean.to(p.dtype), p.requires_grad)))
    for module, name, p in new:
        module._parameters[name] = p
    retire(blocks, program, frozen=True)


def retire(blocks: nn.ModuleList, program: Program, *, frozen: bool) -> None:
    """Make the parameters of retired blocks aliases that are frozen, or that train again."""
    gone = [o["index"] for o in program.ops if o.kind == "retire"]
    live = {id(p) for i, block in enumerate(blocks) if i not in gone for p in block.parameters()}
    for i in gone:
        for path, p in list(blocks[i].named_parameters()):
            if id(p) not in live and p.is_floating_point():
                module, name = _owner(blocks[i], path)
                module._parameters[name] = nn.Parameter(p.detach(), requires_grad=not frozen)


def _owner(root: nn.Module, path: str) -> tuple[nn.Module, str]:
    parent, _, name = path.rpartition(".")
    return root.get_submodule(parent), name
