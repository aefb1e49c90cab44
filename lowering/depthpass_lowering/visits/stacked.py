"""Stacked visits: several visits of one block as rows of one call (see :mod:`depthpass.schedule.stacking`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from depthpass.capture.captured import Template
from depthpass.schedule.stacking import Stack
from depthpass_lowering.visits.cut import cut_for
from depthpass_lowering.visits.running import RunningVisit

_COMMON = ("submodule", "adapt", "graph", "modulate", "columns")


class StackedVisit:
    """Visits of one block over one span: answers the block's graph for all their rows at once.

    Rows of the first member come first. At each attention call every member first writes its keys, then all members that
    read the same keys do so together, as more queries of one attention: those keys are read once.

    Args:
        members: one visit per place of the stack.
        hidden: the block's input, ``[members * batch, tokens, width]``.
    """

    def __init__(self, stack: Stack, members: Sequence[RunningVisit], hidden: Tensor):
        self.stack, self.members, self.hidden = stack, members, hidden
        self.index = stack.index

    def run(self, template: Template, hidden: Tensor, side_inputs: Sequence[Tensor], params, runner=None) -> Tensor:
        # Rows that have no keys of their own run along with those that have.
        leader = next((visit for visit in self.members if visit.writes), self.members[0])
        graph = cut_for(leader.op, self.graph(template)).rest
        return (graph if runner is None else runner(graph))(self, hidden, *side_inputs, *params)

    def attend(self, number: int, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
        members = self.members
        qs, ks, vs = (() if t is None else t.chunk(len(members)) for t in (q, k, v))
        own = {i: visit.extend(number, ks[i], vs[i]) for i, visit in enumerate(members) if visit.writes}
        out: list[Tensor] = [q] * len(members)
        for slot, who in self.stack.readers:
            visit, writer = members[who[0]], self.stack.writers.get(slot)
            if writer is None:
                shared = visit.shared_slot
                keys, values, mask = shared.keys[number], shared.values[number], visit.shared_mask(number)
            else:
                keys, values = own[writer]
                mask = visit.masks.get(*visit.limits(number))
            parts = _together(visit, number, [qs[i] for i in who], keys, values, sinks, mask)
            for i, part in zip(who, parts):
                out[i] = part
        for who in self.stack.gated:
            near = _rows([members[i].near(number, qs[i], own[i][0], own[i][1], sinks) for i in who])
            queries, far = (_rows([x[i] for i in who]) for x in (qs, out))
            visit = members[who[0]]
            # Only some gates read the block's input.
            hidden = None if visit.op["gate_input"] == "query" else _rows([self.hidden.chunk(len(members))[i] for i in who])
            mixed = visit.mix(queries, hidden, far, near)
            for i, part in zip(who, mixed.chunk(len(who))):
                out[i] = part
        return torch.cat(out)

    def __getattr__(self, name: str) -> Any:
        # What the members have in common: parameters, factors, columns.
        if name not in _COMMON:
            raise AttributeError(f"stacked visits have no {name!r} in common")
        return getattr(self.members[0], name)

    def commit(self) -> None:
        for visit in self.members:
            visit.commit()


def _rows(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _together(
    visit: RunningVisit, number: int, queries: list[Tensor], k: Tensor, v: Tensor, sinks: Tensor | None,
    mask: tuple[Tensor | None, bool],
) -> Sequence[Tensor]:
    """Attention of several members' queries ``[B, H, C, D]`` to the same keys: ``[B, C, H, Dv]`` per member."""
    seen, causal = mask
    if len(queries) == 1 or causal:
        return [visit.attention(number, q, k, v, sinks, mask) for q in queries]
    if seen is not None:
        seen = seen.repeat(1, 1, len(queries), 1)
    return visit.attention(number, torch.cat(queries, 2), k, v, sinks, (seen, False)).chunk(len(queries), 1)
