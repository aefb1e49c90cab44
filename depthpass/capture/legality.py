"""Prove that every op outside attention treats each token by itself.

An abstract interpretation over the nodes of a captured graph: for every tensor, :mod:`depthpass.capture.axes` says
where the tokens are, and :mod:`depthpass.capture.rules` says where each op puts them. What has no rule is refused. This
is what makes it sound to run a block on any chunk of a row, on one token at a time, or on chosen tokens: token i of the
result depends on token i of the inputs only, not on its place in the call nor on how many tokens there are.
"""

from __future__ import annotations

import operator
import os.path
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import sympy
import torch
from torch import fx

from depthpass.capture.axes import Axes, AxisError, dim_of, has_stream
from depthpass.capture.nodes import attribute_of, node_of, op_of
from depthpass.capture.rules import RULES, SIZE_ARGUMENTS
from depthpass.capture.rules.call import BATCH, TOKENS, OpCall, Result, Rule, flatten
from depthpass.capture.rules.shapes import elementwise
from depthpass.errors import UnsupportedModelError

_SIZES = (torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool)
# Operands of the higher-order ops that only run a graph under a mode start after their settings.
_WRAPPERS = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}


def check_token_local(
    nodes: Iterable[fx.Node], batch: sympy.Expr, tokens: sympy.Expr, where: str
) -> dict[fx.Node, Result]:
    """Check the nodes of one subgraph of an exported model, in graph order.

    Args:
        nodes: the nodes; tensors they read from outside carry rows and tokens in whole dimensions.
        batch, tokens: the symbols of ``hidden.shape[0]`` and ``hidden.shape[1]`` (a number when the batch is static).
        where: what the nodes are, for messages: ``block 3``, ``prologue``, ``norm``.

    Returns:
        where the tokens are in each tensor.

    Raises:
        UnsupportedModelError: an op mixes tokens or is not known; names block, module, op, node and source line.
    """
    if not isinstance(tokens, sympy.Symbol):
        raise UnsupportedModelError(f"{where}: the number of tokens was fixed to {tokens}; expected a symbolic size.")
    check = _Check(_Sizes({batch: BATCH, tokens: TOKENS}), where)
    known: dict[fx.Node, Result] = {}
    for node in nodes:
        check.node(node, known, nested=False)
    return known


class _Sizes:
    """Translates the sizes of an export to expressions over BATCH and TOKENS."""

    def __init__(self, names: Mapping[sympy.Expr, sympy.Symbol]):
        self.names = {old: new for old, new in names.items() if isinstance(old, sympy.Symbol)}
        self.seen: dict[object, sympy.Expr] = {}

    def __call__(self, size: int | torch.SymInt) -> sympy.Expr:
        expr = size.node.expr if isinstance(size, torch.SymInt) else size
        if expr not in self.seen:
            self.seen[expr] = sympy.sympify(expr).xreplace(self.names)
        return self.seen[expr]

    def shape(self, value: torch.Tensor) -> tuple[sympy.Expr, ...]:
        return tuple(map(self, value.shape))


class _Check:
    def __init__(self, sizes: _Sizes, where: str):
        self.sizes, self.where = sizes, where

    def node(self, node: fx.Node, known: dict[fx.Node, Result], nested: bool) -> None:
        """Work out one node; ``known`` gains its axes."""
        if node.op == "output" or isinstance(node.meta.get("val"), _SIZES):
            self._size(node, known)
            return
        if node.op == "get_attr" and isinstance(attribute_of(node), fx.GraphModule):
            return
        if node.op in ("placeholder", "get_attr"):
            known[node] = self._outside(node)
            return
        for a in node.all_input_nodes:
            if a not in known and _is_tensor(a.meta.get("val")):
                known[a] = self._outside(a)
        try:
            result = self._call(node, known, nested)
        except AxisError as error:
            raise UnsupportedModelError(self._message(node, str(error))) from None
        if result is not None:
            known[node] = result

    def _size(self, node: fx.Node, known: dict[fx.Node, Result]) -> None:
        """Sizes may be computed freely; numbers read out of tensors over tokens may not."""
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            return
        name = node.target._schema.name
        reads = name in ("aten::item", "aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal")
        if reads and any(_streams(known.get(a, ())) for a in node.all_input_nodes):
            raise UnsupportedModelError(self._message(node, "reads a number out of the tokens' values"))

    def _outside(self, node: fx.Node) -> Result:
        """Axes of a tensor made elsewhere: the call's inputs, parameters, side inputs, the hidden stream."""
        value = node.meta.get("val")
        if value is None and node.op == "get_attr":
            value = attribute_of(node)
        try:
            return _over(value, lambda t: tuple(map(dim_of, self.sizes.shape(t))))
        except AxisError as error:
            raise UnsupportedModelError(self._message(node, str(error))) from None

    def _call(self, node: fx.Node, known: dict[fx.Node, Result], nested: bool) -> Result | None:
        if node.target is operator.getitem:
            several: Any = known[node_of(node.args[0])]
            return several[node.args[1]]
        if not isinstance(node.target, torch._ops.OpOverload):
            return self._wrapper(node, known)
        value = node.meta.get("val")
        schema: Any = node.target._schema
        if value is None or schema.name.startswith("aten::_assert"):
            return None
        args = _arguments(node)
        self._no_counts(args, SIZE_ARGUMENTS if _listed(schema.name) else frozenset())
        results = [value] if isinstance(value, torch.Tensor) else list(value)
        sizes = tuple(self.sizes.shape(t) for t in results)
        call = OpCall(node, args, known, sizes, nested)
        result = self._rule(node, call)(call)
        several = cast("tuple[Axes, ...]", (result,) if isinstance(value, torch.Tensor) else result)
        for axes, size in zip(several, sizes):
            if [sympy.Mul(*a) for a in axes] != list(size):
                raise AxisError(f"gives shape [{', '.join(map(str, size))}], which its rule does not account for")
        return result

    def _rule(self, node: fx.Node, call: OpCall) -> Rule:
        rule = _listed(op_of(node)._schema.name)
        if rule is not None:
            return rule
        if torch.Tag.pointwise in op_of(node).tags:
            return elementwise
        # A function of constants is a constant, whatever it does.
        if not any(map(_streams, call.tensors())) and not any(s.free_symbols for size in call.sizes for s in size):
            return _constant
        raise AxisError("is not known to be token-local")

    def _no_counts(self, args: Mapping[str, object], sizes: frozenset[str]) -> None:
        """Refuse the number of tokens (or rows) used as a value, that is, outside the arguments named in ``sizes``."""
        for name, arg in args.items():
            if name in sizes:
                continue
            for a in flatten([arg]):
                value = a.meta.get("val") if isinstance(a, fx.Node) else a
                if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
                    used = value.node.expr.free_symbols & set(self.sizes.names)
                    if used:
                        of = "tokens" if TOKENS in {self.sizes.names[s] for s in used} else "rows"
                        raise AxisError(f"computes with the number of {of} of the call (argument {name!r})")

    def _wrapper(self, node: fx.Node, known: dict[fx.Node, Result]) -> Result:
        """Follow the graph that a higher-order op runs."""
        name = str(node.target)
        settings = _WRAPPERS.get(name)
        if settings is None:
            raise AxisError("is not known to be token-local")
        graph: fx.Graph = attribute_of(node_of(node.args[settings])).graph
        operands = iter(node.args[settings + 1 :])
        inner: dict[fx.Node, Result] = {}
        for inside in graph.nodes:
            if inside.op != "placeholder":
                self.node(inside, inner, nested=True)
                continue
            given = next(operands)
            if isinstance(given, fx.Node) and given in known:
                inner[inside] = known[given]
        output: Any = next(n for n in graph.nodes if n.op == "output").args[0]
        if isinstance(output, fx.Node):
            return inner[output]
        return cast(Result, tuple(inner.get(n, ()) for n in output))

    def _message(self, node: fx.Node, reason: str) -> str:
        advice = (
            "Every op outside attention must treat each token by itself, or the model cannot be run in chunks of tokens."
        )
        if self.where == "prologue":
            advice += " If these are positions, pass position_ids so that the model does not compute them from the row."
        return f"{self.where}: {place(node)} {reason}. {advice}"


def place(node: fx.Node) -> str:
    """Module path and class, op, node name and source line of a node, for messages."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    module = f"{stack[-1][0] or 'model'} ({str(stack[-1][1]).rpartition('.')[2]}), " if stack else ""
    if isinstance(node.target, torch._ops.OpOverload):
        op = f"{node.target._schema.name.replace('::', '.')} "
    elif node.op == "call_function":
        op = f"{getattr(node.target, '__name__', node.target)} "
    else:
        op = ""
    line = source_line(node.meta.get("stack_trace") or "")
    return f"{module}{op}(node {node.name!r}{', ' + line if line else ''})"


def source_line(trace: str) -> str:
    """``modeling_x.py:12 in forward: the code`` of the last frame of a stack trace, or an empty string."""
    frames = re.findall(r'File "([^"]+)", line (\d+), in (\S+)(?:\n\s*(?!File)([^\n]*))?', trace)
    if not frames:
        return ""
    file, line, function, code = frames[-1]
    return f"{os.path.basename(file)}:{line} in {function}{': `' + code.strip() + '`' if code.strip() else ''}"


def _listed(name: str) -> Rule | None:
    return RULES.get(name) or RULES.get(name.removesuffix("_"))


def _constant(call: OpCall) -> Result:
    results = tuple(tuple(map(dim_of, size)) for size in call.sizes)
    return results[0] if isinstance(call.node.meta["val"], torch.Tensor) else results


def _arguments(node: fx.Node) -> dict[str, object]:
    """Arguments of an op call by the names of its schema, defaults filled in."""
    out = {}
    for i, a in enumerate(op_of(node)._schema.arguments):
        if i < len(node.args):
            out[a.name] = node.args[i]
        elif a.name in node.kwargs:
            out[a.name] = node.kwargs[a.name]
        elif a.has_default_value():
            out[a.name] = a.default_value
    return out


def _is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor) or (
        isinstance(value, list | tuple) and any(isinstance(v, torch.Tensor) for v in value)
    )


def _over(value: Any, fn: Callable[[torch.Tensor], Axes]) -> Result:
    if isinstance(value, torch.Tensor):
        return fn(value)
    return tuple(fn(v) if isinstance(v, torch.Tensor) else () for v in value)


def _streams(axes: Any) -> bool:
    """Whether a tensor (or one of several) runs over rows or tokens."""
    return any(has_stream(a) if not a or not isinstance(a[0], tuple) else _streams(a) for a in axes)
