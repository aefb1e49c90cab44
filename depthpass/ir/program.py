"""Programs: immutable lists of ops, and the small set of edits that passes are written in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from depthpass.errors import PassError
from depthpass.ir.ops import OPS, Attr, definition
from depthpass.limits import check_program
from depthpass.prompt import at_prompt, in_notebooks


@in_notebooks
@dataclass(frozen=True)
class Op:
    """One op.

    Attributes:
        kind: a key of :data:`depthpass.ir.ops.OPS`.
        name: name of the result, without ``%``; empty for ``tap`` and ``output``.
        args: names of the argument values.
        attrs: attributes in the order of the op's definition, defaults left out.
        note: provenance, printed as a comment; not part of the meaning.
    """

    kind: str
    name: str = ""
    args: tuple[str, ...] = ()
    attrs: tuple[tuple[str, Attr], ...] = ()
    note: str = ""

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    @cached_property
    def _values(self) -> dict[str, Any]:
        """Every attribute the kind has, defaults included."""
        return {k: d.default for k, d in definition(self.kind).attrs.items()} | dict(self.attrs)

    def with_attrs(self, **attrs: Attr | None) -> Op:
        """Return a copy with some attributes set, or removed when None."""
        merged = {**dict(self.attrs), **attrs}
        return replace(self, attrs=_ordered(self.kind, merged))


def _ordered(kind: str, attrs: dict[str, Attr | None]) -> tuple[tuple[str, Attr], ...]:
    known = definition(kind).attrs
    for key in attrs:
        if key not in known:
            raise PassError(f"op {kind!r} has no attribute {key!r}; it has {', '.join(known) or 'none'}.")
    return tuple(
        (k, v)
        for k, d in known.items()
        if (v := attrs.get(k)) is not None and (d.required or v != d.default)
    )


def op(kind: str, *args: str, name: str = "", note: str = "", **attrs: Attr | None) -> Op:
    """Build an op; attributes equal to their default are left out, so equal ops compare equal."""
    return Op(kind, name, args, _ordered(kind, attrs), note)


@at_prompt
@dataclass(frozen=True)
class Program:
    """What a transformed model computes for every token.

    Attributes:
        model: class name of the stock model.
        blocks: number of physical blocks.
        width: width of the hidden stream.
        ops: the ops; exactly one ``output``, at the end.
    """

    model: str
    blocks: int
    width: int
    ops: tuple[Op, ...]

    def __str__(self) -> str:
        from depthpass.ir.text import format_program

        return format_program(self)

    def __iter__(self) -> Iterator[Op]:
        return iter(self.ops)

    @cached_property
    def defs(self) -> dict[str, Op]:
        """Op that defines each value."""
        return {o.name: o for o in self.ops if o.name}

    @cached_property
    def index(self) -> dict[str, int]:
        """Position of the op that defines each value."""
        return {o.name: i for i, o in enumerate(self.ops) if o.name}

    @cached_property
    def visits(self) -> tuple[Op, ...]:
        """The ``block`` ops in program order."""
        return tuple(o for o in self.ops if o.kind == "block")

    @cached_property
    def slots(self) -> tuple[int, ...]:
        """Slots that outlive a call, ascending: one KV cache each."""
        return tuple(sorted({s for o in self.visits if (s := writes_slot(o)) is not None and o["past"] is None}))

    @property
    def reads_calls(self) -> bool:
        """Whether what the program computes depends on how tokens are split into calls."""
        return any(o["past"] is not None for o in self.visits)

    @property
    def ahead(self) -> int | None:
        """How far attention sees ahead: None = not at all (causal), 0 = the whole row, else blocks of so many tokens."""
        return next((o["tokens"] for o in self.ops if o.kind == "ahead"), None)

    @property
    def denoise(self) -> Op | None:
        """The op that says how often the program runs to fill in masked tokens; None = once."""
        return next((o for o in self.ops if o.kind == "denoise"), None)

    @property
    def reads_positions(self) -> bool:
        """Whether it computes with absolute positions, so that a row has to be numbered by its own tokens.

        Attention sees differences of rotated positions alone; a gate on the rotated query sees the position itself.
        """
        return any(o["gate"] is not None and o["gate_input"] == "query" for o in self.visits)

    @property
    def entry(self) -> str:
        """The embedded tokens: what the program starts from."""
        return next(o.name for o in self.ops if o.kind == "embed")

    @property
    def output(self) -> str:
        return self.ops[-1].args[0]

    @cached_property
    def latents(self) -> int:
        """Positions that run by themselves, each fed with the output of the one before (Coconut); 0 = none."""
        return next((o["tokens"] for o in self.ops if o.kind == "pad" and o["feed"]), 0)

    @property
    def fed(self) -> str:
        """The value that latents are fed with: the output before pads are dropped."""
        o = self.defs[self.output]
        return o.args[0] if o.kind == "trim" else o.name

    @property
    def losses(self) -> tuple[Op, ...]:
        return tuple(o for o in self.ops if o.kind == "loss")

    @property
    def labels(self) -> tuple[str, ...]:
        """Labels of its routes in program order: the names that ratios are set by."""
        return tuple(dict.fromkeys(o["label"] for o in self.ops if o.kind == "route" and o["label"]))

    @property
    def taps(self) -> tuple[Op, ...]:
        return tuple(o for o in self.ops if o.kind == "tap")

    @cached_property
    def stopped(self) -> frozenset[str]:
        """Values that no gradient reaches: whatever the outputs depend on through a ``detach`` only."""
        if all(o.kind != "detach" for o in self.ops):
            return frozenset()
        writers = {writes_slot(o): o.name for o in self.visits}
        reached: set[str] = set()
        todo = [a for o in self.ops if not o.name for a in o.args]
        while todo:
            o = self.defs[todo.pop()]
            if o.name in reached:
                continue
            reached.add(o.name)
            if o.kind != "detach":
                todo += o.args
            if o.kind == "block":
                todo += [writers[s] for s in reads_slots(o)]
        return frozenset(o.name for o in self.ops if o.name and o.name not in reached)

    def users(self, name: str) -> tuple[Op, ...]:
        """Ops that read a value."""
        return tuple(o for o in self.ops if name in o.args)

    # Edits: each returns a new program. Passes are written in these.

    def fresh(self, count: int = 1) -> list[str]:
        """Names not used by any value."""
        start = 1 + max((int(o.name) for o in self.ops if o.name.isdigit()), default=-1)
        return [str(start + i) for i in range(count)]

    def insert_after(self, name: str, new: Iterable[Op]) -> Program:
        """Insert ops right after the one that defines ``name``."""
        at = self.index[name] + 1
        return replace(self, ops=(*self.ops[:at], *new, *self.ops[at:]))

    def map_ops(self, fn: Callable[[Op], Op]) -> Program:
        return replace(self, ops=tuple(fn(o) for o in self.ops))

    def replace_uses(self, old: str, new: str, *, keep: Iterable[str] = ()) -> Program:
        """Let every reader of ``old`` read ``new`` instead, except the ops that define a name in ``keep``."""
        spare = {new, *keep}

        def rename(o: Op) -> Op:
            if old not in o.args or (o.name and o.name in spare):
                return o
            return replace(o, args=tuple(new if a == old else a for a in o.args))

        return self.map_ops(rename)

    def renumbered(self) -> Program:
        """The same program with values called %0, %1, ... in order: the canonical form that is printed."""
        names: dict[str, str] = {}
        for o in self.ops:
            if o.name:
                names[o.name] = str(len(names))
        return self.map_ops(
            lambda o: replace(o, name=names.get(o.name, ""), args=tuple(names.get(a, a) for a in o.args))
        )

    def without_notes(self) -> Program:
        return self.map_ops(lambda o: replace(o, note=""))


def writes_slot(o: Op) -> int | None:
    """Slot an op puts keys and values into, or None when it only reads another one's keys."""
    return OPS[o.kind].slot_written(o)


def reads_slots(o: Op) -> tuple[int, ...]:
    """Slots an op attends to."""
    return OPS[o.kind].slots_read(o)


def plain(model: str, blocks: int, width: int) -> Program:
    """The program of the stock model: every block once, in order, each with its own slot.

    >>> print(plain("LlamaForCausalLM", blocks=2, width=64))
    program LlamaForCausalLM blocks=2 width=64 visits=2 slots=2
      %0 = embed
      %1 = block 0 (%0) slot 0
      %2 = block 1 (%1) slot 1
      %3 = norm (%2)
      output %3
    """
    check_program(blocks, blocks + 3, model)
    ops = [op("embed", name="0")]
    ops += [op("block", str(i), name=str(i + 1), index=i, slot=i) for i in range(blocks)]
    ops += [op("norm", str(blocks), name=str(blocks + 1)), op("output", str(blocks + 1))]
    return Program(model, blocks, width, tuple(ops))
