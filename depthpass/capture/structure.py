"""Copy a module tree for a trace: the same structure and tensors, nothing of what else hangs on the live one.

A deep copy reaches whatever the caller's tools have put on a model: FSDP's sharded parameters and states (which refuse to be
copied), tensors of a running function transform, hooks. A trace needs the classes, the plain attributes and the tensors'
shapes only.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor

HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks",
)


def structural_copy(
    model: nn.Module, leave: tuple[str, ...] = (), dtypes: Mapping[int, torch.dtype] | None = None,
    device: torch.device | None = None,
) -> nn.Module:
    """A copy that shares parameters and buffers where they are plain tensors, and stands in for them where they are not.

    Configs are copied, so are containers; functions and methods that belong to the old tree (a wrapper around a forward)
    belong to the new one. Hooks and checkpoints (also torch's wrapper modules) are left out, and so are the class that FSDP
    puts in front of a module's own and the forward that accelerate puts around it.

    Args:
        leave: attributes of the model that its copy does not get.
        dtypes: of tensors that have another one when they are used, by their ids.
        device: where the copy's tensors are; None = where they are now.
    """
    copier = _Copier()
    copier.dtypes, copier.device = dtypes or {}, device
    copier.leave = (model, leave)
    return copier.module(model)


def own_class(cls: type) -> type:
    """The class of a module without the one that FSDP2 (``fully_shard``) has put in front of it."""
    mro = cls.__mro__
    for i, base in enumerate(mro):
        if base.__name__ == "FSDPModule" and base.__module__.startswith("torch.distributed"):
            return mro[i + 1]
    return cls


def empty(cls: type) -> Any:
    """An object of a module class without anything, whose end is none of the live module's.

    Some adapters take their hooks off parameters when they are deleted (``__del__``): parameters and handles that a copy shares.
    """
    return object.__new__(_endless(cls) if hasattr(cls, "__del__") else cls)


@functools.cache
def _endless(cls: type) -> type:
    body = {"__del__": lambda self: None, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (cls,), body)


def is_config(value: object) -> bool:
    """Whether a value is a config of transformers, by what it can do: this module is imported without it."""
    return hasattr(type(value), "get_text_config") and hasattr(type(value), "to_dict")


def is_plain(tensor: Tensor) -> bool:
    """Whether a trace may read a tensor itself: no shard, wrapper of a function transform, quantised or inference tensor."""
    if is_functorch_wrapped_tensor(tensor) or tensor.is_inference():
        return False
    if type(tensor) in (nn.Parameter, Tensor):
        return True
    plain = (getattr(Tensor, "__torch_dispatch__"), torch._C._disabled_torch_dispatch_impl)  # noqa: B009  a bound C function
    return getattr(type(tensor), "__torch_dispatch__") in plain  # noqa: B009


class _Copier:
    """Working state of one copy."""

    def __init__(self) -> None:
        self.twins: dict[int, Any] = {}
        self.kept: list[Any] = []  # what is in `twins`: an id must not be given to another object meanwhile
        self.leave: tuple[nn.Module | None, tuple[str, ...]] = (None, ())
        self.room: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self.dtypes: Mapping[int, torch.dtype] = {}
        self.device: torch.device | None = None

    def keep(self, old: Any, new: Any) -> Any:
        self.twins[id(old)] = new
        self.kept.append(old)
        return new

    def module(self, old: nn.Module) -> Any:
        if id(old) in self.twins:
            return self.twins[id(old)]
        if isinstance(old, torch.jit.ScriptModule):
            return self.keep(old, copy.deepcopy(old))
        if (inner := old._modules.get("_checkpoint_wrapped_module")) is not None:
            return self.keep(old, self.module(inner))
        new = self.keep(old, empty(own_class(type(old))))
        left = self.leave[1] if old is self.leave[0] else ()
        table = {n: v for n, v in old.__dict__.items() if n not in left}
        if "_hf_hook" in table:
            _unhook(old, table)
        for name in HOOKS:
            if name in table:
                new.__dict__[name] = type(table[name])()
        new.__dict__["_modules"] = {n: m if m is None else self.module(m) for n, m in old._modules.items()}
        new.__dict__["_parameters"] = {n: self.parameter(p) for n, p in old._parameters.items()}
        new.__dict__["_buffers"] = {n: b if b is None else self.tensor(b) for n, b in old._buffers.items()}
        for name, value in table.items():
            if name not in HOOKS and name not in ("_modules", "_parameters", "_buffers"):
                new.__dict__[name] = self.value(value)
        if table.get("gradient_checkpointing", False):
            new.__dict__["gradient_checkpointing"] = False
        return new

    def parameter(self, old: Tensor | None) -> Tensor | None:
        # A functional call puts plain tensors in place of parameters, which a trace refuses.
        if old is None or (isinstance(old, nn.Parameter) and self.fits(old)):
            return old
        if id(old) not in self.twins:
            self.keep(old, nn.Parameter(self.stand_in(old), old.is_floating_point() or old.is_complex()))
        return self.twins[id(old)]

    def tensor(self, old: Tensor) -> Tensor:
        if self.fits(old):
            return old
        if id(old) in self.twins:
            return self.twins[id(old)]
        # The values of a table may be asked for.
        return self.keep(old, old.to(self.device) if is_plain(old) and not old.is_meta else self.stand_in(old))

    def fits(self, old: Tensor) -> bool:
        return is_plain(old) and (self.device is None or old.device == self.device)

    def stand_in(self, old: Tensor) -> Tensor:
        """A tensor of the same shape, dtype and device whose values nobody may read; all of them share one memory."""
        key, size = (self.dtypes.get(id(old), old.dtype), self.device or old.device), old.numel()
        if key not in self.room or self.room[key].numel() < size:
            self.room[key] = torch.empty(size, dtype=key[0], device=key[1])
        return self.room[key][:size].detach().view(old.shape)

    def value(self, old: Any) -> Any:
        """What an attribute of the old tree is in the new one."""
        if id(old) in self.twins:
            return self.twins[id(old)]
        if old is None or isinstance(old, str | int | float | torch.dtype | torch.device | type):
            return old
        if isinstance(old, Tensor):
            return self.tensor(old)
        if isinstance(old, nn.Module):
            return self.module(old)
        if is_config(old):
            new = self.keep(old, object.__new__(type(old)))
            new.__dict__.update({n: self.value(v) for n, v in old.__dict__.items()})
            return new
        if isinstance(old, list | set) and type(old) in (list, set):
            new = self.keep(old, type(old)())
            (new.extend if isinstance(new, list) else new.update)(map(self.value, old))
            return new
        if isinstance(old, dict):
            new = self.keep(old, copy.copy(old))
            for key, value in old.items():
                new[key] = self.value(value)
            return new
        if type(old) is tuple:
            return tuple(map(self.value, old))
        if isinstance(old, types.MethodType | types.FunctionType | functools.partial):
            return self.function(old)
        return self.holder(old)

    def function(self, old: Any) -> Any:
        """A function, with what it closes over taken from the new tree; the old one itself where that is nothing."""
        if id(old) in self.twins:
            return self.twins[id(old)]
        if isinstance(old, types.MethodType):
            owner, function = self.value(old.__self__), self.value(old.__func__)
            same = owner is old.__self__ and function is old.__func__
            return old if same else types.MethodType(function, owner)
        if isinstance(old, functools.partial):
            return functools.partial(
                self.value(old.func), *map(self.value, old.args), **{n: self.value(v) for n, v in old.keywords.items()}
            )
        self.keep(old, old)  # a function that closes over itself
        contents = [(c, _content(c)) for c in old.__closure__ or ()]
        mapped = [v if v is _EMPTY else self.value(v) for _, v in contents]
        defaults, keywords = self.value(old.__defaults__), self.value(old.__kwdefaults__)
        if all(v is m for (_, v), m in zip(contents, mapped)) and _same(defaults, old.__defaults__):
            return old
        cells = tuple(c if v is m else types.CellType(m) for (c, v), m in zip(contents, mapped))
        new = types.FunctionType(old.__code__, old.__globals__, old.__name__, defaults, cells)
        new.__kwdefaults__ = keywords
        new.__dict__.update(old.__dict__)
        return self.keep(old, new)

    def holder(self, old: Any) -> Any:
        """Any other object: shared, unless it holds a module or a config of the tree."""
        held = getattr(old, "__dict__", None)
        if not isinstance(held, dict) or isinstance(old, types.ModuleType) or not any(map(self.reaches, held.values())):
            return old
        try:
            new = copy.copy(old)
            self.keep(old, new)
            new.__dict__.update({n: self.value(v) for n, v in held.items()})
        except Exception:  # an object that cannot be copied is none that a layer computes with
            return self.keep(old, old)
        return new

    def reaches(self, value: Any) -> bool:
        return isinstance(value, nn.Module) or (is_config(value) and id(value) in self.twins)


def _unhook(old: nn.Module, table: dict[str, Any]) -> None:
    """Leave out of a module's table what accelerate has put around its forward."""
    inner = table.pop("_old_forward", None)
    del table["_hf_hook"]
    table.pop("forward", None)
    if inner is not None and getattr(inner, "__self__", None) is not old:
        table["forward"] = inner


_EMPTY = object()


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return _EMPTY


def _same(new: tuple | None, old: tuple | None) -> bool:
    return len(new or ()) == len(old or ()) and all(a is b for a, b in zip(new or (), old or ()))


def configs(model: nn.Module) -> Iterator[Any]:
    """Every config object that a module of the tree holds, each once."""
    seen: dict[int, Any] = {}
    for module in model.modules():
        for value in module.__dict__.values():
            if is_config(value) and id(value) not in seen:
                seen[id(value)] = value
    yield from seen.values()


def shallow_copy(module: nn.Module) -> nn.Module:
    """Another module of the same class with the same attributes. ``copy.copy`` pickles, which parametrized modules refuse."""
    twin = empty(type(module))
    twin.__dict__.update(module.__dict__)
    return twin
