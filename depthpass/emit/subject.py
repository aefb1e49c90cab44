"""What the writers of an emitted module share: the stock model, the program, and what has been found out about both."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from depthpass.emit.statements import Body
from depthpass.errors import UnsupportedModelError
from depthpass.hf.calls.table import position_table
from depthpass.ir.program import Program

PREFIX = "Depth"
"""Before the stock names of emitted classes."""
OPEN = "Open"
"""Before those of layers that hand more to their attention."""
HALVED = "Halved"
"""Before those of layers that run in two halves."""
AGAIN = "Again"
"""Before the names of those of later visits."""


@dataclass
class Subject:
    """A model that is written.

    Attributes:
        model: the stock model.
        layers: attribute of the decoder that holds the blocks.
        paths, modules: from the innermost module that is a transformers model, the decoder, to the whole one.
        stack: blocks of the visits where the program is a plain stack, which stock code runs as it is.
        new: the new parameters.
        copies: give visits of one block weights of their own.
        used: names of :mod:`depthpass.emit.parts` that the text uses.
        body: statements of the program; None = the stock forward runs it.
        cache: name of the cache in the decoder's forward, where its text is written.
    """

    model: Any
    program: Program
    layers: str
    paths: list[str]
    modules: list[nn.Module]
    stack: tuple[int, ...] | None
    new: nn.Module
    model_type: str
    copies: bool
    used: set[str] = field(default_factory=set)
    body: Body | None = None
    cache: str = ""

    @classmethod
    def of(cls, model: Any, program: Program, layers: str, decoder: str, *rest: Any) -> Subject:
        """The subject of a model whose blocks and decoder stand at these paths.

        Raises:
            UnsupportedModelError: the blocks do not stand right below their decoder.
        """
        name = layers[len(decoder) + 1 if decoder else 0 :]
        if "." in name:
            raise UnsupportedModelError(f"emit: expected the blocks right below their decoder, got {layers!r}.")
        steps = decoder.split(".") if decoder else []
        paths = [".".join(steps[:i]) for i in range(len(steps), -1, -1)]
        return cls(model, program, name, paths, [model.get_submodule(p) for p in paths], *rest)

    @property
    def blocks(self) -> list[int]:
        """Block of every visit."""
        return [o["index"] for o in self.program.visits]

    @property
    def repeats(self) -> bool:
        """Whether visits share weights."""
        return not self.copies and len(set(self.blocks)) < len(self.blocks)

    @property
    def has_table(self) -> bool:
        """Whether positions are learned: such a model numbers tokens as its stock code does."""
        return position_table(self.modules[0]) is not None

    @property
    def stateful(self) -> bool:
        """Whether layers need more of earlier tokens than each its own keys."""
        return self.body is not None and bool(self.body.attends or self.body.past)

    def flags(self) -> list[str]:
        """Lines of a class body: what tools must not try with a model, from the decoder to the whole one."""
        body = self.body
        if body is None:
            return []
        lines = ["    supports_gradient_checkpointing = False"] if body.chunk is not None else []
        if self.stateful:
            lines.append("    _supports_attention_backend = False")
        if body.routed or any(o["gate"] for o in self.program.visits):
            lines += ["    _supports_flash_attn = False", "    _supports_flex_attn = False"]
        return lines

    @property
    def config(self) -> str:
        """Name of the emitted config's class."""
        return self.name(self.model.config)

    def block(self, index: int) -> nn.Module:
        return getattr(self.modules[0], self.layers)[index]

    def name(self, of: Any) -> str:
        """Name of the emitted class that takes the place of an object's."""
        return PREFIX + type(of).__name__

    def attention(self) -> tuple[str, type]:
        """Name of the attention in a block, and its class.

        Raises:
            UnsupportedModelError: there is no one.
        """
        block = self.block(0)
        sites = [(n, type(m)) for n, m in block.named_children() if "attention_interface" in _source(type(m))]
        if len(sites) != 1:
            raise UnsupportedModelError(f"emit: expected one attention module in a {type(block).__name__}, got {len(sites)}.")
        return sites[0]

    def inner_path(self, i: int) -> str:
        """Where module ``i`` holds the one inside it."""
        return self.paths[i - 1][len(self.paths[i]) + 1 if self.paths[i] else 0 :]

    def around(self) -> Iterator[int]:
        """Places of the modules around the decoder, from the inside."""
        return iter(range(1, len(self.modules)))


def _source(cls: type) -> str:
    try:
        return inspect.getsource(cls.forward)
    except (OSError, TypeError):
        return ""


def indented(text: str, by: int) -> list[str]:
    """Its lines so many blanks further in."""
    return [" " * by + line if line.strip() else "" for line in text.splitlines()]
