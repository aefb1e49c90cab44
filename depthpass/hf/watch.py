"""Notice changes of a module tree that make a capture stale, cheaply enough to look before every call."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from depthpass.errors import UnsupportedModelError


class Key:
    """A value that is hashed once: it is looked up at every call."""

    __slots__ = ("hash", "value")

    def __init__(self, value: tuple):
        self.value, self.hash = value, hash(value)

    def __hash__(self) -> int:
        return self.hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Key) and self.value == other.value)


class Watch:
    """What a capture depends on: the module tree, modes, dtypes, devices, hooks, dropout and adapter switches.

    Attributes:
        key: hashable; equal keys mean that a capture may be reused.
        found: submodules looked up by (identity of their root, path).
    """

    def __init__(self, model: nn.Module):
        modules = list(model.modules())
        self.modules = modules  # kept alive, so that no id below is ever reused
        self.children = [(m._modules, tuple(m._modules.items())) for m in modules if m._modules]
        # Tables, not attributes: looking through them at every call has to be cheap.
        self.states = [(m.__dict__, m.training, has_hooks(m)) for m in modules]
        self.rates = [(m, m.p) for m in modules if isinstance(m, _DropoutNd)]
        self.parameters = [
            (m._parameters, k, p.dtype, p.device, len(m._parameters))
            for m in modules for k, p in m._parameters.items() if p is not None
        ]
        self.adapters = [(m, adapter_state(m)) for m in modules if hasattr(m, "merged_adapters")]
        self.key = Key((
            tuple(map(id, modules)), tuple(mode for _, mode, _ in self.states), tuple(p for _, p in self.rates),
            tuple((k, dtype, device) for _, k, dtype, device, _ in self.parameters), tuple(s for _, s in self.adapters),
        ))
        self.found: dict[tuple[int, str], nn.Module] = {}

    def current(self) -> bool:
        """Whether nothing has changed since this watch was made."""
        for table, items in self.children:
            if len(table) != len(items):
                return False
            for name, child in items:
                if table.get(name) is not child:
                    return False
        for table, mode, hooks in self.states:
            if table["training"] is not mode or hooks is not bool(
                table["_forward_hooks"] or table["_forward_pre_hooks"] or table["_backward_hooks"]
                or table["_backward_pre_hooks"]
            ):
                return False
        for table, name, dtype, device, count in self.parameters:
            p = table.get(name)
            if p is None or p.dtype is not dtype or p.device != device or len(table) != count:
                return False
        return all(m.p == p for m, p in self.rates) and all(adapter_state(m) == state for m, state in self.adapters)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling a module runs more than its forward."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def check_hooks(model: nn.Module, decoder: str, layers: str) -> None:
    """Refuse hooks that would never run: inside the decoder only its blocks are called as modules.

    Args:
        decoder, layers: paths of the inner decoder and of its list of blocks.

    Raises:
        UnsupportedModelError: a module inside a block, or before or after the blocks, has a hook.
    """
    root = model.get_submodule(decoder)
    blocks = {id(b) for b in model.get_submodule(layers)}
    for name, module in root.named_modules(prefix=decoder):
        if module is root or id(module) in blocks or name.startswith("depth.") or not has_hooks(module):
            continue
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values(),
                 *module._backward_hooks.values(), *module._backward_pre_hooks.values()]
        # transformers and PEFT make the embeddings require gradients for reentrant checkpoints, which are refused.
        if all(getattr(h, "__name__", "").startswith("make_inputs_require_grad") for h in hooks):
            continue
        raise UnsupportedModelError(
            f"{name} has a hook, which a transformed model would never run: its blocks run as captured graphs. Register "
            "it on a block or on the model, or remove it."
        )


def drop_capturing_hooks(model: nn.Module) -> None:
    """Remove the hooks that transformers leaves on a model after one call with ``output_hidden_states=True``.

    They only fill those outputs, which a transformed model does not hand out. The model must be a copy: the stock model
    keeps its own, and installs them again when it is asked for the outputs.
    """
    for module in model.modules():
        for key in [k for k, h in module._forward_hooks.items() if getattr(h, "__name__", "") == "output_capturing_hook"]:
            del module._forward_hooks[key]
        module.__dict__.pop("_output_capturing_hooks_installed", None)


def without_hooks(model: nn.Module) -> nn.Module:
    """Make a private copy traceable: no hooks (a block's own run when it is called) and no checkpoints."""
    for module in model.modules():
        for table in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks,
                      module._backward_pre_hooks):
            table.clear()
        if getattr(module, "gradient_checkpointing", False):
            module.gradient_checkpointing = False
    return model


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
