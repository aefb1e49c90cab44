"""The host of a transformed model: program ops on its stock modules, captured graphs and new parameters."""

from __future__ import annotations

import functools
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from depthpass.capture import Block, Capture, Part, Site, Template, calls
from depthpass.capture.attention import attention_style
from depthpass.capture.direct import direct
from depthpass.capture.screen import block_list
from depthpass.capture.structure import shallow_copy
from depthpass.errors import LoweringError, UnsupportedModelError
from depthpass.hf.calls.doors import DISABLED
from depthpass.hf.calls.head import apply_head, logits_of
from depthpass.hf.calls.live import Live, with_tables
from depthpass.hf.calls.prefixes import running
from depthpass.hf.modules.context import in_force
from depthpass.hf.modules.placement import home, keep_streams_home, resident
from depthpass.hf.modules.watch import Binding

if TYPE_CHECKING:
    from depthpass_lowering.executors.losses import Pool

    from depthpass.hf.model import DepthModel


class BlockCall:
    """What a block is called with besides the hidden stream: see :func:`block_forward`."""

    __slots__ = ("block", "host", "side_inputs", "visit")

    def __init__(self, block: Block, visit, side_inputs: Sequence[Tensor], host: StockHost):
        self.block, self.visit, self.side_inputs, self.host = block, visit, side_inputs, host

    @torch.compiler.disable(reason=DISABLED)
    def run(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        host = self.host
        if not host.dispatched:
            return self._run(layer, hidden)
        live = self.visit.index in host.hooked.inside
        with resident(m for m in layer.modules() if m is not layer and not live):
            return self._run(layer, hidden)

    def to(self, device, *args, **kwargs) -> BlockCall:
        """The same call on another device, as accelerate moves what a module is called with."""
        return BlockCall(self.block, self.visit, [s.to(device, *args, **kwargs) for s in self.side_inputs], self.host)

    def _run(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        host, visit = self.host, self.visit
        bound = host.tensors(self.block, layer)
        params = visit.adapt(self.block.template.params, bound)
        if visit.index in host.hooked.own:
            host.counts[visit.index] += 1
        if visit.index in host.hooked.inside:
            assert host.live is not None, "hooks inside a block run live"
            return host.live.block(layer, visit, params, bound, hidden)
        return visit.run(self.block.template, hidden, self.side_inputs, params, host.runner)


# FSDP2 casts what a unit is called with to the unit's dtype.
pytree.register_pytree_node(
    BlockCall, lambda call: (list(call.side_inputs), (call.block, call.visit, call.host)),
    lambda side_inputs, rest: BlockCall(rest[0], rest[1], list(side_inputs), rest[2]),
)


def block_forward(layer: nn.Module, hidden: Tensor, *args, depth_call: BlockCall | None = None, **kwargs):
    """Forward of a block of a transformed model: its captured graph when it runs as a visit, stock code otherwise.

    Args:
        depth_call: a keyword, since hooks hand on other positional arguments and other gradients of them.
    """
    if depth_call is None:
        return type(layer).forward(layer, hidden, *args, **kwargs)
    run = functools.partial(depth_call.run, layer)
    checkpointing = getattr(layer, "gradient_checkpointing", False) and layer.training and torch.is_grad_enabled()
    # Older transformers checkpoint in the layer's own __call__, around this function.
    if checkpointing and type(layer).__call__ is nn.Module.__call__:
        checkpoint: Any = layer._gradient_checkpointing_func
        return checkpoint(run, hidden)
    return run(hidden)


class StockHost:
    """Runs program ops on the modules of a transformed model (see :class:`depthpass_lowering.host.Host`).

    Attributes:
        runner: gives the callable to run a captured graph with.
        live: what runs as modules in this call; None = nothing.
        counts: calls of each block with hooks.
        pool: where the runs of one call add up their losses; None = of its own.
        prefix: what this call shares with others that begin with the same visits (a search); None = nothing.
    """

    adapts = True

    def __init__(self, model: DepthModel, captured: Capture, side_inputs: Sequence[Tensor], pool: Pool | None = None):
        from depthpass_lowering.executors.losses import Pool

        self.model, self.captured = model, captured
        self.decoder = model.get_submodule(model._depth.decoder)
        self.layers = block_list(model, model._depth.layers)
        self.extras = side_inputs
        self.style = attention_style(model)
        self.training = model.training
        self.depth: nn.Module | None = None
        self.submodules = model._depth.watches[-1].submodules
        self.hooked = with_tables(model._depth.watches[-1].live, self.decoder, captured, len(self.layers))
        self.live: Live | None = None
        self.counts: Counter[int] = Counter()
        self.ratios: Mapping[str, float] = model._depth.ratios
        self.prefix = running(model)
        self.pool = Pool() if pool is None else pool
        self.runner = _runner(model._depth.lowering)
        self.dispatched = model._depth.watches[-1].dispatched
        if self.dispatched:
            self.home = home(model)
            keep_streams_home(self.layers, depth_module(model))

    def tensors(self, owner: Block | Part, module: nn.Module) -> list[Tensor]:
        """The live tensors that a block or part reads, in the order of its graph's inputs."""
        return [read() for read in self.readers(owner, module)]

    def readers(self, owner: Block | Part, module: nn.Module) -> list[Callable[[], Tensor]]:
        """What reads the live tensors of a block or part."""
        bindings = self.model._depth.bindings
        readers = bindings.get(id(owner))
        if readers is None:
            names = owner.params if isinstance(owner, Part) else owner.template.params
            readers = bindings[id(owner)] = [
                functools.partial(owner.constants.__getitem__, p) if p in owner.constants else
                Binding(self.decoder, p[1:]) if p.startswith("/") else Binding(module, p)
                for p in names
            ]
        return readers

    def part(self, part: Part, inputs: dict[str, Tensor], *streams: Tensor, visit=None):
        extras = [self.extras[e] for e in part.extras]
        # Embedding and tables are one small op each: not worth compiling.
        runner = self.runner if part is self.captured.norm or part is self.captured.head else direct
        given = (*streams, *extras, *(inputs[i] for i in part.inputs))
        if not self.dispatched:
            return runner(part.graph)(visit, *given, *self.tensors(part, self.decoder))
        names = (name.lstrip("/").rpartition(".")[0] for name in part.params if name not in part.constants)
        owners = set(map(self.decoder.get_submodule, names))
        with resident(owners):
            params = [p.to(self.home) for p in self.tensors(part, self.decoder)]
            return runner(part.graph)(visit, *(x.to(self.home) for x in given), *params)

    def block(self, index: int, visit, hidden: Tensor, side_inputs: Sequence[Tensor]) -> Tensor:
        call = BlockCall(self.captured.blocks[index], visit, side_inputs, self)
        if self.prefix is None:
            return self.layers[index](hidden, depth_call=call)
        return self.prefix.visit(visit, hidden, lambda: self.layers[index](hidden, depth_call=call))

    def side_inputs_of(self, index: int) -> tuple[int, ...]:
        return self.captured.blocks[index].side_inputs

    def sites_of(self, index: int) -> tuple[Site, ...]:
        return self.captured.blocks[index].template.sites

    def norm(self, hidden: Tensor) -> Tensor:
        if self.live is not None and self.live.norms:
            return self.live.norm(hidden)
        return self.part(self.captured.norm, {}, hidden)

    def logits(self, normed: Tensor) -> Tensor:
        logits = logits_of(apply_head(self.model, self.captured, normed), "the op 'logits'", "an exit criterion of the state")
        if logits.shape[:2] != normed.shape[:2] or logits.dim() != 3:
            raise UnsupportedModelError(
                f"the op 'logits': expected the head to give logits of every token, got shape {tuple(logits.shape)} for "
                f"{tuple(normed.shape[:2])} tokens. Use an exit criterion of the state."
            )
        return logits

    def module(self, name: str) -> nn.Module:
        depth = self.depth
        if depth is None:
            depth = self.depth = depth_module(self.model)
        module = self.submodules.get((id(depth), name))
        if module is None:
            module = self.submodules[id(depth), name] = depth.get_submodule(name)
        return module

    def submodule(self, index: int, path: str, *args: Tensor) -> Tensor:
        return self.stock_module(index, path)(*args)

    def stock_module(self, index: int, path: str) -> nn.Module:
        return self.layers[index].get_submodule(path)

    def bound(self, index: int) -> tuple[Template, list[Tensor]]:
        block = self.captured.blocks[index]
        return block.template, self.tensors(block, self.layers[index])

    def submodules_of(self, index: int) -> tuple[str, ...]:
        graph = self.captured.blocks[index].template.graph.graph
        return tuple(n.args[1] for n in graph.nodes if n.target is calls.submodule)

    def refuses_schedule(self, index: int) -> str | None:
        layer = self.layers[index]
        if self.dispatched:
            return "accelerate moves weights between devices (device_map, offload), which needs module calls"
        if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
            return f"block {index} has hooks (FSDP, accelerate or your own), which need module calls"
        if getattr(layer.__dict__.get("forward"), "func", None) is not block_forward:
            return f"block {index} has something around its forward, which needs module calls"
        if index in self.hooked.inside:
            return f"block {index} has hooks on modules inside it, which need module calls"
        return "new modules have hooks, which need module calls" if self.hooked.parameters else None

    def recomputes(self, index: int) -> bool:
        layer = self.layers[index]
        return bool(getattr(layer, "gradient_checkpointing", False)) and layer.training

    def attention(self, index: int, site: Site, q, k, v, mask, causal: bool, sinks) -> Tensor:
        from depthpass_lowering.visits.attention import additive, sdpa_attention

        if mask is not None and mask.device != q.device:  # the block is on another device than the streams
            mask = mask.to(q.device)
        if self.style == "sdpa":
            if site.softcap is not None or sinks is not None:
                raise LoweringError("sdpa attention has no softcap and no sinks; load the model with "
                                    "attn_implementation='eager'.")
            return sdpa_attention(q, k, v, mask, causal, site.scale, site.dropout)
        module = self.layers[index].get_submodule(site.path)
        stock = sys.modules[type(module).__module__].eager_attention_forward
        bias = additive(mask, causal, q.shape[2], q.dtype, q.device)
        extra = {} if site.softcap is None else {"softcap": site.softcap}
        if sinks is not None:
            # gpt_oss passes its sinks and then reads them from the module all the same: let it read what was passed.
            extra["s_aux"] = sinks
            module = shallow_copy(module)
            module._parameters = {**module._parameters, "sinks": sinks}
        return stock(module, q, k, v, bias, scaling=site.scale, dropout=site.dropout, **extra)[0]


@functools.cache
def compiled_stock(stock: type, device: str) -> Callable:
    """The stock forward with what stands around the decoder compiled: once for all sizes.

    On a GPU torch's own policy, the first size for itself: a loss of unknown sizes takes two passes more over the vocabulary.
    """
    # Capped logits are handed out and saved under another shape; torch (2.11 to 2.13) takes that view for memory of the backward
    # pass alone, which then writes gradients into the logits. Inductor's caches know of this option, not of donated buffers.
    compiled = torch.compile(stock.forward, dynamic=None if device == "cuda" else True, options={"inplace_buffers": False})

    @functools.wraps(stock.forward)
    def forward(*args, **kwargs):
        with warnings.catch_warnings():
            # Dynamo looks at the gradient of the decoder's output, which has none.
            warnings.filterwarnings("ignore", message=r"The \.grad attribute of a Tensor that is not a leaf")
            return compiled(*args, **kwargs)

    return forward


def _runner(lowering: str) -> Callable[[fx.GraphModule], Callable]:
    """What runs the blocks outside of token loops, norm and head: their graphs, or what a compiled level makes of them."""
    if lowering not in ("inductor", "cudagraph"):
        return direct
    from depthpass_lowering.executors.compiled import compiled_whole
    from depthpass_lowering.executors.transforms import check_compilable

    check_compilable(lowering)
    return compiled_whole


def depth_module(model: Any) -> Any:
    """The new parameters that run."""
    return in_force(model.depth)
