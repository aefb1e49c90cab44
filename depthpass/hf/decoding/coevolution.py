"""Coevolutionary diffusion: a continuous state is denoised beside the tokens (arXiv 2510.03206)."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, layer_norm

from depthpass.annotations import bound, checked
from depthpass.diffusion.inputs import check_noise, checked_ids, checked_prompts, maskable, places, predictions, settings
from depthpass.diffusion.noise import CoevolutionSettings, continuous, moved, weight_of
from depthpass.diffusion.orders import check_step, highest, scores
from depthpass.errors import InputError
from depthpass.hf.shown import Shown
from depthpass.passes.masked_diffusion import MaskedDiffusion
from depthpass.passes.taps import Taps

Encoder = Callable[[Tensor, Tensor | None], Tensor]
"""``(input_ids, attention_mask)`` -> contextual states ``[batch, tokens, latent]`` of clean text; no gradient is taken."""

SCOPE, FILE = "coevolution", "coevolution"


class CoevolutionaryDiffusion(Shown, nn.Module):
    """Tokens x and a continuous state z are noised apart and denoised together by one decoder.

        logits, z0 = f(embed(x_t) + W z_t + time(t))
        loss = g_d (1/t) CE(logits, x) on masked tokens + g_c w(t) |z0 - encoder(x)|^2

    The sum of embeddings is the paper's MDiT form; time enters with it (a stock decoder has no adaptive norms). ``W`` and
    the time map start at zero: the new model starts as the masked diffusion model. States are normalised per token.

    Args:
        model: a stock decoder, which stays untouched, or one transformed with ``MaskedDiffusion(carry=latent)`` and a tap
            of its last visit, as :meth:`from_pretrained` finds it.
        encoder: gives the clean states, e.g. a frozen embedding model.
        steps, mask_token: of :class:`depthpass.MaskedDiffusion`.
        options: fields of :class:`CoevolutionSettings`.

    Raises:
        SpecError, PassError, InputError: options that cannot be honoured.
    """

    encoder: Encoder

    @checked("CoevolutionaryDiffusion")
    def __init__(self, model: Any, encoder: Encoder, *, steps: int = 8, mask_token: int | None = None, **options: Any) -> None:
        super().__init__()
        bound("CoevolutionaryDiffusion", inspect.signature(CoevolutionSettings), (), options, InputError)
        self.settings = CoevolutionSettings(**options)
        if not hasattr(model, "depth_program"):
            if mask_token is None:
                raise InputError("CoevolutionaryDiffusion: expected mask_token, a token that no text has, got none.")
            model = _transformed(model, steps, mask_token, self.settings.latent)
        self.model, self.given = model, settings(model, "CoevolutionaryDiffusion")
        if self.given.carry != self.settings.latent or self.given.block is not None or self.given.shift:
            raise InputError(f"CoevolutionaryDiffusion: expected a model of MaskedDiffusion(carry={self.settings.latent}) that "
                             f"sees whole rows, got {self.given.label}.")
        self.tap = next(n for n in (o["name"] for o in model.depth_program.taps) if n.startswith(f"{SCOPE}."))
        like, width = next(model.parameters()), model.depth_program.width
        self.enter = nn.Linear(self.settings.latent, width, bias=False)
        self.time = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.leave = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, self.settings.latent))
        for p in (self.enter.weight, *self.time[2].parameters()):
            nn.init.zeros_(p)
        for new in (self.enter, self.time, self.leave):
            new.to(device=like.device, dtype=like.dtype)
        object.__setattr__(self, "encoder", encoder)  # not a part: it neither trains nor is saved
        self.train(model.training)  # sampling gives back one mode to all of it

    def card(self) -> str:
        """What it is, in a few lines."""
        return f"CoevolutionaryDiffusion\n  {'settings':<12}{self.settings}\nof {self.model!r}"

    def forward(self, ids: Tensor, state: Tensor, time: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One pass: logits ``[batch, tokens, vocabulary]`` and the clean state ``[batch, tokens, latent]``.

        Args:
            ids: x_t; state: z_t; time: t, ``[batch]``.
        """
        embedded = self.model.get_input_embeddings()(ids)
        x = embedded + self.enter(state.to(embedded)) + self.time(_sinusoid(time).to(embedded))[:, None]
        out = self.model(inputs_embeds=x, attention_mask=attention_mask, use_cache=False, **places(self.model, attention_mask))
        return predictions(out.logits, self.given), self.leave(out.taps[self.tap])

    def clean(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """States of clean text, normalised per token.

        Raises:
            InputError: the encoder gives another shape.
        """
        with torch.no_grad():
            states = self.encoder(ids, attention_mask)
        if tuple(states.shape) != (*ids.shape, self.settings.latent):
            raise InputError(f"encoder: expected states {(*ids.shape, self.settings.latent)}, got {tuple(states.shape)}.")
        return layer_norm(states, states.shape[-1:], eps=1e-6)

    @checked("loss")
    def loss(self, input_ids: Tensor, *, attention_mask: Tensor | None = None, labels: Tensor | None = None,
             time: Tensor | None = None, masked: Tensor | None = None, noise: Tensor | None = None, eps: float = 1e-3,
             generator: torch.Generator | None = None) -> Tensor:
        """Both losses, as means over the real tokens that may be masked; draws can be given instead, as ``time`` [batch],
        ``masked`` [batch, tokens], ``noise`` [batch, tokens, latent].

        Raises:
            InputError: nothing may be masked, times outside of (0, 1), or draws of another shape.
        """
        valid = checked_ids(input_ids, attention_mask, "loss")
        may = maskable(input_ids, valid, labels, self.given.mask_token, "loss")
        rows = {"generator": generator, "device": input_ids.device}
        if time is None:
            time = eps + (1 - 2 * eps) * torch.rand(len(input_ids), **rows)
        check_noise("loss", input_ids, self.settings.latent, time, masked, noise)
        masked = torch.rand(input_ids.shape, **rows) < time[:, None] if masked is None else masked.bool()
        masked, clean = masked & may, self.clean(input_ids, attention_mask)
        noise = torch.randn(clean.shape, dtype=clean.dtype, **rows) if noise is None else noise
        alpha, sigma = (x[:, None, None].to(clean) for x in continuous(time, self.settings.schedule))
        state = alpha * clean + sigma * noise
        if self.settings.drop:
            state = state * (torch.rand(len(input_ids), **rows) >= self.settings.drop)[:, None, None]
        logits, restored = self(input_ids.masked_fill(masked, self.given.mask_token), state, time, attention_mask)
        weight = (1 / time).clamp(*self.settings.clip) if self.settings.clip else 1 / time
        each = cross_entropy(logits[masked], input_ids[masked], reduction="none")
        tokens = (each * weight[:, None].expand_as(masked)[masked].to(each)).sum()
        error = (restored - clean.to(restored)).square().mean(-1) * weight_of(time, self.settings.weight)[:, None].to(restored)
        return (self.settings.disc_weight * tokens + self.settings.cont_weight * error[may].sum()) / may.sum()

    @checked("step")
    def step(self, ids: Tensor, state: Tensor, now: float, then: float, *, attention_mask: Tensor | None = None,
             fixed: Tensor | None = None, sampler: str = "ode", order: str = "ancestral", guidance: float = 1.0,
             temperature: float = 1.0, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """One denoising step from time ``now`` to ``then``: what :meth:`sample` repeats.

        Args:
            fixed: tokens that are given, bools ``[batch, tokens]``: their ids stay.
            sampler: of the state: see :func:`depthpass.diffusion.noise.moved`.
            order: of the tokens: see :class:`depthpass.MaskedDiffusion`.
            guidance: w: logits = w * logits with the state + (1 - w) * logits without it.
        """
        check_step(sampler, order, guidance, temperature)
        time = torch.full((len(ids),), now, device=ids.device)
        logits, clean = self(ids, state, time, attention_mask)
        if guidance != 1:
            without, _ = self(ids, torch.zeros_like(state), time, attention_mask)
            hidden = logits.isinf()
            logits = (guidance * logits + (1 - guidance) * without).masked_fill(hidden, float("-inf"))
        state = moved(state, clean.to(state), now, then, self.settings.schedule, sampler, generator)
        if temperature == 0:
            chosen = logits.argmax(-1)
        else:
            p = (logits / temperature).softmax(-1)
            chosen = torch.multinomial(p.flatten(0, 1), 1, generator=generator).view(ids.shape)
        todo = ids == self.given.mask_token
        todo = todo if fixed is None else todo & ~fixed
        share = (now - then) / now
        if order == "ancestral":
            write = todo & (torch.rand(ids.shape, generator=generator, device=ids.device) < share)
        else:
            count = torch.ceil(todo.sum(-1) * share - 1e-6).long()
            write = highest(scores(order, logits, chosen, generator), todo, count)
        return torch.where(write, chosen, ids), state

    @torch.no_grad()
    @checked("sample")
    def sample(self, input_ids: Tensor, attention_mask: Tensor | None = None, *, new_tokens: int, steps: int | None = None,
               **options: Any) -> tuple[Tensor, Tensor]:
        """Fill in masks behind prompts (padded on the left): ids ``[batch, prompt + new]`` and the final state.

        The states of the prompt are the encoder's, noised to each step's time; those of new tokens start from noise.

        Args:
            options: see :meth:`step`.
        """
        steps = self.given.steps if steps is None else steps
        valid = checked_prompts(input_ids, attention_mask, self.given.mask_token, "sample", new_tokens, steps)
        check_step(**options)
        rows, prompt = input_ids.shape
        known = self.clean(input_ids, attention_mask)
        draw = {"generator": options.get("generator"), "device": known.device, "dtype": known.dtype}
        ids = torch.cat((input_ids, input_ids.new_full((rows, new_tokens), self.given.mask_token)), 1)
        seen = None if valid is None else torch.cat((valid, valid.new_ones(rows, new_tokens)), 1)
        fixed = (torch.arange(ids.shape[1], device=ids.device) < prompt)[None].expand_as(ids)
        noise = torch.randn(rows, ids.shape[1], self.settings.latent, **draw)
        state, training = noise, self.training
        self.eval()
        try:
            for i in range(steps):
                now, then = 1 - i / steps, 1 - (i + 1) / steps
                alpha, sigma = (float(x) for x in continuous(torch.tensor(now), self.settings.schedule))
                state = torch.cat((alpha * known + sigma * noise[:, :prompt], state[:, prompt:]), 1)
                ids, state = self.step(ids, state, now, then, attention_mask=seen, fixed=fixed, **options)
        finally:
            self.train(training)
        return ids, state

    def save_pretrained(self, folder: str | Path) -> None:
        """The transformed model as usual, and what is new beside it; the encoder is not saved."""
        from safetensors.torch import save_file

        self.model.save_pretrained(folder)
        own = {k: v.contiguous() for k, v in self.state_dict().items() if not k.startswith("model.")}
        save_file(own, Path(folder) / f"{FILE}.safetensors")
        (Path(folder) / f"{FILE}.json").write_text(json.dumps(asdict(self.settings), indent=2))

    @classmethod
    def from_pretrained(cls, folder: str | Path, encoder: Encoder) -> CoevolutionaryDiffusion:
        """What :meth:`save_pretrained` wrote."""
        from safetensors.torch import load_file

        from depthpass.hf.checkpoints.pretrained import from_pretrained

        file = Path(folder) / f"{FILE}.json"
        if not file.exists():
            raise InputError(f"from_pretrained: expected a folder of CoevolutionaryDiffusion.save_pretrained, got {folder}.")
        options = json.loads(file.read_text())
        options["clip"] = None if options["clip"] is None else tuple(options["clip"])
        model = cls(from_pretrained(folder), encoder, **options)
        model.load_state_dict({**load_file(Path(folder) / f"{FILE}.safetensors"),
                              **{k: v for k, v in model.state_dict().items() if k.startswith("model.")}})
        return model


def _transformed(model: Any, steps: int, mask_token: int, latent: int) -> Any:
    from depthpass.hf.modules.context import context_of
    from depthpass.hf.transform import transform

    last = context_of(model).blocks - 1
    return transform(model, [MaskedDiffusion(steps=steps, mask_token=mask_token, unmask="ancestral", carry=latent),
                             Taps(at=(last,), scope=SCOPE)])


def _sinusoid(time: Tensor) -> Tensor:
    """``[batch]`` -> ``[batch, 256]``."""
    rates = torch.exp(-math.log(10_000) * torch.arange(128, device=time.device) / 128)
    angles = 1000 * time[:, None].to(torch.float32) * rates
    return torch.cat((angles.cos(), angles.sin()), -1)
