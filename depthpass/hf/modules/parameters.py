"""New parameters of a program as modules under ``depth.``."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import nn

from depthpass.errors import SpecError, UnsupportedModelError
from depthpass.hf.modules.placement import unwrapped
from depthpass.ir.holders import holder_of
from depthpass.ir.local_ops import initialise_linear
from depthpass.ir.ops import OPS
from depthpass.ir.program import Program
from depthpass.ir.structural_ops import TIME_WIDTH
from depthpass.ir.verify import infer, parameters
from depthpass.prompt import as_html, beginning


class DepthParameters(nn.Module):
    """Container of the new parameters; prints as the program they belong to."""

    def __init__(self, text: str = ""):
        super().__init__()
        self.text = text

    def __str__(self) -> str:
        return self.text or super().__repr__()

    def __repr__(self) -> str:
        return beginning(str(self))

    def _repr_html_(self) -> str:
        return as_html(repr(self))


class Weigh(nn.Module):
    """Times a learned vector ``[width]``."""

    def __init__(self, width: int, fill: float):
        super().__init__()
        self.weight = nn.Parameter(torch.full((width,), fill))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


class Balance(nn.Module):
    """Loss-free balancing: a bias per depth that is added to scores for the choice alone, and moved after each pass."""

    bias: torch.Tensor

    def __init__(self, width: int, like: torch.Tensor):
        super().__init__()
        # Small steps are lost in half precision.
        wide = torch.float64 if like.dtype == torch.float64 else torch.float32
        self.register_buffer("bias", torch.zeros(width, dtype=wide, device=like.device))

    @torch.no_grad()
    def load(self, score: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
        """How many tokens chose each place, ``[width]``.

        Args:
            score: with the bias, ``[batch, tokens, width]``.
            valid: real tokens, ``[batch, tokens]``; None = all.
        """
        chosen = nn.functional.one_hot(score.argmax(-1), len(self.bias)).to(self.bias.dtype)
        if valid is not None:
            chosen = chosen * valid[..., None]
        return chosen.sum((0, 1))

    @torch.no_grad()
    def move(self, load: torch.Tensor, rate: float) -> None:
        """One step towards the places that fewer tokens chose than the mean."""
        self.bias += rate * torch.sign(load.mean() - load)


class QueryGate(nn.Module):
    """A score per token and head from the rotated query: ``q_h . w_h + b_h`` (PLT, IQuest-Coder-Loop).

    Starts at zero, which mixes both sides of a gated visit in equal parts.
    """

    def __init__(self, heads: int, dim: int, like: torch.Tensor):
        super().__init__()
        self.weight = nn.Parameter(like.new_zeros(heads, dim))
        self.bias = nn.Parameter(like.new_zeros(heads))

    def forward(self, query: torch.Tensor) -> torch.Tensor:
        """``[batch, tokens, heads, dim]`` -> ``[batch, tokens, heads]``."""
        if query.shape[2:] != self.weight.shape:
            raise UnsupportedModelError(
                f"attention gate: expected queries of {tuple(self.weight.shape)} (heads, size) as the config says, got "
                f"{tuple(query.shape[2:])}. Use gate='hidden', or kv='own'."
            )
        return (query * self.weight).sum(-1) + self.bias


class HiddenGate(nn.Module):
    """A score per token and head from the block's input: ``W rmsnorm(x) + b`` (LoopCoder-V2). Starts at zero."""

    def __init__(self, heads: int, width: int, like: torch.Tensor, eps: float = 1e-6):
        super().__init__()
        self.norm = Weigh(width, 1.0).to(device=like.device, dtype=like.dtype)
        self.weight = nn.Parameter(like.new_zeros(heads, width))
        self.bias = nn.Parameter(like.new_zeros(heads))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[batch, tokens, width]`` -> ``[batch, tokens, heads]``."""
        normed = self.norm(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))
        return nn.functional.linear(normed, self.weight, self.bias)


class LowRank(nn.Module):
    """A low-rank update of one stock matrix, for one visit: ``B A``, zero at the start because B is.

    Args:
        weight: the stock matrix, whatever its layout (``[out, in]``, or ``[in, out]`` in GPT-2).
    """

    low_rank = True
    """How a visit knows it, in whatever it is wrapped."""

    def __init__(self, weight: torch.Tensor, rank: int, like: torch.Tensor):
        super().__init__()
        self.a = nn.Parameter(like.new_empty(rank, weight.shape[1]))
        self.b = nn.Parameter(like.new_zeros(weight.shape[0], rank))
        if not self.a.is_meta:
            nn.init.normal_(self.a, 0.0, 0.02)

    def forward(self) -> torch.Tensor:
        """The update, of the stock matrix's shape."""
        return self.b @ self.a


class TimeEncoder(nn.Module):
    """TE(t) = W silu(V [cos, sin](t) + b) + c: an iteration number as a vector ``[width]`` (TMLT, arXiv 2410.01405)."""

    def __init__(self, width: int, like: torch.Tensor):
        super().__init__()
        self.rise = nn.Linear(TIME_WIDTH, width, device=like.device, dtype=like.dtype)
        self.mix = nn.Linear(width, width, device=like.device, dtype=like.dtype)
        for linear in (self.rise, self.mix):
            initialise_linear(linear, 0.02)

    def forward(self, step: int) -> torch.Tensor:
        half = TIME_WIDTH // 2
        # In double precision: the phase of a high frequency loses digits as the step grows.
        phase = step * torch.exp(torch.arange(half, dtype=torch.float64) * (-math.log(10000.0) / half))
        wave = torch.cat((phase.cos(), phase.sin())).to(self.rise.weight)
        return self.mix(nn.functional.silu(self.rise(wave)))


class TimeFactors(nn.Module):
    """The four factors of a modulated visit, ``[4, width]``, from an encoded time. Starts at zero."""

    def __init__(self, width: int, like: torch.Tensor):
        super().__init__()
        self.weight = nn.Parameter(like.new_zeros(4 * width, width))
        self.bias = nn.Parameter(like.new_zeros(4 * width))

    def forward(self, time: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(nn.functional.silu(time), self.weight, self.bias).view(4, -1)


class Factors(nn.Module):
    """The four factors of a modulated visit, ``[4, width]``, as parameters. Starts at zero."""

    def __init__(self, width: int, like: torch.Tensor):
        super().__init__()
        self.weight = nn.Parameter(like.new_zeros(4, width))

    def forward(self) -> torch.Tensor:
        return self.weight


def check_scopes(program: Program) -> None:
    """Refuse scopes that cannot be the name of a module because every module has something of that name.

    Raises:
        SpecError: naming the scope.
    """
    names = {name for o in program for name in OPS[o.kind].scopes(o)}
    taken = DepthParameters()
    for name in sorted(names | set(parameters(program, infer(program)))):
        if word := next((w for w in name.split(".")[:-1] if hasattr(taken, w)), None):
            raise SpecError(f"scope {word!r}: expected a name for new parameters that no torch module uses itself, got one "
                            f"that they all have (nn.Module.{word}). Choose another scope, e.g. {word + '_1'!r}.")


def build(program: Program, like: torch.Tensor, model: nn.Module | None = None) -> DepthParameters:
    """Create the new parameters of a program.

    Args:
        like: a parameter of the stock model; the new ones get its dtype and device.
        model: the stock model; only programs with attention gates or per-visit LoRA need it, for its sizes.

    Raises:
        UnsupportedModelError: the config does not say how many heads a gate needs, or of what size; a block without
            linear maps for LoRA to update.
    """
    types = infer(program)
    declared = parameters(program, types)
    root = DepthParameters(str(program))
    for o in program.visits:
        if o["gate"] and not _has(root, o["gate"]):
            heads, dim = _heads(getattr(model, "config", None))
            gate = QueryGate(heads, dim, like) if o["gate_input"] == "query" else HiddenGate(heads, program.width, like)
            if o["gate_init"]:
                nn.init.constant_(gate.bias, o["gate_init"])
            _attach(root, o["gate"], gate)
        if o["lora"] and not _has(root, o["lora"]):
            for path, matrix in _matrices(model, o["index"]):
                _attach(root, f"{o['lora']}.{path}", LowRank(matrix.weight, o["lora_rank"], like))
        if o["modulate"] and not _has(root, o["modulate"]):
            kind = TimeFactors if o["clock"] else Factors
            _attach(root, o["modulate"], kind(program.width, like))
        if o["clock"] and not _has(root, o["clock"]):
            _attach(root, o["clock"], TimeEncoder(program.width, like))
    for o in program.ops:
        if o.kind == "route" and o["bias"] and not _has(root, o["bias"]):
            _attach(root, o["bias"], Balance(declared[f"{o['bias']}.bias"].shape[0], like))
        definition = OPS[o.kind]
        if definition.meaning is not None and (name := definition.scope(o)) and not _has(root, name):
            own = definition.parameters(o, [types[a].width for a in o.args], program.width)
            _attach(root, name, holder_of(definition, {p.leaf: p for p in own}, like))
    return root


def sizes(program: Program, model: nn.Module | None) -> dict[str, int]:
    """Elements of every new parameter of a program on a model, by name; nothing is allocated.

    Args:
        model: the stock model; None for programs without attention gates and per-visit LoRA.

    Raises:
        UnsupportedModelError: as :func:`build`.
    """
    dtype = None if model is None else next(model.parameters()).dtype
    new = build(program, torch.empty(0, dtype=dtype, device="meta"), model)
    return {name: p.numel() for name, p in new.named_parameters()}


def counted(new: nn.Module) -> int:
    """Elements of the new parameters that a transformed model has; what PEFT has put beside them is not theirs."""
    def beside(name: str) -> bool:
        return any(part == "original_module" or part.startswith("lora_") for part in name.split("."))

    return sum(p.numel() for name, p in new.named_parameters() if not beside(name))


def linear_maps(block: nn.Module) -> list[tuple[str, nn.Linear]]:
    """Linear maps of a block by path, under any PEFT wrapping."""
    # GPT-2's Conv1D is a linear map with its matrix transposed.
    return [
        (path.removesuffix(".base_layer"), cast(nn.Linear, m)) for path, m in block.named_modules()
        if (isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D") and "lora_" not in path
    ]


def _heads(config: Any) -> tuple[int, int]:
    """Number and size of the query heads of every block."""
    text: Any = None if config is None else config.get_text_config(decoder=True)
    heads = getattr(text, "num_attention_heads", None)
    if not isinstance(heads, int) or heads < 1:
        raise UnsupportedModelError(
            f"attention gates: expected a config with one number of attention heads, got {heads!r} in "
            f"{type(config).__name__}. Use kv='own' or kv='first', which have no gates."
        )
    dim = getattr(text, "head_dim", None)
    return heads, dim if isinstance(dim, int) else text.hidden_size // heads


def _matrices(model: nn.Module | None, index: int) -> list[tuple[str, nn.Linear]]:
    """The linear maps of a model's block."""
    from depthpass.capture.screen import block_list, find_layers

    matrices = [] if model is None else linear_maps(unwrapped(block_list(model, find_layers(model))[index]))
    if not matrices:
        raise UnsupportedModelError(
            f"per-visit LoRA: block {index} of {type(model).__name__} has no linear maps to update. Leave lora_rank out."
        )
    return matrices


def _has(root: nn.Module, name: str) -> bool:
    try:
        root.get_submodule(name)
    except AttributeError:
        return False
    return True


def _attach(root: nn.Module, name: str, module: nn.Module) -> None:
    *parents, leaf = name.split(".")
    for part in parents:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    if leaf in root._modules:
        raise UnsupportedModelError(f"new parameter {name!r} clashes with another one.")
    root.add_module(leaf, module)
