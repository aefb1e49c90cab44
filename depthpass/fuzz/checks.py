"""Run a case: the transformed model against the oracle, on every level and through every door that the case names."""

from __future__ import annotations

import copy
import functools
import json
import random
import re
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import depthpass as dp
from depthpass.fuzz import models
from depthpass.fuzz.cases import Case
from depthpass.fuzz.oracle import Meaning, Row, averaged, list_attention

LIMIT = 2e-6
"""Relative to the largest value compared: stock norms and rotary tables go through float32, whose last bit may flip."""
PAD = 5


class Mismatch(Exception):
    """A number differs from the oracle's."""


def run_case(case: Case) -> dict[str, Any]:
    """Run a case.

    Returns:
        ``result`` (``ok``, ``refused`` or ``fault``); of the latter two ``kind``, what happened in words that stay the same
        for equal causes, and ``message``; of a fault ``where`` too, the last line of depthpass that was running.
    """
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    done: list[str] = []
    refusals: list[str] = []
    with warnings.catch_warnings(), sharing_captures():
        warnings.simplefilter("ignore")
        try:
            subject = Subject(case)
        except dp.DepthpassError as error:
            return {"result": "refused", "kind": kind_of(error), "message": str(error)[:300], "done": done}
        except Exception as error:
            return fault(error, "transform", done)
        for check in case["checks"]:
            try:
                getattr(subject, check["do"])(check)
                done.append(check["do"])
            except dp.DepthpassError as error:
                refusals.append(f"{check['do']}: {kind_of(error)}")
            except Exception as error:
                return fault(error, check["do"], done)
    found: dict[str, Any] = {"result": "ok" if done else "refused", "done": done, "error": subject.worst}
    if refusals:
        found |= {"kind": refusals[0], "refusals": refusals}
    return found


def fault(error: Exception, check: str, done: list[str]) -> dict[str, Any]:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "depthpass" in f.filename and "/fuzz/" not in f.filename] or frames[-1:]
    where = f"{ours[-1].filename.rsplit('/', 1)[-1]}:{ours[-1].lineno}"
    kind = f"{check}: mismatch" if isinstance(error, Mismatch) else f"{check}: {kind_of(error)}"
    return {"result": "fault", "kind": kind, "message": f"{type(error).__name__}: {error}"[:2000], "where": where, "done": done,
            "trace": "".join(traceback.format_exception(error))[-3000:]}


def kind_of(error: Exception) -> str:
    """Class and message of an error without what is particular to a case."""
    text = re.sub(r"%?[\d.]+|'[^']*'|\([^)]*\)|\[[^]]*\]", "_", str(error).split("\n")[0])
    return f"{type(error).__name__}: {text[:90]}"


# Captures ---------------------------------------------------------------------------------------------------------

_kept: dict[str, Any] = {}
_SKIP = ("_name_or_path", "architectures", "dtype", "transformers_version", "auto_map", "depthpass")


@contextmanager
def sharing_captures() -> Iterator[None]:
    """Capture equal stock models once in a process: a capture is a function of what the key holds, and takes seconds."""
    import depthpass.hf.model as module

    real = module.capture

    def capture(model: nn.Module, tensors: Any, static: Any) -> Any:
        if any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()):
            return real(model, tensors, static)
        config: Any = model.config
        settings = {k: v for k, v in config.to_dict().items() if k not in _SKIP}
        key = json.dumps(settings, sort_keys=True, default=str) + repr((
            type(model), model.training, sorted((n, t.dtype, t.dim()) for n, t in tensors.items()), tuple(static),
            [(n, p.dtype, tuple(p.shape)) for n, p in model.named_parameters()],
        ))
        if key not in _kept:
            _kept[key] = real(model, tensors, static)
        return _kept[key]

    module.capture = capture
    try:
        yield
    finally:
        module.capture = real


# The subject ------------------------------------------------------------------------------------------------------


class Subject:
    """A case's models and rows, and one method for every check.

    Raises:
        DepthpassError: the transform is refused.
    """

    def __init__(self, case: Case) -> None:
        self.case, self.worst = case, 0.0
        self.limit = max(LIMIT, models.COARSE.get(case["arch"], 0.0))
        self.stock = models.stock(case["arch"], case["layers"])
        self.model = self.transformed()
        self.p = {n: v.detach() for n, v in [*self.model.depth.named_parameters(), *self.model.depth.named_buffers()]}
        self.varies = any(isinstance(s.get("times"), str) for s in case["spec"])
        generator = torch.Generator().manual_seed(case["seed"])
        self.rows = [
            torch.randint(models.FIRST_TOKEN, models.VOCABULARY, (n,), generator=generator) for n in case["lengths"]
        ]
        self.meaning_of: dict[Any, dict[str, Tensor]] = {}

    def transformed(self) -> dp.DepthModel:
        c = self.case
        options = {k: c[k] for k in ("chunk", "lowering", "stack", "schedule")}
        made = dp.transform(self.stock, c["spec"], **options)
        models.enliven(made.depth, seed=c["seed"] + 1, std=0.3, least=1)
        return made.eval()

    # The rows as the model and as the oracle see them.

    def batch(self, rows: Sequence[Tensor], mask: bool | None = None, width: int = 0) -> dict[str, Tensor]:
        """The arguments of a call, padded on the case's side to ``width`` or to the longest row."""
        width, side = max(width, *map(len, rows)), self.case["side"]
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        valid = torch.zeros(len(rows), width, dtype=torch.long)
        for r, row in enumerate(rows):
            at = slice(width - len(row), width) if side == "left" else slice(0, len(row))
            ids[r, at], valid[r, at] = row, 1
        made = {"input_ids": ids}
        if self.case["mask"] if mask is None else mask:
            made["attention_mask"] = valid
        if self.case["positions"]:
            made["position_ids"] = (valid.cumsum(1) - 1).clamp(0)
        return made

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
        from depthpass.hf.context import context_of
        from depthpass.plan import compile_spec

        passes = [
            s | {"times": _evaluated(s["times"], tokens)} if isinstance(s.get("times"), str) else s for s in self.case["spec"]
        ]
        context = context_of(self.stock)
        return str(compile_spec(passes, context).program)

    def want(
        self, ids: Tensor, start: int = 0, prompt: int | None = None, calls: Sequence[int] = (), p: Any = None,
        stock: nn.Module | None = None,
    ) -> dict[str, Tensor]:
        """What the oracle says of one row: logits, ``hidden`` (the normed stream) and taps, ``[tokens, ...]``."""
        from depthpass_lowering.executors.noise import noise

        key = (tuple(ids.tolist()), start, prompt, tuple(calls))
        if p is None and key in self.meaning_of:
            return self.meaning_of[key]
        end = len(ids) if prompt is None else prompt
        text = self.text(len(ids))
        pads = next((int(n) for n in re.findall(r"= pad (\d+)", text)), 0)
        whole = torch.cat((ids[:end], torch.full((pads,), PAD), ids[end:]))
        calls = (calls[0] + pads, *calls[1:]) if calls else ()  # the first call has the pads
        model = stock if stock is not None else averaged(self.stock, self.model.depth_program)
        with list_attention(model), torch.set_grad_enabled(p is not None):
            row = Row(model, whole, start)
            given = Meaning(
                text, row, p or self.p, end, lambda number, count, width: noise(number, torch.arange(count), width), calls
            ).handed_out()
            hidden = given.pop("output")
            found = {"hidden": hidden, "logits": row.head(hidden), **given}
        if p is None:
            self.meaning_of[key] = found
        return found

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
        if not error <= (limit or self.limit):
            raise Mismatch(f"{what}: relative error {error:.2e}")

    # Checks.

    def call(self, batch: dict[str, Tensor], **more: Any) -> Any:
        with torch.no_grad():
            return self.model(**batch, **more)

    def forward(self, check: Case) -> None:
        batch, real = self.batch(self.rows), self.real(self.rows)
        labels = None
        if check.get("loss"):
            labels = batch["input_ids"].masked_fill(~real, -100)
            labels[torch.arange(len(real)), real.int().argmax(1)] = -100  # a pad would predict it
        # Where there are pads, what has no label is the prompt.
        prompt = None if labels is None else 1
        out = self.call(batch, **({} if labels is None else {"labels": labels}))
        self.compare(out, self.rows, real, prompt)
        if labels is not None:
            self.loss(out, [(row, self.start(self.rows, r)) for r, row in enumerate(self.rows)])

    def loss(self, out: Any, rows: Sequence[tuple[Tensor, int]]) -> None:
        """The mean over all tokens but the first of a row, against rows with the positions of their first tokens."""
        if self.model.depth_program.losses:
            return
        wants = [self.want(row, start, 1)["logits"] for row, start in rows]
        terms = [F.cross_entropy(w[:-1], row[1:], reduction="none") for w, (row, _) in zip(wants, rows, strict=True)]
        if sum(map(len, terms)):
            self.same("loss", out.loss, torch.cat(terms).mean())

    def compare(self, out: Any, rows: Sequence[Tensor], real: Tensor, prompt: int | None = None) -> None:
        taps = getattr(out, "taps", {})
        for r, row in enumerate(rows):
            want = self.want(row, self.start(rows, r), prompt)
            self.same(f"logits of row {r}", out.logits[r, real[r]], want["logits"])
            for name, tap in taps.items():
                self.same(f"tap {name} of row {r}", tap[r, real[r]], want[name])

    def gradients(self, check: Case) -> None:
        batch, real = self.batch(self.rows), self.real(self.rows)
        self.same_gradients(batch, [(row, self.start(self.rows, r), (r, real[r])) for r, row in enumerate(self.rows)])

    def same_gradients(self, batch: dict[str, Tensor], rows: Sequence[tuple[Tensor, int, Any]]) -> None:
        """Gradients of a fixed random form of the logits; rows with the position of their first token and their place in the
        batch."""
        model = self.model
        stock = copy.deepcopy(averaged(self.stock, model.depth_program)).requires_grad_(True)
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
                raise Mismatch(f"gradient of {n}: relative error {error:.2e}")

    def packed(self, check: Case) -> None:
        """Sequences one after the other in a row, told apart by positions that restart, or by their lengths too."""
        generator = torch.Generator().manual_seed(self.case["seed"])
        cut = [[torch.randint(models.FIRST_TOKEN, models.VOCABULARY, (n,), generator=generator) for n in row]
               for row in check["rows"]]
        batch: dict[str, Any] = {"input_ids": torch.stack([torch.cat(row) for row in cut]),
                                 "position_ids": torch.stack([torch.cat([torch.arange(len(s)) for s in row]) for row in cut])}
        if check["lengths"] and len(cut) == 1:
            ends = torch.tensor([0, *(len(s) for s in cut[0])]).cumsum(0).to(torch.int32)
            longest = max(map(len, cut[0]))
            batch |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
        pieces = [(s, 0, (r, slice(sum(map(len, row[:i])), sum(map(len, row[: i + 1])))))
                  for r, row in enumerate(cut) for i, s in enumerate(row)]
        more = {}
        if check["loss"]:
            more["labels"] = batch["input_ids"].masked_fill(batch["position_ids"] == 0, -100)
        out = self.call(batch, use_cache=False, **more)
        for n, (piece, start, at) in enumerate(pieces):
            want = self.want(piece, start, 1 if more else None)
            self.same(f"logits of sequence {n}", out.logits[at], want["logits"])
            for name, tap in getattr(out, "taps", {}).items():
                self.same(f"tap {name} of sequence {n}", tap[at], want[name])
        if more:
            self.loss(out, [(piece, start) for piece, start, _ in pieces])
        if check["gradients"]:
            self.same_gradients(batch, pieces)

    def calls(self, check: Case) -> None:
        """The rows in several calls on one cache, and what generation does to a cache between them."""
        if self.case["side"] == "right":
            return
        lot = random.Random(check["lot"])
        state = _Calls(list(self.rows), [(len(r),) for r in self.rows], max(map(len, self.rows)))
        state.cache = dp.DepthCache(self.model, record="crop" in check["events"])
        out = self.call(self.batch(state.rows), past_key_values=state.cache, use_cache=True)
        self.last(out.logits, state)
        for size, event in zip(check["sizes"], check["events"], strict=True):
            if event is not None:
                getattr(state, event)(lot)
            new = torch.randint(models.FIRST_TOKEN, models.VOCABULARY, (len(state.rows), size),
                                generator=torch.Generator().manual_seed(lot.randrange(10**6)))
            state.rows = [torch.cat(pair) for pair in zip(state.rows, new, strict=True)]
            state.history, state.width = [(*h, size) for h in state.history], state.width + size
            batch = self.batch(state.rows, width=state.width)
            batch = {k: v if k == "attention_mask" else v[:, -size:] for k, v in batch.items()}
            out = self.call(batch, past_key_values=state.cache, use_cache=True)
            self.last(out.logits, state)

    def last(self, logits: Tensor, state: _Calls) -> None:
        """The logits of the newest call, right-aligned in every row."""
        for r, row in enumerate(state.rows):
            history = state.history[r]
            count = min(logits.shape[1], history[-1])
            sizes = history if self.model.depth_program.reads_calls else ()
            want = self.want(row, self.start(state.rows, r, state.width), history[0], sizes)["logits"]
            self.same(f"call {len(history)} of row {r}", logits[r, -count:], want[-count:])

    def generate(self, check: Case) -> None:
        if self.case["side"] == "right":
            return
        given = {k: v for k, v in self.batch(self.rows, True).items() if k != "position_ids"}
        options = {"max_new_tokens": check["new"], "num_beams": check["beams"], "do_sample": False, "eos_token_id": None,
                   "return_dict_in_generate": True, "output_logits": True}
        out = self.model.generate(**given, **options)
        width = given["input_ids"].shape[1]
        logits = torch.stack(out.logits, 1)
        calls = self.model.depth_program.reads_calls
        if check["beams"] == 1:
            for r, row in enumerate(self.rows):
                whole = torch.cat((row, out.sequences[r, width:]))
                history = (len(row), *[1] * (check["new"] - 1)) if calls else ()
                # generate numbers real tokens, and hands out float32.
                want = self.want(whole[:-1], 0, len(row), history)["logits"]
                self.same(f"generated logits of row {r}", logits[r], want[-check["new"] :])
        if not calls:
            again = self.model.generate(**given, **options, use_cache=False)
            if not torch.equal(out.sequences, again.sequences):
                raise Mismatch(f"generated {out.sequences.tolist()}, without a cache {again.sequences.tolist()}")
            self.same("logits without a cache", logits, torch.stack(again.logits, 1))

    def save(self, check: Case) -> None:
        from transformers import AutoModelForCausalLM

        batch, real = self.batch(self.rows), self.real(self.rows)
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder)
            load: Any = AutoModelForCausalLM if check["auto"] else dp
            loaded = load.from_pretrained(folder, dtype=torch.float64).eval()
        if hasattr(loaded, "set_experts_implementation"):
            loaded.set_experts_implementation("eager")
        if str(loaded.depth_program) != str(self.model.depth_program):
            raise Mismatch("the loaded model has another program")
        with torch.no_grad():
            self.compare(loaded(**batch), self.rows, real)

    def door(self, check: Case) -> None:
        """The program behind another entrance than ``model(ids)``."""
        batch, real = self.batch(self.rows), self.real(self.rows)
        getattr(self, f"_{check['which']}")(batch, real)

    def _hidden(self, found: Tensor, real: Tensor) -> None:
        for r, row in enumerate(self.rows):
            self.same(f"hidden state of row {r}", found[r, real[r]], self.want(row, self.start(self.rows, r))["hidden"])

    def _decoder(self, batch, real) -> None:
        decoder = self.model.get_submodule(self.model._depth.decoder)  # get_decoder() of llama4_text gives the whole model
        with torch.no_grad():
            self._hidden(decoder(**batch).last_hidden_state, real)

    def _base_model(self, batch, real) -> None:
        if self.model.base_model is self.model:
            return
        with torch.no_grad():
            self._hidden(self.model.base_model(**batch).last_hidden_state, real)

    def _wrapped(self, batch, real) -> None:
        """Trackers and trainers put a function around ``model.forward``."""
        inner, seen = self.model.forward, []

        @functools.wraps(inner)
        def forward(*args: Any, **kwargs: Any) -> Any:
            seen.append(1)
            return inner(*args, **kwargs)

        self.model.forward = forward
        try:
            self.compare(self.call(batch), self.rows, real)
        finally:
            del self.model.forward
        if seen != [1]:
            raise Mismatch(f"the wrapper ran {len(seen)} times")

    def _embeds(self, batch, real) -> None:
        table = self.stock.get_input_embeddings()
        ids = batch.pop("input_ids")
        self.compare(self.call(batch | {"inputs_embeds": table(ids)}), self.rows, real)

    def _checkpointing(self, batch, real) -> None:
        model = self.transformed()
        model.gradient_checkpointing_enable()
        found = []
        for made in (self.model, model):
            made.train()
            try:
                made.zero_grad()
                torch.manual_seed(0)
                out = made(**batch, use_cache=False)
                out.logits[real].square().sum().backward()
            finally:
                made.eval()
            found.append({n: p.grad.clone() for n, p in made.depth.named_parameters() if p.grad is not None})
            made.zero_grad(set_to_none=True)
        for n, g in found[0].items():
            self.same(f"checkpointed gradient of {n}", found[1][n], g, 1e-6)

    def _hooked(self, batch, real) -> None:
        """A hook inside a block: the block runs as a module, the numbers stay."""
        model, seen = self.transformed(), []
        block = models.blocks_of(model)[self.case["layers"] // 2]
        inside = next(m for m in block.modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D")
        handle = inside.register_forward_hook(lambda *a: seen.append(1))
        try:
            with torch.no_grad():
                self.compare(model(**batch), self.rows, real)
        finally:
            handle.remove()
        visits = sum(o["index"] == self.case["layers"] // 2 for o in self.model.depth_program.visits)
        if visits and not seen and all(o.kind != "route" for o in self.model.depth_program):
            raise Mismatch("the hook has seen nothing")

    def depth(self, check: Case) -> None:
        """The longest path of what was read while the model ran, against the derived depth."""
        if self.varies:
            return
        from depthpass_lowering.executors.recording import record

        from depthpass.analysis.depth import depth

        program = self.model.depth_program
        made, tokens = record(self.model, self.rows[0][:5]), len(self.rows[0][:5])
        for name in (None, *(o["name"] for o in program.taps)):
            if name is not None and name not in made.outputs:
                continue
            got, want = made.depth(name), depth(program, name).at(tokens)
            if got != want:
                raise Mismatch(f"depth of {name or 'the output'} at {tokens} tokens: derived {want}, recorded {got}")


class _Calls:
    """Rows in a cache, and beside it the tokens that they really have.

    Attributes:
        history: of each row the sizes of the calls that it came in.
        width: columns, the padding included.
    """

    def __init__(self, rows: list[Tensor], history: list[tuple[int, ...]], width: int) -> None:
        self.rows, self.history, self.width = rows, history, width
        self.cache: Any = None

    def copy(self, lot: random.Random) -> None:
        self.cache = copy.deepcopy(self.cache)

    def crop(self, lot: random.Random) -> None:
        """Take back a part of the newest call, never of the prompt."""
        count = lot.randint(1, 2)
        if len(self.history[0]) > 1 and self.history[0][-1] > count:
            self.cache.crop(-count)
            self.rows, self.width = [r[:-count] for r in self.rows], self.width - count
            self.history = [(*h[:-1], h[-1] - count) for h in self.history]

    def repeat(self, lot: random.Random) -> None:
        self.cache.batch_repeat_interleave(2)
        self._take([r for r in range(len(self.rows)) for _ in range(2)])

    def reorder(self, lot: random.Random) -> None:
        order = [lot.randrange(len(self.rows)) for _ in self.rows]
        self.cache.reorder_cache(torch.tensor(order))
        self._take(order)

    def select(self, lot: random.Random) -> None:
        order = sorted(lot.sample(range(len(self.rows)), lot.randint(1, len(self.rows))))
        self.cache.batch_select_indices(torch.tensor(order))
        self._take(order)

    def _take(self, order: list[int]) -> None:
        self.rows, self.history = [self.rows[i] for i in order], [self.history[i] for i in order]


def _evaluated(times: str, n: int) -> int:
    import math

    found: dict[str, Callable[[], int]] = {
        "ceil(log2(n))": lambda: math.ceil(math.log2(n)), "ceil(n/3)": lambda: -(-n // 3),
        "floor(sqrt(n))+1": lambda: math.isqrt(n) + 1,
    }
    return max(1, found[times]())
