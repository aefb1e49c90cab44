"""What a pass is: a frozen dataclass whose fields are its options and whose one method rewrites a program."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Self

from depthpass.annotations import check_field, integers
from depthpass.errors import SpecError
from depthpass.ir.program import Program
from depthpass.limits import INTEGER, shown
from depthpass.passes.options import Named, as_python, default_of, options, require, short, told
from depthpass.prompt import in_notebooks

__all__ = ["Context", "Numerics", "Pass", "default_of", "options", "require"]

Numerics = Literal["exact", "reassociated", "changing"]
"""``exact``: same numbers; ``reassociated``: same up to rounding; ``changing``: another function."""


@dataclass(frozen=True)
class Context:
    """What a pass may know about the stock model besides its program.

    Attributes:
        model: class name of the stock model.
        model_type: transformers' ``config.model_type``; empty for a program without a model.
        blocks: number of physical blocks.
        width: width of the hidden stream.
        facts: further facts of the config by its own names, e.g. ``max_position_embeddings``.
    """

    model: str
    model_type: str
    blocks: int
    width: int
    facts: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))

    @classmethod
    def of(cls, program: Program, model_type: str = "", **facts: object) -> Context:
        """The context that a program alone tells: for programs written by hand."""
        return cls(program.model, model_type, program.blocks, program.width, MappingProxyType(dict(facts)))


@in_notebooks
@dataclass(frozen=True, repr=False)
class Pass(metaclass=Named):
    """Base of every pass.

    A subclass is a frozen dataclass. Its fields are its options in Python, YAML and JSON alike; they may be int,
    float, bool, str, None, Literal, tuples and Sequences of these (which are kept as tuples), and unions. They are
    checked against their annotations when the pass is built; ``validate`` adds what annotations cannot
    say, ``apply`` what only the program tells.

    Attributes:
        name: the name in specs and in program comments.
        numerics: what the pass may do to the numbers when its new parameters are at their initial values or its
            options at their identity setting is said in its docstring; this is what it does in general.
        shown: options that provenance comments show even at their defaults.
        loop_field: the option that counts iterations, which :func:`depthpass.set_loops` changes; None = no loop.
        names: options whose integers name something (a token) or only limit it (a window); all others are counts and
            positions, which are bounded, because a spec may come with somebody else's checkpoint.
    """

    name: ClassVar[str] = ""
    numerics: ClassVar[Numerics] = "changing"
    shown: ClassVar[tuple[str, ...]] = ()
    loop_field: ClassVar[str | None] = None
    names: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        if "__repr__" not in vars(cls):  # set here, before @dataclass writes one that says every default
            cls.__repr__ = as_python  # type: ignore[method-assign, assignment]

    def __post_init__(self) -> None:
        types = self.field_types()
        for f in fields(self):
            value = check_field(f"{self.name}.{f.name}", getattr(self, f.name), types[f.name])
            if f.name not in self.names and (most := max(map(abs, integers(value)), default=0)) > INTEGER:
                raise SpecError(f"{self.name}.{f.name}: expected integers of at most {INTEGER}, got {shown(most)}.")
            object.__setattr__(self, f.name, value)
        self.validate()

    @classmethod
    def field_types(cls) -> dict[str, Any]:
        """Resolved annotation of every option."""
        hints = typing.get_type_hints(cls)
        return {f.name: hints[f.name] for f in fields(cls)}

    def validate(self) -> None:
        """Check the options against each other.

        Raises:
            SpecError: naming the field, what was expected, what was given and what to do.
        """

    @property
    def varies(self) -> Literal["drawn", "length"] | None:
        """Whether the pass stands for several: its loop count is ``drawn`` in training, or follows the row's ``length``."""
        return None

    def settled(self, *, tokens: int | None = None, drawn: bool = False, most: bool = False) -> Self:
        """The pass with a loop count that is a number; itself when it has one.

        Args:
            tokens: real tokens of the row, for a count that depends on them.
            drawn: draw the count now, from torch's default generator, instead of taking the one for evaluation.
            most: the largest count that can be drawn.
        """
        return self

    def with_loops(self, times: Any) -> Self:
        """The same pass with another number of iterations.

        Raises:
            SpecError: it has no iterations, or cannot have that many.
        """
        if self.loop_field is None:
            raise SpecError(f"{self.name}: expected a pass with a loop count, got one without.")
        return replace(self, **{self.loop_field: times})

    def apply(self, program: Program, ctx: Context) -> Program:
        """Return the rewritten program; pure.

        Args:
            program: a verified program.
            ctx: facts of the stock model.

        Raises:
            PassError: the pass cannot be applied to this program.
        """
        raise NotImplementedError(f"{type(self).__name__} must define apply(program, ctx).")

    @property
    def label(self) -> str:
        """Short text for provenance comments: the name, the ``shown`` options and those that differ from defaults."""
        given = ", ".join(f"{k}={short(v)}" for k, v in told(self, self.shown).items())
        return f"{self.name}({given if len(given) <= 50 else given[:50].rsplit(',', 1)[0] + ', ..'})"

    def describe(self) -> str:
        """The name and every option that was given or that says what the pass does, in full: ``loop(start=1, times=2)``."""
        given = told(self, (*self.shown, self.loop_field)).items()
        return f"{self.name}({', '.join(f'{k}={list(v) if isinstance(v, tuple) else v}' for k, v in given)})"
