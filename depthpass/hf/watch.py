"""Notice changes of a module tree that make a capture stale, cheaply enough to look before every call."""

from __future__ import annotations

from torch import Tensor, nn


class Watch:
    """What a capture depends on: the module tree, modes, dtypes, devices and adapter switches.

    Attributes:
        key: hashable; equal keys mean that a capture may be reused.
    """

    def __init__(self, model: nn.Module):
        modules = list(model.modules())
        self.modules = modules  # kept alive, so that no id below is ever reused
        self.children = [(m._modules, tuple(m._modules.items())) for m in modules if m._modules]
        self.modes = tuple(m.training for m in modules)
        self.parameters = [
            (m._parameters, k, p.dtype, p.device, len(m._parameters))
            for m in modules for k, p in m._parameters.items() if p is not None
        ]
        self.adapters = [(m, adapter_state(m)) for m in modules if hasattr(m, "merged_adapters")]
        self.key = (
            tuple(map(id, modules)), self.modes,
            tuple((k, dtype, device) for _, k, dtype, device, _ in self.parameters), tuple(s for _, s in self.adapters),
        )

    def current(self) -> bool:
        """Whether nothing has changed since this watch was made."""
        for table, items in self.children:
            if len(table) != len(items):
                return False
            for name, child in items:
                if table.get(name) is not child:
                    return False
        for module, mode in zip(self.modules, self.modes):
            if module.training is not mode:
                return False
        for table, name, dtype, device, count in self.parameters:
            p = table.get(name)
            if p is None or p.dtype is not dtype or p.device != device or len(table) != count:
                return False
        return all(adapter_state(m) == state for m, state in self.adapters)


def adapter_state(module: nn.Module) -> tuple:
    """The switches of a PEFT layer that a trace bakes in."""
    scaling = getattr(module, "scaling", None)
    return (
        module.disable_adapters, tuple(module.active_adapters), tuple(module.merged_adapters),
        tuple(scaling.items()) if isinstance(scaling, dict) else None,
    )


class Binding:
    """A parameter or buffer of a live module tree: looked up once, read at every call."""

    __slots__ = ("name", "table")

    def __init__(self, root: nn.Module, path: str):
        *parents, self.name = path.split(".")
        for part in parents:
            root = getattr(root, part)
        self.table = root._parameters if self.name in root._parameters else root._buffers
        if self.name not in self.table:
            raise AttributeError(f"{type(root).__name__} has no parameter or buffer {self.name!r}.")

    def __call__(self) -> Tensor:
        return self.table[self.name]
