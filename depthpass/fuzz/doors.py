"""The checks of entrances: other ways in than ``model(ids)``, and folders."""

from __future__ import annotations

import functools
import tempfile
from typing import Any

import torch
from torch import Tensor, nn

import depthpass as dp
from depthpass.fuzz import models
from depthpass.fuzz.specs import Case
from depthpass.fuzz.subject import Mismatch, Subject


class Doors(Subject):
    """The program behind other entrances."""

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

    def emit(self, check: Case) -> None:
        """Written as plain transformers code, and loaded from there."""
        from transformers import AutoModelForCausalLM

        with tempfile.TemporaryDirectory() as folder:
            dp.emit(self.model, f"{folder}/out")
            emitted = AutoModelForCausalLM.from_pretrained(
                f"{folder}/out", trust_remote_code=True, dtype=torch.float64,
                attn_implementation=self.model.config._attn_implementation).eval()
        if hasattr(emitted, "set_experts_implementation"):
            emitted.set_experts_implementation("eager")
        mine = dict(self.model.named_buffers())
        for name, buffer in emitted.named_buffers():  # rotary tables are made in float32 and were cast
            if ".layers." not in name and name in mine:
                buffer.data = mine[name].clone()
        with torch.no_grad():
            # Stock Gemma 2 has no numbers behind pads in float64, nor has the stock code in the file: there, each row alone.
            lost = bool(self.base(**self.batch(self.rows)).logits.isnan().any())
            for rows in [[row] for row in self.rows] if lost else [self.rows]:
                self.compare(emitted(**self.batch(rows)), rows, self.real(rows))

    def door(self, check: Case) -> None:
        """The program behind another entrance than ``model(ids)``."""
        batch, real = self.batch(self.rows), self.real(self.rows)
        getattr(self, f"_{check['which']}")(batch, real)

    def _hidden(self, hidden: Tensor, real: Tensor) -> None:
        for r, row in enumerate(self.rows):
            self.same(f"hidden state of row {r}", hidden[r, real[r]], self.want(row, self.start(self.rows, r))["hidden"])

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
        gradients = []
        for subject in (self.model, model):
            subject.train()
            try:
                subject.zero_grad()
                torch.manual_seed(0)
                out = subject(**batch, use_cache=False)
                out.logits[real].square().sum().backward()
            finally:
                subject.eval()
            gradients.append({n: p.grad.clone() for n, p in subject.depth.named_parameters() if p.grad is not None})
            subject.zero_grad(set_to_none=True)
        for n, g in gradients[0].items():
            self.same(f"checkpointed gradient of {n}", gradients[1][n], g, 1e-6)

    def _using(self, batch, real) -> None:
        """Another program for a while: nothing of it stays."""
        with dp.using(self.model, dp.LayerProgram([2, 0, 3])):
            text = str(self.model.depth_program)
            out = self.call(batch)
            for r, row in enumerate(self.rows):
                want = self.want(row, self.start(self.rows, r), text=text)
                self.same(f"logits of row {r} in between", out.logits[r, real[r]], want["logits"])
        self.compare(self.call(batch), self.rows, real)

    def _functional(self, batch, real) -> None:
        """Parameters given from outside; the model's own are others."""
        model = self.transformed()
        given = {n: p.detach().clone() for n, p in model.named_parameters()}
        with torch.no_grad():
            for p in model.depth.parameters():
                p.zero_()
            self.compare(torch.func.functional_call(model, given, (), {**batch, "use_cache": False}), self.rows, real)

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
