"""What a program does to weights once: blocks that start from an average, low-rank updates that start from what tying blocks
has taken away, blocks that no visit runs any more."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from depthpass.errors import UnsupportedModelError
from depthpass.hf.modules.parameters import LowRank, linear_maps
from depthpass.ir.program import Program


def check_weights(blocks: nn.ModuleList, program: Program) -> None:
    """Refuse an average of blocks that are not alike, and updates towards a block that is not like the one that runs.

    Raises:
        UnsupportedModelError: naming the blocks and the parameter in which they differ.
    """
    for o in program.ops:
        untied = o.kind == "block" and o["untied"] is not None
        if o.kind != "average" and not untied:
            continue
        alike = (o["index"], o["untied"]) if untied else o["blocks"]
        first, *others = ({n: tuple(p.shape) for n, p in blocks[i].named_parameters()} for i in alike)
        for index, other in zip(alike[1:], others):
            if different := sorted(n for n in first.keys() | other.keys() if first.get(n) != other.get(n)):
                what, remedy = ("tied", "Leave one of them out of the range") if untied else (
                    "averaged", "Use init='stepwise', 'first' or 'last'")
                raise UnsupportedModelError(
                    f"blocks {alike[0]} and {index} cannot be {what}: {different[0]} is {first.get(different[0])} in "
                    f"one and {other.get(different[0])} in the other. {remedy}."
                )


@torch.no_grad()
def start_weights(blocks: nn.ModuleList, program: Program, depth: nn.Module) -> None:
    """Give a model, which shares its parameters with the given one, the weights its program starts from.

    Averages become new parameters and retired blocks frozen aliases, so the given model does not change.

    Args:
        depth: the new parameters, of which low-rank updates get their start.
    """
    untied = {o["untied"] for o in program.visits if o["untied"] is not None}
    own = {i: {path: m.weight.detach() for path, m in linear_maps(blocks[i])} for i in untied}
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
    for o in program.visits:
        if o["untied"] is not None:
            _untie(depth.get_submodule(o["lora"]), dict(linear_maps(blocks[o["index"]])), own[o["untied"]])
    retire(blocks, program, frozen=True)


def _untie(updates: nn.Module, shared: dict[str, nn.Module], own: dict[str, torch.Tensor]) -> None:
    """Let low-rank updates start as the best approximation of what own weights differ by from shared ones."""
    for path, update in updates.named_modules():
        if not isinstance(update, LowRank):
            continue
        held = cast(torch.Tensor, shared[path].weight)
        if held.is_meta:
            continue
        wide = held.dtype if held.dtype == torch.float64 else torch.float32
        change = own[path].to(wide) - held.to(wide)
        if not bool(change.any()):
            continue  # the block itself: an update that has yet to learn keeps its usual start
        u, s, v = torch.linalg.svd(change, full_matrices=False)
        rank = min(update.a.shape[0], len(s))
        root = s[:rank].sqrt()
        update.a.zero_()
        update.a[:rank] = (root[:, None] * v[:rank]).to(update.a.dtype)
        update.b[:, :rank] = (u[:, :rank] * root).to(update.b.dtype)


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
