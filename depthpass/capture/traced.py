"""What a trace hands to the outliner: one ATen graph of a whole model, marked at the ports of its blocks.

Both routes make one: :mod:`depthpass.capture.export` from a module, :mod:`depthpass.capture.dynamo` from the graph that
Dynamo hands to a ``torch.compile`` backend.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field

import torch
from torch import fx
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from depthpass.capture.derivatives import Functions


@dataclass(frozen=True)
class Traced:
    """A traced model and where its blocks are.

    Attributes:
        module: the graph; parameters and buffers are placeholders, the ops ``depthpass::enter``, ``leave`` and ``final``
            stand at the ports of the blocks, ``depthpass::attend`` and ``depthpass::mask`` at attention calls.
        kinds: kind of each placeholder, and the full name of the parameter, buffer or constant it stands for.
        constants: values of the placeholders of kind ``CONSTANT_TENSOR``, by that name.
        written: buffers that the forward pass writes.
        out_spec: tree of the model's outputs.
        layers: module path of the list of blocks, e.g. ``model.layers``.
        count: number of blocks.
        repeats: blocks that were passed over, and the earlier block that each of them has the graph of.
        functions: those with a backward of their own that ran.
        whole_rows: what stands before the first block always sees whole rows, so it may count their tokens.
    """

    module: fx.GraphModule
    kinds: dict[str, tuple[InputKind, str | None]]
    constants: dict[str, torch.Tensor]
    written: tuple[str, ...]
    out_spec: pytree.TreeSpec | None
    layers: str
    count: int
    whole_rows: bool = False
    repeats: Mapping[int, int] = field(default_factory=dict)
    functions: Functions = field(default_factory=Functions)


def from_export(
    program: torch.export.ExportedProgram, layers: str, count: int, void: Container[str], repeats: Mapping[int, int],
    functions: Functions,
) -> Traced:
    """What ``torch.export`` traced, as a :class:`Traced`.

    Args:
        void: results that are no writes after all.
        repeats: as in :class:`Traced`.
    """
    signature = program.graph_signature
    constants = {name: value for name, value in program.constants.items() if isinstance(value, torch.Tensor)}
    return Traced(
        program.graph_module, {s.arg.name: (s.kind, s.target) for s in signature.input_specs}, constants,
        tuple(t for n, t in signature.buffers_to_mutate.items() if n not in void), program.call_spec.out_spec, layers, count,
        repeats=repeats, functions=functions,
    )
