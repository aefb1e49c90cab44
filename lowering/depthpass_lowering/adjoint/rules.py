"""How each op of a chunk's graph is run and gone back through."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from depthpass_kernels.select import remembered
from torch import Tensor, fx

from depthpass.capture import calls
from depthpass_lowering.adjoint import projected, views  # noqa: F401  (they register their rules)
from depthpass_lowering.adjoint.fused import rms, rope
from depthpass_lowering.adjoint.registry import RULES, other, rule, rule_of, tensors
from depthpass_lowering.adjoint.reverse import Reverse, Rule, Tape, Unsupported
from depthpass_lowering.fx_passes.products import land, products
from depthpass_lowering.fx_passes.recompute import absorbed
from depthpass_lowering.fx_passes.region import call, delayed, enter, present

aten = torch.ops.aten
_NN: Any = getattr(torch._C, "_nn")  # noqa: B009  (torch's stubs do not know it)
__all__ = ["rule_of"]


# Pointwise.


@rule(aten.mul.Tensor, operator.mul)
def _mul(t: Tape, n: Any) -> None:
    a, b = n.args
    t.env[n] = t.emit(torch.mul if tensors(n) else operator.mul, a, b)
    if t.differentiates(n):
        def back(g: fx.Node) -> None:
            for x, other in ((a, b), (b, a)):
                if x in t.active:
                    t.fitted(x, n, t.back(torch.mul, g, other), True)

        t.on_back(n, back)


@rule(aten.add.Tensor, aten.sub.Tensor, operator.add)
def _add(t: Tape, n: Any) -> None:
    if n.kwargs:
        return other(t, n)
    a, b = n.args
    minus = n.target is aten.sub.Tensor
    t.env[n] = t.emit((torch.sub if minus else torch.add) if tensors(n) else n.target, a, b)
    if t.differentiates(n):
        def back(g: fx.Node) -> None:
            if a in t.active:
                t.fitted(a, n, g, False)
            if b in t.active:
                t.fitted(b, n, t.back(torch.neg, g) if minus else g, minus)

        t.on_back(n, back)


@rule(aten.div.Tensor)
def _div(t: Tape, n: Any) -> None:
    a, b = n.args
    if b in t.active:
        return other(t, n)
    t.env[n] = t.emit(torch.div, a, b)
    if t.differentiates(n):
        t.on_back(n, lambda g: t.fitted(a, n, t.back(torch.div, g, b), True))


def _pointwise(forward: Callable, backward: Callable[[Tape, fx.Node, fx.Node, fx.Node, fx.Node], fx.Node]) -> Rule:
    """A rule for an op of one tensor whose gradient is ``backward(tape, g, x, y, node)``."""

    def run(t: Tape, n: Any) -> None:
        x = n.args[0]
        y = t.env[n] = t.emit(forward, *n.args, **n.kwargs)
        if t.differentiates(n):
            t.on_back(n, lambda g: t.add(x, backward(t, g, x, y, n), True))

    return run


RULES |= {
    aten.neg.default: _pointwise(torch.neg, lambda t, g, _x, _y, _n: t.back(torch.neg, g)),
    aten.silu.default: _pointwise(_NN.silu, lambda t, g, x, y, n: t.back(aten.silu_backward.default, g, x)),
    aten.gelu.default: _pointwise(
        _NN.gelu, lambda t, g, x, y, n: t.back(aten.gelu_backward.default, g, x, **n.kwargs)
    ),
    aten.relu.default: _pointwise(torch.relu, lambda t, g, x, y, n: t.back(aten.threshold_backward.default, g, y, 0)),
    aten.tanh.default: _pointwise(torch.tanh, lambda t, g, x, y, n: t.back(aten.tanh_backward.default, g, y)),
    aten.sigmoid.default: _pointwise(torch.sigmoid, lambda t, g, x, y, n: t.back(aten.sigmoid_backward.default, g, y)),
}


@rule(rms)
def _rms(t: Tape, n: Any) -> None:
    x, weight, eps = n.args
    r = t.emit(_inverse_rms, x, eps)
    scaled = t.emit(torch.mul, x, r)
    t.env[n] = scaled if weight is None else t.emit(torch.mul, weight, scaled)
    if not t.differentiates(n):
        return

    def back(g: fx.Node) -> None:
        # With s = x r, dr/dx = -r^3 x / width: dx = r (g w - s mean(g w s)).
        part = t.back(torch.mul, g, scaled)
        if weight in t.active:
            t.add(weight, t.back(_over_rows, part), True)
        if x in t.active:
            inner = t.back(_without_mean, g if weight is None else t.back(torch.mul, g, weight), scaled, part, weight)
            t.add_product(x, inner, r)

    t.on_back(n, back)


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    """``1 / sqrt(mean(x^2) + eps)`` over the last axis, which stays."""
    norm = torch.linalg.vector_norm(x, 2, -1, True)
    return torch.addcmul(_constant(eps, norm.dtype, norm.device), norm, norm, value=1 / x.shape[-1]).rsqrt_()


@remembered(64)
def _constant(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(value, dtype=dtype, device=device)


def _over_rows(x: Tensor) -> Tensor:
    return x.sum(tuple(range(x.dim() - 1)))


def _without_mean(g: Tensor, scaled: Tensor, part: Tensor, weight: Tensor | None) -> Tensor:
    """``g - scaled * mean(part * weight)`` over the last axis."""
    total = part.sum(-1, True) if weight is None else torch.matmul(part, weight).unsqueeze_(-1)
    return torch.addcmul(g, scaled, total, value=-1 / g.shape[-1])


@rule(rope)
def _rope(t: Tape, n: Any) -> None:
    x, cos, sin, half = n.args
    if cos in t.active or sin in t.active:
        raise Unsupported("a rotary table that is trained")
    signs = _signed(t, sin, half)
    t.env[n] = t.emit(torch.addcmul, t.emit(torch.mul, x, cos), t.emit(torch.roll, x, half, -1), signs[0])
    if t.differentiates(n):
        def back(g: fx.Node) -> None:
            straight = t.back(torch.mul, g, cos)
            t.add(x, t.back_method("addcmul_", straight, t.back(torch.roll, g, half, -1), signs[1]), True)

        t.on_back(n, back)


def _signed(t: Tape, sin: fx.Node, half: int) -> tuple[fx.Node, fx.Node]:
    """The table with the sign of the rotation, and the one of its transpose, once for all that rotate by it."""
    key = sin, half
    if key not in t.tables:
        both = t.emit(_signs, sin, half)
        t.tables[key] = t.emit(operator.getitem, both, 0), t.emit(operator.getitem, both, 1)
    signed, transposed = t.tables[key]
    return signed, transposed


def _signs(sin: Tensor, half: int) -> tuple[Tensor, Tensor]:
    first, second = sin[..., :half], sin[..., half:]
    return torch.cat((-first, second), -1), torch.cat((second, -first), -1)


@rule(aten.layer_norm.default)
def _layer_norm(t: Tape, n: Any) -> None:
    given = dict(zip(("x", "shape", "weight", "bias", "eps", "cudnn"), n.args), **n.kwargs)
    x, shape, weight, bias = given["x"], given["shape"], given.get("weight"), given.get("bias")
    parts = t.emit(aten.native_layer_norm.default, x, shape, weight, bias, given.get("eps", 1e-5))
    y, mean, rstd = (t.emit(operator.getitem, parts, i) for i in range(3))
    t.env[n] = y
    if not t.differentiates(n):
        return
    wanted = [p in t.active for p in (x, weight, bias)]

    def back(g: fx.Node) -> None:
        gradients = t.back(_layer_norm_backward, g, x, shape, mean, rstd, weight, bias, wanted)
        for i, p in enumerate((x, weight, bias)):
            if p in t.active:
                t.add(p, t.behind.call_function(operator.getitem, (gradients, i)), True)

    t.on_back(n, back)


def _layer_norm_backward(g: Tensor, *args):
    return aten.native_layer_norm_backward.default(g.contiguous(), *args)


# Calls and products.


@rule(present)
def _present(t: Tape, n: Any) -> None:
    x, mask = n.args
    t.env[n] = t.emit(present, x, mask)
    if t.differentiates(n):
        t.on_back(n, lambda g: t.add(x, t.back(present, g, mask), False))


@rule(calls.attend)
def _attend(t: Tape, n: Any) -> None:
    visit, site, q, k, v, *rest = n.args
    sinks = rest[0] if rest else n.kwargs.get("sinks")
    if not isinstance(t, Reverse):
        raise Unsupported("attention that is computed again")
    if not any(x in t.active for x in (q, k, v, sinks)):
        t.env[n] = t.emit(calls.attend, visit, site, q, k, v, sinks)
        return
    both = t.method("attend_taped", visit, site, q, k, v, sinks)
    t.env[n], tape = t.emit(operator.getitem, both, 0), t.emit(operator.getitem, both, 1)
    writes_keys = visit in t.writers

    def back(g: fx.Node) -> None:
        gradients = t.back(attend_back, tape, g)
        for i, x in enumerate((q, k, v, sinks)):
            if x in t.active and (writes_keys or i in (0, 3)):
                t.add(x, t.behind.call_function(operator.getitem, (gradients, i)), i == 0)

    def unread() -> None:
        # Others may read the keys of a visit whose result nobody does.
        gradients = t.back(keys_back, tape)
        for i, x in enumerate((k, v)):
            t.add(x, t.behind.call_function(operator.getitem, (gradients, i)), False)

    t.on_back(n, back, unread if writes_keys else None)


def keys_back(tape: Any) -> Sequence[Tensor | None]:
    """Gradients of k and v from what others have read of them."""
    return tape.use.own()


def attend_back(tape: Any, grad: Tensor) -> Sequence[Tensor | None]:
    """Gradients of q, k, v and the sinks."""
    dq, dsinks = tape(grad)
    return (dq, *tape.use.own(), dsinks)


@rule(products)
def _products(t: Tape, n: Any) -> None:
    transposed, weights, biases, x, *gain = n.args

    def finish(g: fx.Node, site: fx.Node, trained: bool) -> None:
        if trained:
            t.back_method("hold", site, x, g)
        if x in t.active:
            t.add(x, t.back_method("back", site, g), True)

    _multiply(t, n, transposed, weights, biases, t.value(x), x in t.active, finish, *gain)


@rule(absorbed)
def _absorbed(t: Tape, n: Any) -> None:
    transposed, weights, biases, steps, *leaves = n.args
    if not isinstance(t, Reverse):
        raise Unsupported("a product that is computed again")
    inside = operator.attrgetter(str(steps.target))(t.gm).graph
    inputs = [m for m in inside.nodes if m.op == "placeholder"]
    result = inside.output_node().args[0]

    def run(ahead: fx.Graph, values: Sequence[Any]) -> Tape:
        tape = Tape(ahead, t.behind, t.rules)
        tape.env.update(zip(inputs, values))
        tape.active |= {p for p, leaf in zip(inputs, leaves) if ahead is t.behind and leaf in t.active}
        for m in inside.nodes:
            if m.op == "call_function":
                tape.run(m)
        t.islands |= tape.islands
        return tape

    def finish(g: fx.Node, site: fx.Node, trained: bool) -> None:
        again = run(t.behind, [t.kept(t.value(leaf)) for leaf in leaves])
        if trained:
            t.back_method("hold", site, again.env[result], g)
        if result not in again.active:
            return
        again.add(result, t.back_method("back", site, g), True)
        again.unwind()
        for p, leaf in zip(inputs, leaves):
            if p in again.gradients:
                t.add(leaf, again.gradients[p].node, again.gradients[p].fresh)

    value = run(t.ahead, [t.value(leaf) for leaf in leaves]).env[result]
    _multiply(t, n, transposed, weights, biases, value, any(leaf in t.active for leaf in leaves), finish)


def _multiply(
    t: Tape, n: fx.Node, transposed: bool, weights, biases, x: Any, wanted: bool,
    finish: Callable[[fx.Node, fx.Node, bool], None], gain: fx.Node | None = None,
) -> None:
    """A product of one stream with several weights; its parts are the ``getitem`` nodes that read it.

    Args:
        x: the stream's value; wanted: whether it has a gradient.
        finish: goes on with the gradient of all parts side by side.
    """
    if not isinstance(t, Reverse):
        raise Unsupported("a product that is computed again")
    site, spec = t.site(weights, biases, False, transposed, gain)
    y = t.method("forward", site, x)
    parts = {u.args[1]: u for u in n.users}
    split = y if len(weights) == 1 else t.method("parts", site, y)
    for i, u in parts.items():
        t.env[u] = y if len(weights) == 1 else t.emit(operator.getitem, split, i)
    trained = t.trains(spec)
    if not (trained or wanted):
        return
    t.active.update(parts.values())

    def step() -> None:
        grads = [t.gradients[parts[i]].node if i in parts and parts[i] in t.gradients else None for i in range(len(weights))]
        if len(grads) > 1 and any(g is not None for g in grads):
            finish(t.back_method("whole", site, grads), site, trained)
        elif grads[0] is not None:
            finish(grads[0], site, trained)

    t.steps.append(step)


@rule(land)
def _land(t: Tape, n: Any) -> None:
    weights, biases, mask, x, *cs = n.args
    if not isinstance(t, Reverse):
        raise Unsupported("a landing that is computed again")
    site, spec = t.site(weights, biases, True, False)
    t.env[n] = t.method("land", site, mask, x, *cs)
    trained, wanted = t.trains(spec), [c for c in cs if c in t.active]
    if not (trained or wanted or x in t.active):
        return

    def back(g: fx.Node) -> None:
        t.add(x, g, False)
        if not trained and not wanted:
            return
        brought = t.back(present, g, mask)
        if trained:
            t.back_method("hold", site, t.back_method("side_by_side", site, *cs), brought)
        if wanted:
            whole = t.back_method("back", site, brought)
            parts = [whole] if len(cs) == 1 else [
                t.behind.call_function(operator.getitem, (t.back_method("columns", site, whole), i)) for i in range(len(cs))
            ]
            for c, part in zip(cs, parts):
                t.add(c, part, len(cs) == 1)

    t.on_back(n, back)


# Everything else.


@rule(call, delayed, enter, calls.submodule, calls.modulate)
def _asks(t: Tape, n: Any) -> None:
    raise Unsupported(f"{getattr(n.target, '__name__', n.target)} asks modules or streams that autograd has to see")


@rule(operator.getitem)
def _item(t: Tape, n: Any) -> None:
    if n.args[0] in t.active:
        raise Unsupported("a part of a result without a rule")
    t.env[n] = t.emit(operator.getitem, *n.args)
