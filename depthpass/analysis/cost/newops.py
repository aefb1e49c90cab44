"""Cost of the ops that passes add: learned maps, sums, gates, per-visit parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import sympy as sp

from depthpass.analysis.cost.stock import ModelCost
from depthpass.analysis.cost.symbols import B
from depthpass.analysis.cost.visits import Tokens
from depthpass.ir.definitions import Type
from depthpass.ir.ops import OPS
from depthpass.ir.program import Op, Program
from depthpass.ir.verify import parameters


@dataclass(frozen=True)
class NewOps:
    """What passes added to a program.

    Attributes:
        parameters: distinct new parameters.
        parameters_visited: once per op that reads them.
        by_op: FLOPs by value name, in B and n.
        per_call: FLOPs by visit name of every call of the visit, whatever its tokens: a LoRA of its own is multiplied out
            and added to the stock weight before the weight's product.
        tokens: tokens an op works on, by value name.
        elements: weights an op reads, by value name.
        elementwise_flops: sums, products, activations.
        saved_elements: activation elements kept for backward.
        trained: names of values computed from new parameters.
        notes: what is not counted.
    """

    parameters: int = 0
    parameters_visited: int = 0
    by_op: Mapping[str, sp.Expr] = field(default_factory=dict)
    per_call: Mapping[str, int] = field(default_factory=dict)
    tokens: Mapping[str, Tokens] = field(default_factory=dict)
    elements: Mapping[str, int] = field(default_factory=dict)
    elementwise_flops: sp.Expr = sp.S.Zero
    saved_elements: sp.Expr = sp.S.Zero
    trained: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def flops(self) -> sp.Expr:
        """Forward, over all tokens; without what a visit does in every call."""
        return sum(self.by_op.values(), sp.Integer(0))

    def decode_flops(self, expected: bool) -> sp.Expr:
        """One token per row, as expected over routes or on every route."""
        fixed = sp.Integer(sum(self.per_call.values()))
        return fixed + sum(
            (e / self.tokens[k].total * (self.tokens[k].share if expected else 1)
             for k, e in self.by_op.items() if self.tokens[k].total != 0),
            sp.Integer(0),
        )


def new_ops(program: Program, model: ModelCost, types: Mapping[str, Type], tokens: Mapping[str, Tokens]) -> NewOps:
    """Count everything in a program that the stock model does not have."""
    by_op: dict[str, sp.Expr] = {}
    elements: dict[str, int] = {}
    elementwise = saved = sp.Integer(0)
    per_call: dict[str, int] = {}
    distinct: dict[str, int] = {k: math.prod(p.shape) for k, p in parameters(program, dict(types)).items() if p.trained}
    notes: list[str] = []
    for o in program.ops:
        if not o.name or types[o.name].is_route:
            continue
        rows, width = B * tokens[o.name].total, types[o.name].width
        definition, widths = OPS[o.kind], [types[a].width for a in o.args]
        if definition.work is not None:
            work = definition.work(o, widths, width, program.width)
            if work.flops:
                by_op[o.name] = rows * work.flops
            elementwise += rows * work.elementwise
            saved += rows * work.saved
            notes += [work.note] if work.note else []
            if declared := definition.parameters(o, widths, program.width):
                elements[o.name] = sum(math.prod(p.shape) for p in declared)
        elif o.kind == "block":
            for name, size, flops in _gates(o, model):
                distinct[name] = size
                elements[o.name] = elements.get(o.name, 0) + size
                by_op[o.name] = by_op.get(o.name, sp.Integer(0)) + rows * flops
            if o["lora"] is not None:
                shapes, r = [(a, b) for _, a, b in model.blocks[o["index"]].matrices], o["lora_rank"]
                distinct[f"lora {o['lora']}"] = size = sum(r * (a + b) for a, b in shapes)
                elements[o.name] = elements.get(o.name, 0) + size
                per_call[o.name] = sum(2 * r * a * b for a, b in shapes)
                notes.append("per-visit LoRA is multiplied out for every call of a visit (chunk by chunk in a token loop); not "
                             "counted: writing and reading the weights it makes, and adding it to them")
            if o["modulate"] is not None:
                # Two scaled and two gated values per token; a clock's factors are made once for all tokens.
                elementwise += 4 * rows * width
                elements[o.name] = elements.get(o.name, 0) + 4 * width * (1 if o["clock"] is None else width + 1)
                if o["clock"] is not None:
                    notes.append("not counted: time encoders and the factors made from them, once per call")
    return NewOps(
        sum(distinct.values()), sum(elements.values()), {k: sp.expand(e) for k, e in by_op.items()}, per_call,
        {k: tokens[k] for k in by_op}, elements, sp.expand(elementwise), sp.expand(saved), tuple(elements),
        tuple(dict.fromkeys(notes)),
    )


def _gates(o: Op, model: ModelCost) -> list[tuple[str, int, int]]:
    """(name, elements, FLOPs per token) of a visit's gate."""
    part, gates = model.blocks[o["index"]], []
    if o["gate"] is not None:
        # One sigmoid gate per head: from the query itself, or from a norm and a linear map of the block's input.
        heads = sum(s.heads for s in part.count.sites)
        if o["gate_input"] == "query":
            size, flops = sum(s.heads * (s.key_dim + 1) for s in part.count.sites), sum(
                2 * s.heads * s.key_dim for s in part.count.sites
            )
        else:
            size, flops = heads * (model.width + 1) + model.width, 2 * heads * model.width
        gates.append((f"gate {o['gate']}", size, flops))
    return gates
