"""A query-routed visit: the routed tokens ask, keys and values come from every token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from depthpass.capture.captured import Template
from depthpass.errors import LoweringError
from depthpass.ir.program import Op
from depthpass_lowering.host import Host
from depthpass_lowering.state.slots import Span, State
from depthpass_lowering.visits.attention import Masks, column_mask
from depthpass_lowering.visits.cut import cut_for
from depthpass_lowering.visits.routes import Route
from depthpass_lowering.visits.running import RunningVisit


class QueryRoutedVisit(RunningVisit):
    """A visit whose routed tokens alone have queries; keys and values come from every token of the span.

    Attributes:
        at: columns of the routed tokens, ``[rows, k]``.
        rows: the rows with routed tokens; None = all.
        given: keys and values of the span by attention call.
    """

    def __init__(self, op: Op, host: Host, state: State, span: Span, masks: Masks, keep: bool, route: Route, axes):
        super().__init__(op, host, state, span, masks, keep)
        self.route, self.axes = route, axes
        self.rows = route.rows
        self.at: Tensor = self._pick(route.index + span.start)
        self.given: dict[int, tuple[Tensor, Tensor]] = {}
        self.attending = False

    def _pick(self, t: Tensor | None) -> Any:
        """What belongs to the rows with routed tokens."""
        return t if t is None or self.rows is None else t.index_select(0, self.rows)

    def run(self, template: Template, hidden: Tensor, side_inputs: Sequence[Tensor], params, runner=None) -> Tensor:
        """``[batch, tokens, width]`` of every token -> ``[batch, k, width]`` of the routed ones."""
        runner = runner or (lambda graph: graph)
        cut = cut_for(self.op, self.graph(template))
        assert cut.keys is not None, "a visit that routes its queries has keys of its own"
        if not self.keep:
            hidden_keys, sides_keys = self._pick(hidden), [self._side(s, axis) for s, axis in zip(side_inputs, self.axes)]
        else:
            hidden_keys, sides_keys = hidden, side_inputs
        self.attending = False
        values = runner(cut.keys)(self, hidden_keys, *sides_keys, *params)
        read = values[2 * len(self.sites) :]
        self.given = {i: (values[2 * i].contiguous(), values[2 * i + 1].contiguous()) for i in range(len(self.sites))}
        routed = self.route.gather(hidden)
        if self.route.count == 0:
            return routed
        tables = [s if axis is None else self.route.table(s, axis) for s, axis in zip(side_inputs, self.axes)]
        route = self.route if self.keep or self.rows is None else self._active()
        read = [route.table(t, axis) for t, axis in zip(read, cut.axes)]
        self.attending = True
        y = runner(cut.rest)(
            self, self._pick(routed), *(self._side(t, axis) for t, axis in zip(tables, self.axes)), *params,
            *(self._pick(t) if self.keep else t for t in read)
        )
        return y if self.rows is None else routed.to(y.dtype).index_copy(0, self.rows, y)

    def _active(self) -> Route:
        """The route on the rows with routed tokens alone."""
        return Route(self._pick(self.route.chosen), self._pick(self.route.index), self._pick(self.route.real), None)

    def _side(self, side: Tensor, axis: int | None) -> Tensor:
        """A table at the rows with routed tokens; one without a batch has a single row for all."""
        return side if axis is None or side.shape[0] == 1 else self._pick(side)

    def attend(self, number: int, q: Tensor, k: Tensor | None, v: Tensor | None, sinks: Tensor | None) -> Tensor:
        site, (keys, values) = self.sites[number], self.given[number]
        if self.keep:
            keys, values = (self._pick(t) for t in self.extend(number, keys, values))
        elif self.before is not None:
            held = (self.before.keys[number], self.before.values[number])
            keys, values = (torch.cat((self._pick(h), new), 2) for h, new in zip(held, (keys, values)))
        return self.attention(number, q, keys, values, sinks, self._query_mask(keys.shape[2], site.window, site.chunk))

    def _query_mask(self, keys: int, window: int | None, chunk: int | None) -> tuple[Tensor | None, bool]:
        columns, valid = torch.arange(keys, device=self.at.device)[None], self.masks.valid
        end = self.span.start + self.span.count
        ahead = self.masks.ahead
        if ahead is None and valid is None and self.span.count == 1 and chunk is None and (window is None or window >= end):
            return None, False
        start = self._pick(self.masks.row_start)
        mask = column_mask(self.at[..., None], columns[:, None], window, chunk, self._pick(valid), start, ahead)
        return mask[:, None], False

    def columns(self, device: torch.device) -> Tensor:
        if not self.attending:
            return super().columns(device)
        raise LoweringError(
            f"block {self.index} counts the columns of its tokens itself, so its queries cannot be routed. Leave this "
            "block out of the routed steps."
        )

    def commit(self) -> None:
        if self.keep and not self.extended:  # nobody asked, but later tokens will see this span
            for number, (k, v) in self.given.items():
                self.extend(number, k, v)
        self.given = {}
        super().commit()
