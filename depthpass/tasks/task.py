"""What a task is: problems of any length, as prompt, trace and answer, from one program on a tape."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from functools import cached_property
from numbers import Integral
from typing import Any, ClassVar, Literal

from depthpass.annotations import checked
from depthpass.errors import InputError, did_you_mean
from depthpass.prompt import at_prompt, in_notebooks
from depthpass.tasks.checker import Check, check
from depthpass.tasks.dags import TaskDAG
from depthpass.tasks.tape import Tape, Trace

Size = Literal["S", "M", "L"]

FAR = 32
"""Lengths up to so many times the end of a task's longest range can be drawn; a slip of the pen would fill the memory."""


@at_prompt
@dataclass(frozen=True)
class Instance:
    """One problem.

    Attributes:
        task: what it is one of.
        length: its length parameter.
        problem: the problem as data.
        prompt, answer: as text.
    """

    task: Task
    length: int
    problem: Any
    prompt: str
    answer: str

    @cached_property
    def trace(self) -> Trace:
        """The run of the task's program on this problem."""
        return self.task.trace(self.problem)

    @cached_property
    def dag(self) -> TaskDAG:
        """The trace as a task DAG: a node per atomic state, an edge per fetch of another state."""
        return TaskDAG(f"{self.task.name}({self.length})", self.trace.graph, inputs_are_nodes=False,
                       note="one node is an atomic state of this instance's trace; input symbols are not nodes")

    @property
    def response(self) -> str:
        """Trace and answer, as a chain of thought writes them."""
        return f"{self.trace}\nanswer {self.answer}"

    @property
    def text(self) -> str:
        return f"{self.prompt}\n{self.response}"

    @cached_property
    def rounds(self) -> tuple[str, ...]:
        """One text per loop for supervision loop by loop; see :meth:`Task.rounds`."""
        return self.task.rounds(self.problem)

    @checked("check")
    def check(self, response: str) -> Check:
        """Judge a response to this prompt; see :func:`depthpass.tasks.checker.check`."""
        return check(response, self.trace, self.answer)

    def record(self, *, trace: bool = True) -> dict[str, Any]:
        """Plain data, for files and ``datasets``."""
        record = {"task": self.task.name, "length": self.length, "prompt": self.prompt, "answer": self.answer}
        if trace:
            record |= {"trace": str(self.trace), "size": self.dag.size, "depth": self.dag.depth, "width": self.dag.width}
        return record


@in_notebooks
class Task(ABC):
    """A family of problems with a length parameter.

    Subclasses are frozen dataclasses: their fields are the task's options. Drawing, printing and parsing are theirs, and so
    is the program that :meth:`run` runs on a tape; trace, DAG, rounds and checker follow from it.

    Class attributes:
        name: of the registry.
        family: the file's subject.
        unit: what the length counts.
        ranges: lengths (both included) called S, M and L; training on S and evaluating on M and L measures length
            generalisation.
        least, most: lengths that can be drawn at all; most None = ``FAR`` times the end of the longest range.
        source: the paper.
    """

    name: ClassVar[str]
    family: ClassVar[str]
    unit: ClassVar[str]
    ranges: ClassVar[dict[str, tuple[int, int]]]
    least: ClassVar[int] = 1
    most: ClassVar[int | None] = None
    source: ClassVar[str] = ""
    symbols: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def draw(self, length: int, rng: random.Random) -> Any:
        """A random problem of this length."""

    @abstractmethod
    def show(self, problem: Any) -> str:
        """The prompt."""

    @abstractmethod
    def parse(self, prompt: str) -> Any:
        """The problem that a prompt states: the inverse of :meth:`show`."""

    @abstractmethod
    def run(self, problem: Any, tape: Tape) -> str:
        """Solve the problem on the tape; returns the answer."""

    def rounds(self, problem: Any) -> tuple[str, ...]:
        """One text per loop: what is known after each round. By default the values of each level of the DAG."""
        from depthpass.tasks.tape import show

        return tuple(" ".join(show(s.cell.value) for s in level) for level in self.trace(problem).levels)

    def trace(self, problem: Any) -> Trace:
        """The run of the program on a problem."""
        tape = Tape()
        self.run(problem, tape)
        return Trace(tape.inputs, tuple(tape.steps))

    def answer(self, problem: Any) -> str:
        """What the program answers."""
        return self.run(problem, Tape())

    @checked("instance")
    def instance(self, length: Any, seed: int | str = 0) -> Instance:
        """The instance of a length and a seed: the same on every machine and in every process.

        Raises:
            InputError: a length out of range.
        """
        length = self.check_length(length)
        options = ",".join(f"{f.name}={getattr(self, f.name)!r}" for f in fields(self))  # type: ignore[arg-type]
        problem = self.draw(length, random.Random(f"{self.name}({options}) {length} {seed}"))
        return self.of(problem, length)

    def of(self, problem: Any, length: int) -> Instance:
        """The instance of a given problem."""
        return Instance(self, length, problem, self.show(problem), self.answer(problem))

    @checked("check")
    def check(self, prompt: str, response: str) -> Check:
        """Judge a response to a prompt.

        Raises:
            InputError: not a prompt of this task.
        """
        try:
            problem = self.parse(prompt.strip())
        except (ValueError, IndexError, KeyError) as error:
            raise InputError(f"task {self.name!r}: expected a prompt such as {self.instance(self.least).prompt!r}, got "
                             f"{prompt!r} ({error}).") from None
        return check(response, self.trace(problem), self.answer(problem))

    def check_length(self, length: int) -> int:
        """The length, if it can be drawn.

        Raises:
            InputError: it cannot.
        """
        most = self.most or FAR * max((b for _, b in self.ranges.values()), default=FAR)
        if isinstance(length, bool) or not isinstance(length, Integral) or not self.least <= length <= most:
            span = f"of at least {self.least} and at most {most}"
            said = ", ".join(f"{k} {a}-{b}" for k, (a, b) in self.ranges.items())
            raise InputError(f"task {self.name!r}: expected a length ({self.unit}) {span}, got {length!r}. Its ranges are "
                             f"{said}.")
        return int(length)

    def span(self, lengths: Size | int | tuple[int, int]) -> tuple[int, int]:
        """Shortest and longest length: of a range by name, of one length, or of a pair.

        Raises:
            InputError: an unknown range or a length that cannot be drawn.
        """
        if isinstance(lengths, str):
            if lengths not in self.ranges:
                raise InputError(f"task {self.name!r}: lengths: expected one of {', '.join(self.ranges)}, a length or a pair "
                                 f"of lengths, got {lengths!r}.{did_you_mean(lengths, self.ranges)}")
            return self.ranges[lengths]
        given: Any = lengths
        pair: tuple[Any, ...] = (given, given) if isinstance(given, Integral) else ()
        pair = tuple(given) if isinstance(given, list | tuple) else pair
        if len(pair) != 2 or pair[0] > pair[1]:
            raise InputError(f"task {self.name!r}: lengths: expected S, M, L, a length or a pair (shortest, longest), got "
                             f"{lengths!r}.")
        return self.check_length(pair[0]), self.check_length(pair[1])
