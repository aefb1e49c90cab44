"""A case's models and rows, what the oracle says of them, and how numbers are compared."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import depthpass as dp
from depthpass.fuzz import models
from depthpass.fuzz.oracle import Meaning
from depthpass.fuzz.specs import Case
from depthpass.fuzz.stock_rows import Row, averaged, list_attention

LIMIT = 2e-6
"""Relative to the largest value compared: stock norms and rotary tables go through float32, whose last bit may flip."""
PAD = 5


class Mismatch(Exception):
    """A number differs from the oracle's.

    Attributes:
        excess: the error over its limit; infinite where something else than rounding would have to be.
    """

    def __init__(self, message: str, excess: float = float("inf")):
        super().__init__(message)
        self.excess = excess


class Subject:
    """A case's models and rows.

    Raises:
        DepthpassError: the transform is refused.
    """

    def __init__(self, case: Case) -> None:
        self.case, self.worst = case, 0.0
        self.limit = max(LIMIT, models.COARSE.get(case["arch"], 0.0))
        self.stock = models.stock(case["arch"], case["layers"])
        self.model = self.transformed()
        self.base = averaged(self.stock, self.model.depth_program)
        self.p = {n: v.detach() for n, v in [*self.model.depth.named_parameters(), *self.model.depth.named_buffers()]}
        self.varies = any(isinstance(s.get("times"), str) for s in case["spec"])
        generator = torch.Generator().manual_seed(case["seed"])
        self.rows = [self.tokens(n, generator) for n in case["lengths"]]
        self.meaning_of: dict[Any, dict[str, Tensor]] = {}

    def transformed(self) -> dp.DepthModel:
        c = self.case
        options = {k: c[k] for k in ("chunk", "lowering", "stack", "schedule")}
        model = dp.transform(self.stock, c["spec"], **options)
        models.enliven(model.depth, seed=c["seed"] + 1, std=0.3, least=1)
        for share in (s.get("scope", s["pass"]) for s in c["spec"] if s.get("gate") == "weight"):
            # Cut off at 0 and 1: outside, nothing flows, and no depth is recorded.
            model.depth.get_parameter(f"{share}.recurrent.share.weight").data.sigmoid_()
        return model.eval()

    @staticmethod
    def tokens(count: int, generator: torch.Generator) -> Tensor:
        """Different ones: equal tokens may have equal scores, of which rounding chooses."""
        return models.FIRST_TOKEN + torch.randperm(models.VOCABULARY - models.FIRST_TOKEN, generator=generator)[:count]

    # The rows as the model and as the oracle see them.

    def batch(self, rows: Sequence[Tensor], mask: bool | None = None, width: int = 0) -> dict[str, Tensor]:
        """The arguments of a call, padded on the case's side to ``width`` or to the longest row."""
        width, side = max(width, *map(len, rows)), self.case["side"]
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        valid = torch.zeros(len(rows), width, dtype=torch.long)
        for r, row in enumerate(rows):
            at = slice(width - len(row), width) if side == "left" else slice(0, len(row))
            ids[r, at], valid[r, at] = row, 1
        arguments = {"input_ids": ids}
        if self.case["mask"] if mask is None else mask:
            arguments["attention_mask"] = valid
        if self.case["positions"]:
            arguments["position_ids"] = (valid.cumsum(1) - 1).clamp(0)
        return arguments

    def real(self, rows: Sequence[Tensor]) -> Tensor:
        return self.batch(rows, True)["attention_mask"].bool()

    def start(self, rows: Sequence[Tensor], r: int, width: int = 0) -> int:
        """Position of a row's first token, where the caller gives none: stock models number columns, OPT real tokens."""
        counted = self.case["positions"] or self.case["side"] != "left" or self.case["arch"] == "opt"
        if self.model.depth_program.reads_positions and self.case["arch"] != "gpt2":
            counted = True
        return 0 if counted else max(width, *map(len, rows)) - len(rows[r])

    # The oracle.

    def text(self, tokens: int) -> str:
        """The program of a row of so many tokens, as text."""
        if not self.varies:
            return str(self.model.depth_program)
        return self.written([
            s | {"times": _evaluated(s["times"], tokens)} if isinstance(s.get("times"), str) else s for s in self.case["spec"]
        ])

    def written(self, spec: Any) -> str:
        """The text of the program of another spec."""
        from depthpass.hf.modules.context import context_of
        from depthpass.plan import compile_spec

        return str(compile_spec(spec, context_of(self.stock)).program)

    def want(
        self, ids: Tensor, start: int = 0, prompt: int | None = None, calls: Sequence[int] = (), p: Any = None,
        stock: nn.Module | None = None, text: str | None = None, bits: int | None = None,
    ) -> dict[str, Tensor]:
        """What the oracle says of one row: logits, ``hidden`` (the normed stream) and taps, ``[tokens, ...]``.

        Args:
            start: position of the first token.
            prompt: tokens before the pads; None = all.
            calls, bits: as of :class:`Meaning`.
            p, stock: new parameters and a stock model that gradients are wanted of.
            text: of another program than the model's.
        """
        from depthpass_lowering.executors.noise import noise

        key = (tuple(ids.tolist()), start, prompt, tuple(calls), text, bits)
        if p is None and key in self.meaning_of:
            return self.meaning_of[key]
        text = self.text(len(ids)) if text is None else text
        pads, end = _pads(text, ids, len(ids) if prompt is None else prompt)
        whole = torch.cat((ids[:end], torch.full((pads,), PAD), ids[end:]))
        calls = (calls[0] + pads, *calls[1:]) if calls else ()  # the first call has the pads
        model = self.base if stock is None else stock
        with list_attention(model), torch.set_grad_enabled(p is not None):
            row = Row(model, whole, torch.arange(start, start + len(whole)))
            given = Meaning(
                text, row, p or self.p, end, lambda number, count, width: noise(number, torch.arange(count), width), calls, bits
            ).handed_out()
            hidden = given.pop("output")
            answer = {"hidden": hidden, "logits": row.head(hidden), **given}
        if p is None:
            self.meaning_of[key] = answer
        return answer

    def same(self, what: str, got: Tensor, want: Tensor, limit: float | None = None) -> None:
        """Raise Mismatch unless two tensors are equal to the tolerance, relative to the largest value."""
        got, want = got.detach(), want.detach()
        if got.shape != want.shape:
            raise Mismatch(f"{what}: shape {tuple(got.shape)}, the oracle says {tuple(want.shape)}")
        if got.dtype == torch.bool:
            if not torch.equal(got, want):
                raise Mismatch(f"{what}: {got.tolist()}, the oracle says {want.tolist()}")
            return
        if not got.numel():
            return
        error = float((got - want).abs().max() / want.abs().max().clamp_min(1e-6))
        self.worst = max(self.worst, error)
        limit = limit or self.limit
        if not error <= limit:
            raise Mismatch(f"{what}: relative error {error:.2e}", error / limit)

    def call(self, batch: dict[str, Tensor], **more: Any) -> Any:
        with torch.no_grad():
            return self.model(**batch, **more)

    def compare(self, out: Any, rows: Sequence[Tensor], real: Tensor, prompt: int | None = None) -> None:
        taps = getattr(out, "taps", {})
        for r, row in enumerate(rows):
            want = self.want(row, self.start(rows, r), prompt)
            self.same(f"logits of row {r}", out.logits[r, real[r]], want["logits"])
            for name, tap in taps.items():
                self.same(f"tap {name} of row {r}", tap[r, real[r]], want[name])

    def same_gradients(self, batch: dict[str, Tensor], rows: Sequence[tuple[Tensor, int, Any]]) -> None:
        """Gradients of a fixed random form of the logits; rows with the position of their first token and their place in the
        batch."""
        model = self.model
        stock = copy.deepcopy(self.base).requires_grad_(True)
        model.zero_grad()
        out = model(**batch, use_cache=False).logits
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=out.dtype)
        torch.cat([(out[at] * weight[at]).flatten() for _, _, at in rows]).sum().backward()
        got = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        p = {n: v.detach().clone().requires_grad_(v.is_floating_point()) for n, v in self.p.items()}
        loss: Any = 0.0
        for row, start, at in rows:
            loss = loss + (self.want(row, start, p=p, stock=stock)["logits"] * weight[at]).sum()
        loss.backward()
        want = {n: q.grad for n, q in stock.named_parameters() if q.grad is not None}
        want |= {f"depth.{n}": v.grad for n, v in p.items() if v.grad is not None}
        largest = max((float(g.abs().max()) for g in want.values()), default=1.0)
        names = dict(model.named_parameters())
        for n in sorted(got.keys() | want.keys()):
            a, b = (g.get(n, torch.zeros_like(names[n])) for g in (got, want))
            error = float((a - b).abs().max()) / max(float(b.abs().max()), 1e-3 * largest)
            self.worst = max(self.worst, error)
            if not error <= 10 * self.limit:
                raise Mismatch(f"gradient of {n}: relative error {error:.2e}", error / (10 * self.limit))


def _pads(text: str, ids: Tensor, end: int) -> tuple[int, int]:
    """How many pads a program has, and after how many of a row's tokens."""
    pad = re.search(r"= pad (\d+) [^#\n]*", text)
    if pad is None:
        return 0, end
    if placed := re.search(r" at (\d+)", pad[0]):
        end = int(placed[1])
    if behind := re.search(r" behind (\d+)", pad[0]):
        end = ids.tolist().index(int(behind[1])) + 1
    return int(pad[1]), end


def _evaluated(times: str, n: int) -> int:
    counts: dict[str, Callable[[], int]] = {
        "ceil(log2(n))": lambda: math.ceil(math.log2(n)), "ceil(n/3)": lambda: -(-n // 3),
        "floor(sqrt(n))+1": lambda: math.isqrt(n) + 1,
    }
    return max(1, counts[times]())
