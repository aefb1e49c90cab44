"""Later visits of a block in an emitted file, without weights of their own; copied there like :mod:`depthpass.emit.parts`."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn


class Again(nn.Module):
    """A later visit of a block, or a module of one: its place, and so its keys, are its own.

    Weights and sub-modules are those of the block's first visit, looked up there whenever they are asked for: whatever puts
    another module in place of one (adapters, quantisers, engines) does so for every visit.
    """

    borrowed: dict[str, str] = {}
    """Where in the first visit's block each of them stands."""

    def borrow(self, layers: nn.ModuleList, first: int, path: str, borrowed: dict[str, str]) -> None:
        # In a tuple, they are no sub-modules. Whatever wraps the first visit does so in the list.
        self.first, self.path, self.borrowed = (layers, first), path, borrowed

    def lent(self, path: str) -> Any:
        layers, first = self.first
        module = layers[first]
        for name in path.split(".") if path else ():
            module = getattr(module, name)
        return module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in self.borrowed:
                return self.lent(self.borrowed[name])
            # What an engine has put there beside: one map in the place of several.
            if self.borrowed and name in (held := self.lent(self.path)._modules):
                return held[name]
            raise

    def _replicate_for_data_parallel(self) -> Any:
        raise NotImplementedError("nn.DataParallel copies modules one by one, and later visits of a block look their weights up "
                                  "at its first visit. Run a process per device (torchrun, accelerate), or emit(copies=True).")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        first, run = self.lent(self.path), super().forward
        while not hasattr(type(first), "_get_fsdp_state") and "_checkpoint_wrapped_module" in first._modules:
            first = first._modules["_checkpoint_wrapped_module"]
        if hasattr(type(first), "_get_fsdp_state"):
            # FSDP2 gathers weights in hooks of the unit that holds them: this visit is a call of that one.
            return through(first, run, *args, **kwargs)
        hook, own = first.__dict__.get("_hf_hook"), first.__dict__.get("forward")
        if getattr(own, "__self__", None) is first:
            # An engine has written another forward for the first visit's modules, which it has fused.
            run = own.__func__.__get__(self)
        if hook is None:
            return run(*args, **kwargs)
        # accelerate moves what the first visit reads, or loads its weights: so here.
        args, kwargs = hook.pre_forward(first, *args, **kwargs)
        return hook.post_forward(first, run(*args, **kwargs))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # A copy of the model has copied the first visit by now; a copy of this one alone stays with the one that there is.
        if self.borrowed:
            memo.setdefault(id(self.first[0]), self.first[0])
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied


def through(unit: nn.Module, run: Any, *args: Any, **kwargs: Any) -> Any:
    """A call of a module, with its hooks, that runs another forward."""
    own = unit.__dict__.pop("forward", None)
    unit.forward = run
    try:
        # Not by a layer's own __call__: a later visit's has put an activation checkpoint around this already.
        return nn.Module.__call__(unit, *args, **kwargs)
    finally:
        del unit.forward
        if own is not None:
            unit.forward = own


class LowRankLinear(Again):
    """A linear map that visits share, with a low-rank update of this visit's own."""

    def __init__(self, base: Any, rank: int):
        super().__init__()
        self.base = base
        self.a = nn.Parameter(base.weight.new_zeros(rank, base.weight.shape[1]))
        self.b = nn.Parameter(base.weight.new_zeros(base.weight.shape[0], rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + nn.functional.linear(nn.functional.linear(x, self.a), self.b)


class LowRankConv1D(LowRankLinear):
    """The same of a linear map whose weight is ``[in, out]``."""

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.b @ self.a


def own(block: nn.Module) -> bool:
    """Whether visits of a block differ in a module or below it: it knows its layer's number, or has an update."""
    return any(hasattr(m, "layer_idx") or isinstance(m, Again) for m in block.modules())


def share(layers: nn.ModuleList, blocks: list[int], kinds: dict[type, type]) -> None:
    """Leave the weights of every block to its first visit; ``kinds``: the classes of later ones."""
    for place, block in enumerate(blocks):
        if (first := blocks.index(block)) < place:
            lend(layers, first, layers[place], "", kinds)


def lend(layers: nn.ModuleList, number: int, later: Any, path: str, kinds: dict[type, type]) -> None:
    """Let a module of a later visit have nothing that the first one, of that number, has at ``path``, but what differs."""
    first, borrowed = layers[number].get_submodule(path), {}
    for name, child in list(later.named_children()):
        at, theirs = f"{path}.{name}".lstrip("."), getattr(first, name)
        base = f"{at}.base" if isinstance(theirs, Again) else at
        if isinstance(child, Again):
            child.borrow(layers, number, at, {"base": base})
            del child.base
        elif own(child) or (own(theirs) and base == at):
            lend(layers, number, child, at, kinds)
        else:
            borrowed[name] = base
            delattr(later, name)
    for name in [*later._parameters, *later._buffers]:
        borrowed[name] = f"{path}.{name}".lstrip(".")
        delattr(later, name)
    later.__class__ = kinds[type(later)]
    later.borrow(layers, number, path, borrowed)
