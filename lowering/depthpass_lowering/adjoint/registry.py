"""Rules by op, and what stands in for one that is missing: autograd."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from depthpass.capture.direct import FUNCTIONS
from depthpass_lowering.adjoint.reverse import Rule, Tape, Unsupported
from depthpass_lowering.fx_passes.effects import writes

RULES: dict[object, Rule] = {}


def rule_of(node: fx.Node) -> Rule:
    """The rule of a node."""
    return RULES.get(node.target, other)


def rule(*targets: object) -> Callable[[Rule], Rule]:
    def register(fn: Rule) -> Rule:
        RULES.update(dict.fromkeys(targets, fn))
        return fn

    return register


def other(t: Tape, n: Any) -> None:
    """An op without a rule: differentiated by autograd."""
    if writes(n):
        raise Unsupported(f"{n.target} writes into its argument")
    if not t.differentiates(n):
        t.env[n] = t.emit(direct(n), *n.args, **n.kwargs)
        return
    if not isinstance(n.meta.get("val", torch.empty(0)), Tensor):
        raise Unsupported(f"{n.target} has several results")
    active = [a for a in n.all_input_nodes if a in t.active]
    island, t.islands = _Island(n, active), True
    both = t.emit(island, *n.all_input_nodes)
    t.env[n] = t.emit(operator.getitem, both, 0)
    tape = t.emit(operator.getitem, both, 1)

    def back(g: fx.Node) -> None:
        gradients = t.back(_through, tape, g)
        for i, a in enumerate(active):
            t.add(a, t.behind.call_function(operator.getitem, (gradients, i)), False)

    t.on_back(n, back)


class _Island:
    """Runs one op under autograd: ``(*inputs) -> (result, what its backward pass needs)``."""

    def __init__(self, node: fx.Node, active: Sequence[fx.Node]):
        self.node, self.inputs = node, node.all_input_nodes
        self.active = [self.inputs.index(a) for a in active]
        self.__name__ = f"island_{node.name}"

    def __call__(self, *given: Any):
        leaves = {i: given[i].detach().requires_grad_() for i in self.active}
        values = dict(zip(self.inputs, (leaves.get(i, x) for i, x in enumerate(given))))
        args, kwargs = cast(Any, map_arg((self.node.args, self.node.kwargs), values.__getitem__))
        target: Any = self.node.target
        with torch.enable_grad():
            y = target(*args, **kwargs)
        if not isinstance(y, Tensor):
            raise TypeError(f"{self.node.target}: expected one tensor, got {type(y).__name__}")
        return y.detach(), (y, list(leaves.values()))


def _through(tape: tuple[Tensor, list[Tensor]], grad: Tensor) -> list[Tensor]:
    y, leaves = tape
    if not y.requires_grad:
        return [torch.zeros_like(x) for x in leaves]
    gradients = torch.autograd.grad(y, leaves, grad, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients)]


def direct(n: fx.Node) -> Any:
    """What a node calls, torch's own function where there is one of the same signature."""
    return n.target if n.kwargs else FUNCTIONS.get(n.target, n.target)


def tensors(n: fx.Node) -> bool:
    """Whether an op of tensors, as against one of sizes."""
    value = n.meta.get("val")
    return isinstance(value, Tensor) or (value is None and n.target is not operator.mul)
