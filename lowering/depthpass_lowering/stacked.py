"""Stacked visits: several visits of one block as rows of one call (see :mod:`depthpass.schedule.stacking`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from depthpass.capture.model import Template
from depthpass.ir.program import writes_slot
from depthpass_lowering.visits import RunningVisit


class StackedVisit:
    """Visits of one block over one span: answers the block's graph for all their rows at once.

    Rows of the first member come first. At each attention call every member first writes its keys, then all members that
    read the same keys do so together, as more queries of one attention: those keys are read once.

    Args:
        members: the writer of a slot before its readers.
    """

    def __init__(self, members: Sequence[RunningVisit]):
        self.members, self.index = tuple(members), members[0].index
        self.hidden: Tensor | None = None
        self.readers: dict[int, list[int]] = {}
        self.gated: dict[str, list[int]] = {}
        for i, visit in enumerate(self.members):
            o = visit.op
            self.readers.setdefault(o["slot"] if o["keys"] is None else o["keys"], []).append(i)
            if o["gate"] is not None:
                self.gated.setdefault(o["gate"], []).append(i)

    def attend(self, number: int, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
        count = len(self.members)
        qs, ks, vs = (t.unflatten(0, (count, -1)) for t in (q, k, v))
        own = [
            visit.extend(number, ks[i], vs[i]) if writes_slot(visit.op) is not None else None
            for i, visit in enumerate(self.members)
        ]
        written = {writes_slot(visit.op): pair for visit, pair in zip(self.members, own) if pair is not None}
        out: list[Tensor] = [q] * count
        for slot, who in self.readers.items():
            first = self.members[who[0]]
            if slot in written:
                keys, values, mask = *written[slot], first.masks.get(*first.limits(number))
            else:
                keys, values = first.shared.keys[number], first.shared.values[number]
                mask = first.shared_mask(number)
            for i, part in zip(who, _joined(first, number, _some(qs, who), keys, values, sinks, mask)):
                out[i] = part
        for who in self.gated.values():
            near = [self.members[i].near(number, qs[i], *own[i], sinks) for i in who]
            far = [out[i] for i in who]
            queries = _some(qs, who).flatten(0, 1)
            hidden = _some(self.hidden.unflatten(0, (count, -1)), who).flatten(0, 1)
            mixed = self.members[who[0]].mix(queries, hidden, torch.cat(far), torch.cat(near))
            for i, part in zip(who, mixed.unflatten(0, (len(who), -1))):
                out[i] = part
        return torch.cat(out)

    def submodule(self, path: str, *args: Tensor) -> Tensor:
        return self.members[0].submodule(path, *args)

    def adapt(self, names: Sequence[str], tensors: list[Tensor]) -> list[Tensor]:
        return self.members[0].adapt(names, tensors)

    def graph(self, template: Template) -> fx.GraphModule:
        return self.members[0].graph(template)

    def modulate(self, place: str, x: Tensor) -> Tensor:
        return self.members[0].modulate(place, x)

    def columns(self, device: torch.device) -> Tensor:
        return self.members[0].columns(device)

    def commit(self) -> None:
        for visit in self.members:
            visit.commit()


def _some(stack: Tensor, who: Sequence[int]) -> Tensor:
    """Some members of a stack, in order."""
    low, high = who[0], who[-1] + 1
    return stack[low:high] if high - low == len(who) else stack[list(who)]


def _joined(
    visit: RunningVisit, number: int, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None,
    mask: tuple[Tensor | None, bool],
) -> Sequence[Tensor]:
    """Attention of several members' queries ``[members, B, H, C, D]`` to the same keys: ``[B, C, H, Dv]`` per member."""
    members, batch, _, count, _ = q.shape
    seen, causal = mask
    if members == 1 or causal:
        return [visit.attention(number, part, k, v, sinks, mask) for part in q]
    together = q.permute(1, 2, 0, 3, 4).flatten(2, 3)
    if seen is not None:
        seen = seen.repeat(1, 1, members, 1)
    out = visit.attention(number, together, k, v, sinks, (seen, False))
    return out.unflatten(1, (members, count)).unbind(1)
