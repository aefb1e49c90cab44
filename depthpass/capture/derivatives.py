"""Functions with a backward of their own (``torch.autograd.Function``): they run as they are, as one call of a captured graph.

A trace alone has their forward, whose derivative may be another one: a straight-through estimator's is zero. So what a function
is given and what it returns are marked while it is traced. Its forward is shown to be token-local as everything else is; then one
call of the function stands for all of it. Its backward is code that nobody sees: it is tried on numbers (:func:`splits`).
"""

from __future__ import annotations

import sys
import threading
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import sympy
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import function
from torch.utils import _pytree as pytree

from depthpass.capture.nodes import node_of
from depthpass.errors import UnsupportedModelError

_EXACT = {("peft", "UniqueBaseGrad"), ("peft", "HadaWeight"), ("peft", "HadaWeightCP")}
"""Functions whose backward is the derivative of their forward, written out to save memory: package and name."""
_IN_TRAINING = {("transformers", "PhimoeMultiplier")}
"""Functions of which that is so in eval mode."""
_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device, type, types.FunctionType)
"""Arguments besides tensors that mean the same in every call."""
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}

_LIB = torch.library.Library("depthpass", "FRAGMENT")
_LIB.define("function_in(Tensor x, int call) -> Tensor")
_LIB.define("function_out(Tensor y, Tensor[] inputs, int call, int place) -> Tensor")


@torch.library.register_fake("depthpass::function_in")
def _function_in(x, call):
    return torch.empty_like(x)


@torch.library.register_fake("depthpass::function_out")
def _function_out(y, inputs, call, place):
    return torch.empty_like(y)


IN, OUT = torch.ops.depthpass.function_in.default, torch.ops.depthpass.function_out.default


@dataclass(eq=False)
class FunctionCall:
    """One call of a function in a trace.

    Attributes:
        apply: takes the tensors among its arguments.
        single: whether it returns one tensor, and no tuple.
        tried: whether its backward may be run in parts, by shapes.
    """

    name: str
    apply: Callable[..., Any]
    single: bool = True
    tried: dict[object, bool] = field(default_factory=dict)


@dataclass(eq=False)
class Functions:
    """What ran in a trace.

    Attributes:
        calls: by their number in the markers.
        lost: names of functions that are traced through, so that their backward is lost.
        applied: what the graphs call, by class and plain arguments.
    """

    calls: list[FunctionCall] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    applied: dict[object, Callable[..., Any]] = field(default_factory=dict)

    def lose(self, name: str) -> None:
        if name not in self.lost:
            self.lost.append(name)


@contextmanager
def own_backwards(model: torch.nn.Module) -> Iterator[Functions]:
    """Mark the ``torch.autograd.Function`` classes that run here, other than torch's own and exact ones."""
    functions, thread = Functions(), threading.get_ident()
    original, changed = function._is_setup_context_defined, {}

    def asked(setup_context: Any) -> bool:
        # The first thing that ``apply`` does; ``apply`` itself may be held by name (``sign = Sign.apply``) since long ago.
        cls = sys._getframe(1).f_locals.get("cls", torch.autograd.Function)
        package, name = cls.__module__.partition(".")[0], cls.__qualname__
        exact = package == "torch" or (package, name) in _EXACT or ((package, name) in _IN_TRAINING and not model.training)
        if not exact and cls not in changed and threading.get_ident() == thread:
            changed[cls] = vars(cls).get("forward")
            cls.forward = staticmethod(_marked(cls, cls.forward, not original(setup_context), functions, thread))
        return original(setup_context)

    setattr(function, "_is_setup_context_defined", asked)  # noqa: B010  pyright knows it as a function
    try:
        yield functions
    finally:
        setattr(function, "_is_setup_context_defined", original)  # noqa: B010
        for cls, forward in changed.items():
            if forward is None:
                del cls.forward
            else:
                cls.forward = forward


def _marked(cls: Any, forward: Callable, with_context: bool, functions: Functions, thread: int) -> Callable:
    """A function's forward with markers around it, where it is being traced."""

    def marked(*given):
        ctx, args = (given[0], given[1:]) if with_context else (None, given)
        tensors = [a for a in args if isinstance(a, Tensor)]
        if threading.get_ident() != thread or not any(isinstance(a, FakeTensor) for a in tensors):
            return forward(*given)
        if not all(isinstance(leaf, _PLAIN) for a in args if not isinstance(a, Tensor) for leaf in pytree.tree_leaves(a)):
            functions.lose(cls.__qualname__)
            return forward(*given)
        number = len(functions.calls)
        call = FunctionCall(cls.__qualname__, _applied(cls, args, functions))
        functions.calls.append(call)
        inputs = [torch.ops.depthpass.function_in(a, number) if isinstance(a, Tensor) else a for a in args]
        result = forward(*given[: int(with_context)], *inputs)
        if getattr(ctx, "dirty_tensors", None):
            raise UnsupportedModelError(
                f"{cls.__qualname__} is a torch.autograd.Function that writes into its arguments (mark_dirty), which the next "
                "visit may still read. Write it out of place."
            )
        call.single = isinstance(result, Tensor)
        results = (result,) if call.single else tuple(result)
        marks = [a for a in inputs if isinstance(a, Tensor)]
        out = tuple(torch.ops.depthpass.function_out(y, marks, number, i) if isinstance(y, Tensor) else y
                    for i, y in enumerate(results))
        return out[0] if call.single else out

    return marked


def _applied(cls: Any, args: tuple, functions: Functions) -> Callable:
    """``cls.apply`` as a function of its tensors, with a name of its own: equal code of two graphs then means equal calls."""
    template = tuple(None if isinstance(a, Tensor) else a for a in args)
    places = [i for i, a in enumerate(args) if isinstance(a, Tensor)]
    leaves, tree = pytree.tree_flatten(template)
    key = (cls, tuple(places), str(tree), tuple(id(x) if callable(x) else repr(x) for x in leaves))
    if key in functions.applied:
        return functions.applied[key]

    def apply(*tensors: Tensor):
        given = list(template)
        for place, tensor in zip(places, tensors):
            given[place] = tensor
        return cls.apply(*given)

    apply.__name__ = apply.__qualname__ = f"{cls.__name__}_{abs(hash(key)):x}"
    return functions.applied.setdefault(key, apply)


def number_of(marker: fx.Node) -> int:
    """The call that a marker belongs to."""
    return cast(int, marker.args[1 if marker.target is IN else 2])


def interior(nodes: Sequence[fx.Node]) -> dict[fx.Node, int]:
    """Nodes that marked functions have traced, by the number of their call; the markers themselves are left out."""
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for i, node in enumerate(nodes):
        if node.target is IN:
            first.setdefault(number_of(node), i)
        elif node.target is OUT:
            last[number_of(node)] = i
    calls: dict[fx.Node, int] = {}
    for call, end in last.items():
        for node in nodes[first[call] : end]:
            marker = node.target in (IN, OUT) and number_of(node) == call
            if not marker and not isinstance(node.meta.get("val"), torch.SymInt):
                calls.setdefault(node, call)
    return calls


def splits(call: FunctionCall, inputs: Sequence[object], batch: sympy.Expr, tokens: sympy.Expr) -> bool:
    """Whether a function's backward gives, run over parts of the tokens (or rows), what it gives over all of them.

    Its gradients of what carries tokens must be those of each token by itself, all others sums over tokens. Tried on random
    numbers with three tokens (rows) at once and one by one.
    """
    values = [node_of(x).meta["val"] for x in inputs]
    key = tuple((tuple(map(str, v.shape)), v.dtype, v.device) for v in values)
    if key not in call.tried:
        call.tried[key] = any(v.device.type == "meta" for v in values) or all(
            _splits(call, values, {batch: 1, tokens: 1} | {symbol: _PARTS}, symbol) for symbol in (tokens, batch)
        )
    return call.tried[key]


_PARTS = 3


def _splits(call: FunctionCall, values: Sequence[Tensor], sizes: dict[Any, int], symbol: sympy.Expr) -> bool:
    generator = torch.Generator().manual_seed(0)
    axes, examples = [], []
    for value in values:
        shape = [sympy.sympify(s.node.expr if isinstance(s, torch.SymInt) else s) for s in value.shape]
        along = [d for d, s in enumerate(shape) if symbol in s.free_symbols]
        axes.append(along[0] if along else None)
        size = [int(s.subs(sizes)) for s in shape]
        x = torch.randn(size, generator=generator, dtype=torch.float64).to(value.device)
        smooth = value.is_floating_point() or value.is_complex()
        examples.append(x.to(value.dtype) if smooth else torch.ones_like(x, dtype=value.dtype))
    state = torch.random.get_rng_state()
    try:
        whole, parts = _gradients(call, examples, axes, generator)
    except Exception:  # the function's own code: what it cannot do here is not known to be right
        return False
    finally:
        torch.random.set_rng_state(state)
    return all(_close(a, b) for a, b in zip(whole, parts))


def _gradients(call: FunctionCall, inputs: Sequence[Tensor], axes: Sequence[int | None], generator: torch.Generator):
    """Gradients of one run over everything, and of runs over its parts put together."""

    def run(tensors: Sequence[Tensor], grads: Callable[[int, Tensor], Tensor]) -> list[Tensor]:
        leaves = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in tensors]
        out = call.apply(*leaves)
        pairs = [(y, grads(i, y)) for i, y in enumerate((out,) if call.single else out)
                 if isinstance(y, Tensor) and y.requires_grad]
        trained = [x for x in leaves if x.requires_grad]
        if not pairs or not trained:
            return []
        gradients = torch.autograd.grad([y for y, _ in pairs], trained, [g for _, g in pairs], allow_unused=True)
        return [torch.zeros_like(x) if g is None else g for x, g in zip(trained, gradients)]

    def cut(x: Tensor, axis: int | None, part: int) -> Tensor:
        return x if axis is None else x.chunk(_PARTS, axis)[part]

    drawn: dict[int, list[Tensor]] = {}

    def part_of(part: int):
        def grads(i: int, y: Tensor) -> Tensor:
            if part == 0:
                drawn[i] = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y) for _ in range(_PARTS)]
            return drawn[i][part]

        return grads

    parts = [run([cut(x, a, p) for x, a in zip(inputs, axes)], part_of(p)) for p in range(_PARTS)]

    def whole_grads(i: int, y: Tensor) -> Tensor:
        grown = [d for d, (a, b) in enumerate(zip(y.shape, drawn[i][0].shape)) if a != b]
        return torch.cat(drawn[i], grown[0]) if grown else torch.stack(drawn[i]).sum(0)

    whole = run(inputs, whole_grads)
    trained = [a for x, a in zip(inputs, axes) if x.is_floating_point()]
    together = [sum(ps) if a is None else torch.cat(ps, a) for a, ps in zip(trained, zip(*parts))]
    return whole, together


def _close(a: Tensor, b: Any) -> bool:
    scale = float(a.abs().max()) if a.numel() else 0.0
    bound = _TOLERANCE.get(a.dtype, 5e-2) * max(scale, 1e-6)
    return a.shape == b.shape and bool(((a - b).abs().double() <= bound).all())


def refuse_backward(functions: Sequence[str], streams: Iterable[Tensor]) -> None:
    """Let a backward pass through these streams stop: it would not be the one that the model's own code asks for.

    Args:
        functions: those whose backward does not run, or not over parts of a row; nothing is refused where that is empty.

    Raises:
        UnsupportedModelError: in the backward pass.
    """
    if not functions:
        return

    def refuse(_):
        raise UnsupportedModelError(
            f"{', '.join(functions)} is a torch.autograd.Function whose backward cannot be run as the model's own code asks for: "
            "it mixes tokens, or is not linear in the gradient (so that parts of a row do not add up to the row), or takes "
            "arguments besides tensors and plain values, or reads tensors that it is not given. Only calls without a backward "
            "pass are right. Expected a backward that treats each token by itself and sums over tokens for all other arguments."
        )

    for stream in streams:
        if stream.requires_grad:
            stream.register_hook(refuse)
