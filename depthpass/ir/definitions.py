"""What the definition of an op says: one record that text, verifier, interpreter, analyses, schedules and executors ask.

An op that looks at one token only says with ``meaning`` what it computes, in plain torch; it then runs everywhere: in the
interpreter, op by op, in the graph of a chunk, in a compiled token, in sweeps. See ``local_ops.py`` for those that come with
depthpass, and :func:`depthpass.ir.ops.register` for others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from depthpass.errors import VerifyError
from depthpass.prompt import in_notebooks

if TYPE_CHECKING:
    from torch import Tensor, nn

    from depthpass.ir.program import Op, Program

Attr = int | float | bool | str | tuple["Attr", ...]

NEVER = 1 << 40
"""Tokens that a value is absent for when it never exists."""

CHUNK, STEP, SWEEP = "a hand-scheduled chunk", "a compiled token", "a sweep"
"""Where an op may stand besides the eager level, which runs all of them."""

EVERYWHERE = frozenset({CHUNK, STEP, SWEEP})


@dataclass(frozen=True)
class AttrDef:
    """One attribute of an op.

    Attributes:
        type: its type.
        default: its value where it is left out; the printer leaves defaults out.
        required: whether it has to be given.
        choices: what a word may be.
        low: smallest value.
        bounded: whether memory is made for so many, whatever the model.
        needs: the attribute without which this one means nothing.
        scope: whether it names new parameters.
        block: whether it is a physical block, or a list of them.
    """

    type: type
    default: Attr | None = None
    required: bool = False
    choices: tuple[str, ...] = ()
    low: float | None = None
    bounded: bool = False
    needs: str | None = None
    scope: bool = False
    block: bool = False


@in_notebooks
@dataclass(frozen=True)
class Type:
    """Type of a value.

    Attributes:
        width: width of a stream; 0 for a route.
        tokens: route whose tokens a sub-stream holds; None = all tokens.
        absent: the first so many real tokens of each row carry no value (they lie before a delay's source).
        pads: pad tokens appended to each row.
    """

    width: int
    tokens: str | None = None
    absent: int = 0
    pads: int = 0

    @property
    def is_route(self) -> bool:
        return self.width == 0


@in_notebooks
@dataclass(frozen=True)
class Param:
    """A new parameter a program asks for, under ``depth.`` in the state dict.

    Attributes:
        name: e.g. ``turboconn.s14_d4.down.weight``.
        shape: its shape.
        init: standard deviation of a normal initialisation; 0 = zeros.
        fill: constant the parameter starts from (``weigh``); None = use ``init``.
        trained: False for a buffer that a rule moves.
        identity: the weight of a linear map starts as the identity on the last ``out`` columns, that is on its last
            argument, and zero elsewhere; ``init`` is not used then.
    """

    name: str
    shape: tuple[int, ...]
    init: float = 0.0
    fill: float | None = None
    identity: bool = False
    trained: bool = True

    @property
    def leaf(self) -> str:
        """Its name inside the module that holds it."""
        return self.name.rpartition(".")[2]


@dataclass(frozen=True)
class Work:
    """What an op costs per token.

    Attributes:
        flops: of products.
        elementwise: sums, products, activations, element by element.
        saved: activation elements kept for the backward pass.
        note: what is not counted.
    """

    flops: int = 0
    elementwise: int = 0
    saved: int = 0
    note: str = ""


def _widest(o: Op, widths: Sequence[int], hidden: int) -> int:
    return max(widths, default=hidden)


def _once(o: Op, widths: Sequence[int], out: int, hidden: int) -> Work:
    return Work(elementwise=out, saved=sum(widths))


def _nothing(*args: Any) -> tuple[Param, ...]:
    return ()


def _no_slot(o: Op) -> int | None:
    return None


def _no_slots(o: Op) -> tuple[int, ...]:
    return ()


def _accepted(*args: Any) -> None:
    """Every value of the right kind will do."""


@dataclass(frozen=True)
class OpDef:
    """One kind of op.

    Attributes:
        kind: its name.
        lead: attribute printed right after the kind (``block 3``, ``delay 4``), or None.
        args: smallest and largest number of stream arguments (None = any).
        attrs: its attributes in the order they are printed.
        defines: whether it has a result.
        forward_refs: whether arguments may be defined later (only ``delay``).
        token_local: whether token i of the result depends on token i of the arguments only.
        check: what its attributes have to fulfil together: ``(program, op)``; raises VerifyError.
        accepts: what its arguments have to be, beyond streams over the same tokens: ``(program, op, types)``; raises.
        width: width of the result: ``(op, widths of the arguments, width of the model's stream)``.
        pads: pad tokens of the result, from the most of its arguments.
        absent: for how many tokens the result is absent, of the arguments' numbers.
        typed: the whole type rule, ``(program, op, types) -> type``, of ops that take routes or change the tokens.
        lag: how many tokens earlier it reads its argument, at most.
        begins: the first token of a row that has a value, of the first one that its argument has.
        slots_read, slot_written: KV slots it attends to, and the one it puts keys into.
        waits: whether it needs every token of the row.
        depth: what one application runs of a block, as (attention, feed-forward network); a path counts a visit by the latter.
        parameters: new parameters it asks for: ``(op, widths of the arguments, width of the model's stream)``.
        holder: module for its parameters, made of them and of a tensor like them; None = one that applies ``meaning``.
        meaning: what it computes of one token, ``(*streams, *parameters and constants by name) -> stream``, each stream
            ``[..., width]``; plain torch over the last dimension. None = the program's executors know.
        constants: attributes that ``meaning`` is given by name.
        applied: ``(its module, op, streams)`` -> its result, where the module is not called as ``meaning`` is.
        work: ``(op, widths, width of the result, width of the model's stream)`` -> cost per token; None = nothing.
        runs: where it may stand; None = everywhere if it has a meaning, else with the eager level alone.
        refuses: ``(op, where)`` -> why this one may not stand there although its kind may, or None.
    """

    kind: str
    lead: str | None = None
    args: tuple[int, int | None] = (1, 1)
    attrs: Mapping[str, AttrDef] = field(default_factory=dict)
    defines: bool = True
    forward_refs: bool = False
    token_local: bool = True
    check: Callable[[Program, Op], None] = _accepted
    accepts: Callable[[Program, Op, Sequence[Type]], None] = _accepted
    width: Callable[[Op, Sequence[int], int], int] = _widest
    pads: Callable[[Op, int], int] = lambda o, before: before
    absent: Callable[[Sequence[int]], int] = lambda absences: max(absences, default=0)
    typed: Callable[[Program, Op, Sequence[Type]], Type] | None = None
    lag: Callable[[Op], int] = lambda o: 0
    begins: Callable[[Op, int], int] = lambda o, first: first
    slots_read: Callable[[Op], tuple[int, ...]] = _no_slots
    slot_written: Callable[[Op], int | None] = _no_slot
    waits: Callable[[Op], bool] = lambda o: False
    depth: Callable[[Op], tuple[int, int]] = lambda o: (0, 0)
    parameters: Callable[[Op, Sequence[int], int], Sequence[Param]] = _nothing
    holder: Callable[[Mapping[str, Param], Tensor], nn.Module] | None = None
    meaning: Callable[..., Tensor] | None = None
    constants: tuple[str, ...] = ()
    applied: Callable[[nn.Module, Op, Sequence[Tensor]], Tensor] | None = None
    work: Callable[[Op, Sequence[int], int, int], Work] | None = _once
    runs: frozenset[str] | None = None
    refuses: Callable[[Op, str], str | None] = lambda o, place: None

    @property
    def legal(self) -> frozenset[str]:
        """Where it may stand besides the eager level."""
        if self.runs is not None:
            return self.runs
        return frozenset() if self.meaning is None else EVERYWHERE

    @property
    def computed(self) -> Callable[..., Tensor]:
        """``meaning`` of an op that has one."""
        if self.meaning is None:
            raise TypeError(f"op {self.kind!r} has no meaning of its own")
        return self.meaning

    def given(self, o: Op) -> dict[str, Any]:
        """The constants that ``meaning`` is given."""
        return {name: o[name] for name in self.constants}

    def scopes(self, o: Op) -> tuple[str, ...]:
        """Names of the modules that hold an op's new parameters, in the order of its attributes."""
        return tuple(name for key, a in self.attrs.items() if a.scope and (name := o[key]))

    def scope(self, o: Op) -> str | None:
        """Name of the one module of a token-local op; None where it has no parameters of its own."""
        return next(iter(self.scopes(o)), None)

    def apply(self, module: nn.Module | None, o: Op, streams: Sequence[Tensor]) -> Tensor:
        """A token-local op on streams, through the module that holds its parameters."""
        if module is None:
            return self.computed(*streams, **self.given(o))
        if self.applied is not None:
            return self.applied(module, o, streams)
        return module(*streams, **self.given(o))


def where(o: Op) -> str:
    """An op in an error message."""
    return f"%{o.name} = {o.kind}" if o.name else o.kind


def expect(ok: bool, o: Op, want: str, got: str) -> None:
    """Raise VerifyError unless ok."""
    if not ok:
        raise VerifyError(f"{where(o)}: expected {want}, got {got}.")
