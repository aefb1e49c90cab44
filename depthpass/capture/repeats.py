"""Trace each distinct block once: a block that would be traced to the graph of an earlier one is passed over.

A forward is a function of its arguments and of what it reads from its modules. Two blocks have one graph when their module trees
have the same classes, tensors of the same kind and the same plain attributes, when the attributes in which they differ (the
layer's number, mostly) were not read while the first of them was traced, and when they are called with the same arguments besides
the hidden stream. Whatever is not certain is traced.
"""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn

from depthpass.capture.screen import block_list
from depthpass.capture.structure import HOOKS

_APART = ("_parameters", "_buffers", "_modules", *HOOKS)  # hooks of a private copy are the capture's own
_STOCK = "_depthpass_stock_class"
_Place = tuple[str, str]  # path of a module in its block, attribute


class Repeats:
    """Which blocks of a private copy of a model were passed over during its trace.

    Attributes:
        of: the earlier block with the same graph, by block.
    """

    def __init__(self, model: nn.Module, layers: str):
        self.blocks = list(block_list(model, layers))
        self.of: dict[int, int] = {}
        seen = Counter(map(id, _tensors(model)))
        # Names of tensors that stand in several places depend on which is first.
        self._alone = [self.blocks.count(b) == 1 and all(seen[id(t)] == 1 for t in _tensors(b)) for b in self.blocks]
        self._described = [_describe(b) for b in self.blocks]
        self._traced: dict[int, _LayerCall] = {}
        self._reads: set[_Place] | None = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Pass over repeated blocks while this is open. The blocks' classes are put back afterwards, their forwards too."""
        places = {p for i in range(len(self.blocks)) for p in self._differing(0, i) or ()}
        classes = [(m, type(m)) for b in self.blocks for m in b.modules()]
        forwards = [(b, b.__dict__.get("forward")) for b in self.blocks]
        for block in dict.fromkeys(self.blocks):
            for path, module in block.named_modules():
                if names := {n for p, n in places if p == path and n in module.__dict__}:
                    module.__class__ = self._watched(type(module), path, names)
        for i, block in enumerate(self.blocks):
            block.forward = self._forward(i, block.forward)
        try:
            yield
        finally:
            for block, forward in forwards:
                block.__dict__.pop("forward", None)
                if forward is not None:
                    block.forward = forward
            for module, cls in classes:
                module.__class__ = cls

    def _watched(self, cls: type, path: str, names: set[str]) -> type:
        """A class whose attributes of these names note that they are read."""

        def attribute(name: str) -> property:
            def read(module: nn.Module) -> object:
                if self._reads is not None:
                    self._reads.add((path, name))
                return module.__dict__[name]

            return property(read, lambda module, value: module.__dict__.__setitem__(name, value))

        own = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__, _STOCK: cls}
        return type(cls.__name__, (cls,), own | {n: attribute(n) for n in names})

    def _forward(self, i: int, forward: Callable) -> Callable:
        @functools.wraps(forward)
        def traced(*args, **kwargs):
            call = _LayerCall(args, kwargs)
            for r, earlier in self._traced.items():
                if earlier.serves(call) and (differing := self._differing(r, i)) is not None and not differing & earlier.reads:
                    self.of[i] = r
                    return earlier.result(cast(Tensor, call.hidden))
            outer, self._reads = self._reads, set()
            before = self._attributes(i)
            try:
                output = forward(*args, **kwargs)
                call.reads = self._reads
            finally:
                self._reads = outer
            if call.returned(output) and self._attributes(i) == before and self._alone[i]:
                self._traced[i] = call
            return output

        return traced

    def _attributes(self, i: int) -> dict[_Place, object]:
        """What a block holds besides tensors, which are others while it is traced."""
        return {
            (path, name): _plain(value) for path, module in self.blocks[i].named_modules()
            for name, value in module.__dict__.items() if name not in _APART
        }

    def _differing(self, one: int, other: int) -> set[_Place] | None:
        """The plain attributes in which two blocks differ; None where they differ in more than those."""
        a, b = self._described[one], self._described[other]
        if a is None or b is None or a.keys() != b.keys() or not self._alone[other]:
            return None
        places = {p for p in a if a[p] != b[p]}
        return places if all(_is_simple(a[p]) and _is_simple(b[p]) for p in places) else None


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    """Every tensor of a tree, as often as it stands there: modules are shared between blocks, too (RandLoRA's bases)."""
    for _, module in model.named_modules(remove_duplicate=False):
        for table in (module._parameters, module._buffers):
            yield from (t for t in table.values() if t is not None)


class _LayerCall:
    """One call of a block: its arguments besides the hidden stream, what it read and what it returned."""

    def __init__(self, args: tuple, kwargs: Mapping[str, Any]):
        self.hidden = args[0] if args else kwargs.get("hidden_states")
        self.rest = (args[1:], {n: v for n, v in kwargs.items() if args or n != "hidden_states"})
        self.reads: set[_Place] = set()
        self._result: Callable[[Tensor], Any] | None = None

    def serves(self, other: _LayerCall) -> bool:
        return _kind(self.hidden) == _kind(other.hidden) and _same(self.rest, other.rest)

    def returned(self, output: Any) -> bool:
        """Note what came out; whether it is the hidden stream and nothing else that is computed."""
        first = output[0] if isinstance(output, tuple | list) and output else output
        if not isinstance(first, Tensor) or _kind(first) != _kind(self.hidden):
            return False
        if first is output:
            self._result = lambda hidden: hidden
        elif type(output) in (tuple, list) and all(v is None for v in output[1:]):
            self._result = lambda hidden: type(output)((hidden, *output[1:]))
        return self._result is not None

    def result(self, hidden: Tensor) -> Any:
        assert self._result is not None
        return self._result(hidden)


def _describe(block: nn.Module) -> dict[_Place, object] | None:
    """Everything that a block's own modules hold; None where a part cannot be looked at."""
    described: dict[_Place, object] = {}
    for path, module in block.named_modules(remove_duplicate=False):
        described[path, "__class__"] = _Is(getattr(type(module), _STOCK, type(module)))
        for table in ("_parameters", "_buffers"):
            for name, tensor in module.__dict__[table].items():
                described[path, f"{table}.{name}"] = None if tensor is None else _Is(type(tensor)), _kind(tensor)
        described[path, "_modules"] = tuple(module._modules)
        for name, value in module.__dict__.items():
            if name not in _APART and (path or name != "forward"):
                described[path, name] = _plain(value)
        if not path and "forward" in module.__dict__:
            return None
    return described


class _Is:
    """Equal to what holds the very same object."""

    def __init__(self, value: object):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Is) and self.value is other.value

    __hash__ = None  # type: ignore[assignment]


def _is_simple(value: object) -> bool:
    return value is None or type(value) in (int, float, bool, str)


def _plain(value: object) -> object:
    if isinstance(value, functools.partial):
        return "partial", _Is(value.func), _plain(value.args), _plain(value.keywords)
    return copy.copy(value) if _is_plain(value) else _Is(value)


def _is_plain(value: object) -> bool:
    """Whether equality says all: simple values and containers of them."""
    if isinstance(value, dict):
        return all(map(_is_plain, (*value.keys(), *value.values())))
    return all(map(_is_plain, value)) if isinstance(value, list | tuple | set) else _is_simple(value)


def _kind(value: object) -> object:
    # Sizes by their text: comparing symbolic ones could bind them.
    return (value.dtype, tuple(map(str, value.shape)), value.device, value.layout) if isinstance(value, Tensor) else value


def _same(one: object, other: object) -> bool:
    """Whether two arguments are the very same tensors and equal plain values."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(_same, one, other))  # type: ignore[arg-type]
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(v, other[k]) for k, v in one.items())  # type: ignore[attr-defined,index]
    return _is_simple(one) and one == other
