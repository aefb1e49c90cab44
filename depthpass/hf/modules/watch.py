"""Notice changes of a module tree that make a capture stale, cheaply enough to look before every call."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Iterable
from operator import itemgetter
from types import FunctionType, MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn

from depthpass.capture.code import class_items, function_globals, globals_read, mentioned, mentions, own_bases
from depthpass.capture.held import ALWAYS_READ, function_state, held
from depthpass.capture.quiet import check_modes, function_modes, global_hook_tables
from depthpass.capture.screen import block_list
from depthpass.capture.snapshot import Snapshot
from depthpass.capture.structure import is_config, own_class
from depthpass.hf.modules.hooks import check_hooks, check_wrappers, find_hooks, hook_tables
from depthpass.hf.modules.placement import is_dispatched, sharded_dtypes, unwrapped

KEPT = 4
"""Watches that a model remembers: training and evaluation take turns."""

_ALWAYS = frozenset({
    "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "_forward_hooks", "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_backward_hooks",
    "_backward_pre_hooks", "_is_full_backward_hook", "_state_dict_hooks", "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks", "_depth", "_depth_door", "gradient_checkpointing",
    "_gradient_checkpointing_func", "generation_config", "name_or_path", "warnings_issued", "_is_hf_initialized",
    "hf_device_map", "_output_capturing_hooks_installed",
})
"""Attributes of modules that are looked at elsewhere, or that no capture depends on."""

_AROUND = frozenset({"forward", "_original_forward", "_old_forward", "_hf_hook"})
"""Where accelerate and others put what runs around a module's forward."""

_SETTINGS = frozenset({
    "depthpass", "use_cache", "return_dict", "output_attentions", "output_hidden_states", "output_router_logits",
    "architectures", "_name_or_path", "name_or_path", "dtype", "torch_dtype", "transformers_version", "_commit_hash",
    "id2label", "label2id", "problem_type", "_output_attentions", "initializer_range", "bos_token_id", "eos_token_id",
})
"""Fields of configs that no capture depends on: asked at each call, or about files and generation."""


_ANY_NAME = frozenset({"getattr", "vars", "__dict__", "asdict", "astuple", "fields", "attrgetter", "__getattribute__"})
"""What code calls that reads attributes without mentioning them."""


class Key:
    """A value that is hashed once: it is looked up at every call."""

    __slots__ = ("hash", "value")

    def __init__(self, value: tuple):
        self.value, self.hash = value, hash(value)

    def __hash__(self) -> int:
        return self.hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Key) and self.hash == other.hash and self.value == other.value)


class Same:
    """Stands for one object in a key, whatever equality means to it; keeps it alive, so that no id is ever reused."""

    __slots__ = ("held",)

    def __init__(self, held: object):
        self.held = held

    def __hash__(self) -> int:
        return id(self.held)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.held is other.held


class Watch:
    """What a capture depends on: modules, their classes, attributes and configs, tensors' shapes, the code they run.

    Looking for a change compares whole tables in C, tens of microseconds for a small model. Only when one differs is it
    asked what the change means, see :attr:`key`.

    Attributes:
        key: hashable; equal keys mean that a capture may be reused. Attributes that no code of the tree mentions have no
            part in it.
        written: names of what traces have changed, with the identity of its owner; no part of the key.
        asked: tensors beside parameters and buffers whose values a trace has asked for, by their ids.
        submodules: those looked up by (identity of their root, path).
        live: where hooks are.
        dispatched: whether accelerate moves tensors of the model between devices.
    """

    def __init__(self, model: nn.Module, decoder: str, layers: str, before: Watch | None = None):
        self.written: dict[tuple, object] = {} if before is None else before.written
        self.asked: dict[int, Tensor] = {} if before is None else before.asked
        self.modules = list(model.modules())  # kept alive, so that no id below is ever reused
        self.inside = {*map(id, self.modules)}
        self.types = list(map(type, self.modules))
        self.then = Snapshot()
        self.functions: list[FunctionType] = []
        self.looked: dict[int, tuple[dict, set[str]]] = {}
        self.seen: set[object] = set()
        self.waiting: list[tuple[str, Any]] = []
        captured = list(model.get_submodule(decoder).modules())
        called = {id(captured[0]), *map(id, block_list(model, layers))}
        classes = dict.fromkeys(map(type, captured))
        for module in self.modules:
            self._table(module, module.__dict__)
            if module._modules:
                self._table(module._modules, module._modules)
            for name, value in module.__dict__.items():
                if name not in _HOOKS:
                    self._inside(value, data=not isinstance(value, _CODE) or (name in _AROUND and id(module) in called))
        self._classes(classes)
        self._attributes(classes)
        for module in captured:
            for name, value in [*module.__dict__.items()]:
                if self._counts(name, id(module) in called):
                    self._inside(value)
        self._attributes(classes)
        self.globals = [(itemgetter(*names, *names[:1]), table) for table, known in self.looked.values()
                        if (names := sorted(known))]
        self.read = [get(table) for get, table in self.globals]
        for tensor in self.asked.values():
            self.then.look(tensor, tensor.tolist)
        places: dict[int, tuple[dict, str]] = {}  # a trace reads tied tensors, objects in two places, at the first one
        self.tensors = [
            (table, name, _form(t), len(table), places.setdefault(id(t), (table, name)))
            for m in self.modules for table in (m._parameters, m._buffers) for name, t in table.items()
        ]
        hooks = [t for m in self.modules for t in hook_tables(m)]
        self.hooked = [t for t in hooks if t]
        self.then.empty += [t for t in hooks if not t]
        self.world = list(global_hook_tables())
        self.hooks = [len(t) for t in self.world]
        self.dtype = torch.get_default_dtype()
        self.dtypes = sharded_dtypes(self.modules)
        self.key = Key(self._meaning(captured, classes, called))
        self.submodules: dict[tuple[int, str], nn.Module] = {}
        self.dispatched = is_dispatched(model)
        self.live = find_hooks(captured[0], block_list(model, layers), getattr(model, "depth", None))

    def _table(self, owner: object, table: Any) -> None:
        """Watch the dictionary, list or set of a module, class, object or container."""
        if (id(owner), "table") not in self.seen:
            self.seen.add((id(owner), "table"))
            self.then.table(owner, table)

    def _inside(self, value: Any, data: bool = False) -> None:
        """Watch what a value holds; with ``data``, containers and configs alone."""
        what = held(value)
        if what is None or (data and not what.exact) or id(value) in self.inside or (id(value), data) in self.seen:
            return
        self.seen.add((id(value), data))
        if what.now is not None:
            self.then.look(value, what.now)
        if isinstance(value, FunctionType):
            self.functions.append(value)
            self.then.look(value, functools.partial(function_state, value))
            self._globals(function_globals(value))
        elif isinstance(value, type):
            self._classes((value,))
            self._inside(type(value))
        elif what.table is not None:
            self._table(value, what.table) if what.table else self.then.empty.append(what.table)
        for name, part in what.parts:
            if what.attributes and name not in ALWAYS_READ:
                self.waiting.append((str(name), part))
            else:
                self._inside(part, data)

    def _attributes(self, classes: Iterable[type]) -> None:
        """Watch what attributes of objects hold, of those that code mentions: a log beside a setting may grow at every call."""
        ready = True
        while ready:
            own = mentioned(self.functions)
            self.names, self.pieces = (frozenset().union(*sets) for sets in zip(*map(mentions, classes), own))
            self.by_name = not own[0] & _ANY_NAME
            ready = [(n, v) for n, v in self.waiting if self._read(n)]
            self.waiting = [(n, v) for n, v in self.waiting if not self._read(n)]
            for _, value in ready:
                self._inside(value)

    def _classes(self, classes: Iterable[type]) -> None:
        """Watch what classes define, and what their methods look up."""
        for cls in classes:
            self._globals(globals_read(cls))
        for base in dict.fromkeys(b for cls in classes for b in own_bases(cls)):
            self._table(base, base.__dict__)
            for value in class_items(base).values():
                self._inside(value)

    def _globals(self, groups: Iterable[tuple[dict[str, Any], Iterable[str]]]) -> None:
        for table, names in groups:
            known = self.looked.setdefault(id(table), (table, set()))[1]
            for name in [n for n in names if n in table and n not in known]:
                known.add(name)
                self._inside(table[name])

    def _counts(self, name: str, called: bool) -> bool:
        """Whether an attribute of a module is one that code of the tree mentions.

        Args:
            called: whether the module is called as one: what is put around its forward runs at each call.
        """
        return name not in _ALWAYS and not (name in _AROUND and called) and self._mentioned(name)

    def _mentioned(self, name: str) -> bool:
        return name in self.names or any(p in name for p in self.pieces)

    def _read(self, name: str) -> bool:
        """Whether an attribute of a user's object may be read: all are where code looks them up by names that it makes."""
        return not self.by_name or self._mentioned(name)

    def settle(self, asked: Iterable[Tensor]) -> None:
        """Leave out of later keys what a trace has written, as counters are: it would ask for a capture at every call.

        Args:
            asked: tensors beside parameters and buffers whose values the trace has asked for: they count from now on.
        """
        for tensor in {id(t): t for t in asked if id(t) not in self.asked}.values():
            self.asked[id(tensor)] = tensor
            self.then.look(tensor, tensor.tolist)
        if self.current():
            return
        self.written |= self.then.renew()
        for at, (get, table) in enumerate(self.globals):
            names = sorted(self.looked[id(table)][1])
            self.written |= {(id(table), n): table for n, v in zip(names, self.read[at]) if table[n] is not v}
            self.read[at] = get(table)

    def current(self) -> bool:
        """Whether nothing has changed since this watch was made."""
        try:
            if not self.then.same() or list(map(type, self.modules)) != self.types or not all(self.hooked):
                return False
            if list(map(len, self.world)) != self.hooks or torch.get_default_dtype() is not self.dtype or function_modes():
                return False
            if any(get(table) != values for (get, table), values in zip(self.globals, self.read)):
                return False
        except (ValueError, RuntimeError, TypeError, KeyError):  # tables with tensors or arrays: their equality is none
            return False
        for table, name, form, count, (first, tied) in self.tensors:
            t = table.get(name)
            if len(table) != count or (t is None) != (form is None) or first.get(tied) is not t:
                return False
            if t is not None and form and (t.dtype is not form[0] or t.device != form[1] or t.shape != form[2]):
                return False
        return True

    def _meaning(self, modules: list[nn.Module], classes: Iterable[type], called: set[int]) -> tuple:
        """What of all this a capture of these modules depends on.

        Args:
            called: ids of those that are called as modules.
        """
        met: dict[int, object] = {}
        places: dict[int, int] = {}
        return (
            tuple((Same(m), own_class(type(m)), tuple(m._modules), tuple(
                (n, self._frozen(v, met)) for n, v in m.__dict__.items() if self._counts(n, id(m) in called)
            )) for m in modules),
            tuple(
                tuple((n, _form(t), self.dtypes.get(id(t)), places.setdefault(id(t), len(places))) for n, t in table.items())
                for m in modules for table in (m._parameters, m._buffers)
            ),
            tuple(
                (base, tuple((n, self._frozen(v, met)) for n, v in class_items(base).items()
                             if (id(base), n) not in self.written))
                for base in dict.fromkeys(b for cls in classes for b in own_bases(own_class(cls)))
            ),
            tuple(self._frozen(t[n], met) for t, names in self.looked.values() for n in sorted(names)
                  if (id(t), n) not in self.written),
            tuple((at, repr(t.tolist())) for at, t in self.asked.items() if (at, None) not in self.written), self.dtype,
        )

    def _frozen(self, value: Any, met: dict[int, object]) -> object:
        """A value as part of a key: by content where that is plain data or a config, else itself with what it holds."""
        what, known = held(value), _SETTINGS if is_config(value) else ()
        if what is None and (value is None or isinstance(value, str | int | float | bytes | torch.dtype | torch.device)):
            return value
        if id(value) in met:
            return met[id(value)]
        met[id(value)] = same = Same(value)  # of what holds itself
        if what is None or (id(value), None) in self.written or id(value) in self.inside:
            return same
        parts = [(n, v) for n, v in what.parts if n not in known and (id(value), n) not in self.written]
        if what.attributes:
            parts = [(n, v) for n, v in parts if n in ALWAYS_READ or self._read(str(n))]
        if isinstance(value, FunctionType):
            parts += [(n, t[n]) for t, names in function_globals(value) for n in names
                      if n in t and (id(t), n) not in self.written]
        pairs = [(self._frozen(n, met), self._frozen(v, met)) for n, v in parts]
        content = (what.kind, frozenset(pairs) if isinstance(value, set | frozenset) else tuple(pairs))
        met[id(value)] = frozen = content if what.exact else (same, content)
        return frozen


_CODE = FunctionType | MethodType | functools.partial


def _form(tensor: Tensor | None) -> tuple | None:
    return None if tensor is None else (tensor.dtype, tensor.device, tensor.shape)


_HOOKS = frozenset(n for n, v in nn.Module().__dict__.items() if isinstance(v, OrderedDict))
"""Tables of hooks of a module: looked at by themselves."""


def watch(watches: list[Watch], model: nn.Module, decoder: str, layers: str) -> Watch:
    """The watch on a model as it is now, the last of ``watches``: one of those that are remembered, or a new one.

    Raises:
        UnsupportedModelError: the model has hooks that would never run.
    """
    for known in reversed(watches):
        if known.current():
            if known is not watches[-1]:
                watches.remove(known)
                watches.append(known)
            return known
    check_hooks()
    check_modes()
    check_wrappers(model)
    new = Watch(model, decoder, layers, watches[-1] if watches else None)
    watches[:] = [*watches[1 - KEPT :], new]
    return new


class Binding:
    """A parameter or buffer of a live module tree: looked up once, read at every call."""

    __slots__ = ("name", "table")

    def __init__(self, root: nn.Module, path: str):
        *parents, self.name = path.split(".")
        root = unwrapped(root)
        for part in parents:
            root = unwrapped(getattr(root, part))
        held = root._parameters if self.name in root._parameters else root._buffers
        self.table = cast("dict[str, Tensor]", held)
        if self.name not in held:
            raise AttributeError(f"{type(root).__name__} has no parameter or buffer {self.name!r}.")

    def __call__(self) -> Tensor:
        return self.table[self.name]
