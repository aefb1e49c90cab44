"""Per-visit factors (timesteps, scales) on a block that runs as a module: at the edges of its branches' modules.

In a captured graph a factor is a node (:mod:`depthpass_lowering.fx_passes.modulate`). As a module, a block computes with modules:
what a branch reads enters some of them, and what it adds leaves one. There the factors are multiplied, behind what hooks of
others do to a result, and before what they see of an input.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from depthpass.capture import Template
from depthpass.capture.nodes import module_paths
from depthpass.capture.structure import empty
from depthpass.errors import LoweringError, UnsupportedModelError

aten = torch.ops.aten

_KEEP = (
    aten.to.dtype, aten.view.default, aten.reshape.default, aten.contiguous.default, aten.clone.default, aten.alias.default,
    aten.dropout.default,
)
"""Ops that a factor of every feature may be moved across."""


@dataclass(frozen=True)
class Edge:
    """Where a factor is multiplied: what goes into a module (its first argument), or what comes out of it.

    Attributes:
        path: of the module inside its block.
        place: which factor, see ``modulate_pass``.
        enters: whether it is the input.
    """

    path: str
    place: str
    enters: bool


_MADE: weakref.WeakKeyDictionary[Template, tuple[Edge, ...]] = weakref.WeakKeyDictionary()


def edges(template: Template) -> tuple[Edge, ...]:
    """Where the factors of a template's visits are multiplied, found once.

    Raises:
        LoweringError: a branch does not begin or end at the edge of a module.
    """
    if template not in _MADE:
        _MADE[template] = tuple(_edges(template.graph.graph))
    return _MADE[template]


def _edges(graph: fx.Graph) -> Iterator[Edge]:
    from depthpass_lowering.fx_passes.modulate import branches

    named = dict(zip(("attention", "mlp"), branches(graph)))
    block = _shared([module_paths(n) for n in graph.nodes if n.op == "call_function" and module_paths(n)])
    ends = {name: _ends(b.result, set(module_paths(b.adder))) for name, b in named.items()}
    for name, branch in named.items():
        readers = _entered(branch.read, branch.readers, block)
        # A module that both branches leave through (one dropout for both) is called twice.
        others = {p for other, paths in ends.items() if other != name for p in paths}
        result = next((p for p in ends[name] if p not in others), None)
        if result is None or not readers:
            raise LoweringError(f"its {name} branch does not begin and end at the edges of modules")
        for path in dict.fromkeys(readers):
            yield Edge(path[len(block[-1]) + 1 :], f"read_{name}", True)
        yield Edge(result[len(block[-1]) + 1 :], f"gate_{name}", False)


def _shared(stacks: list[list[str]]) -> list[str]:
    first, *others = stacks
    return [p for i, p in enumerate(first) if all(s[i : i + 1] == [p] for s in others)]


def _entered(read: fx.Node, readers: tuple[fx.Node, ...], block: list[str]) -> list[str]:
    """For each reader the outermost module that it is in and the value that all of them read is not."""
    node: Any = read
    while isinstance(node, fx.Node):
        outside = {*module_paths(node), *block}
        outermost = [next((p for p in module_paths(reader) if p not in outside), None) for reader in readers]
        if None not in outermost:
            return [p for p in outermost if p is not None]
        node = node.args[0] if node.target in _KEEP else None
    return []


def _ends(result: fx.Node, outside: set[str]) -> list[str]:
    """Modules that a branch's result leaves, the last one first."""
    paths: list[str] = []
    node: Any = result
    while isinstance(node, fx.Node):
        paths += [p for p in module_paths(node) if p not in outside][:1]
        constant = node.target is aten.mul.Tensor and not isinstance(node.args[1], fx.Node)
        node = node.args[0] if node.target in _KEEP or constant else None
    return list(dict.fromkeys(paths))


class Factored:
    """A block for one visit: a twin that shares tensors, submodules and hooks, with the visit's factors in it.

    Attributes:
        block: the twin.
    """

    def __init__(self, layer: nn.Module, template: Template, visit: Any):
        self.index, self.edges, self.calls = visit.index, self._found(template, visit.index), Counter()
        self.block: Any = twin(layer)
        for edge in self.edges:
            module = self.block
            for name in edge.path.split("."):
                if module._modules.get(name) is None:
                    raise UnsupportedModelError(self._refusal(f"it has no module {edge.path!r}"))
                if not getattr(module._modules[name], "_depth_twin", False):
                    module._modules[name] = twin(module._modules[name])
                module = module._modules[name]
            self._put(module, edge, visit)

    def _found(self, template: Template, index: int) -> tuple[Edge, ...]:
        try:
            return edges(template)
        except LoweringError as error:
            raise UnsupportedModelError(self._refusal(str(error))) from error

    def _refusal(self, reason: str) -> str:
        return (
            f"block {self.index} has hooks on modules inside it, and a visit with scales of its own, which a module can only "
            f"have where modules of it begin and end: {reason}. Register the hooks on the block or on the model, or remove them."
        )

    def _put(self, module: nn.Module, edge: Edge, visit: Any) -> None:
        def scaled(value: Any) -> Any:
            self.calls[edge] += 1
            return visit.modulate(edge.place, value)

        def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]):
            if args:
                return (scaled(args[0]), *args[1:]), kwargs
            name = next(n for n, x in kwargs.items() if isinstance(x, Tensor) and x.is_floating_point())
            return args, {**kwargs, name: scaled(kwargs[name])}

        def after(module: nn.Module, args: tuple, out: Any):
            return (scaled(out[0]), *out[1:]) if isinstance(out, tuple) else scaled(out)

        if edge.enters:
            module.register_forward_pre_hook(before, prepend=True, with_kwargs=True)
        else:
            module.register_forward_hook(after)

    def check(self) -> None:
        """Raise UnsupportedModelError unless every factor was multiplied once."""
        if wrong := next((e for e in self.edges if self.calls[e] != 1), None):
            raise UnsupportedModelError(self._refusal(f"{wrong.path} was called {self.calls[wrong]} times"))


def twin(module: nn.Module) -> nn.Module:
    """A module of the same class with the same tensors and submodules, whose tables of submodules and hooks are its own."""
    copied = empty(type(module))
    copied.__dict__.update(module.__dict__)
    copied.__dict__["_depth_twin"] = True
    for name, value in module.__dict__.items():
        if name == "_modules" or name.endswith("_hooks") or name.endswith("_hooks_with_kwargs"):
            copied.__dict__[name] = value.copy() if hasattr(value, "copy") else value
    return copied
