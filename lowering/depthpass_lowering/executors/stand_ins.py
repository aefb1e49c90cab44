"""Stand-ins for the parameters of a region: hosts and modules that read other tensors, the models themselves untouched."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from depthpass.capture.structure import shallow_copy
from depthpass.ir.ops import OPS
from depthpass.ir.program import Op
from depthpass.lowered.program import LoweredRegion
from depthpass_lowering.fx_passes.region import Parameter
from depthpass_lowering.host import Host
from depthpass_lowering.products.sink import Sink, sunk_linear


class LeafHost:
    """Runs blocks and new modules on stand-ins for their parameters; everything else as the host does.

    Args:
        leaf: the stand-in for a tensor; the tensor itself where it has none.
        sink: where products leave their weight gradients; None = to autograd.
    """

    def __init__(self, host, leaf: Callable[[Tensor], Tensor], sink: Sink | None = None):
        self.host, self.leaf, self.sink = host, leaf, sink
        self.modules: dict[str, nn.Module] = {}

    def block(self, index: int, visit, hidden: Tensor, side_inputs: Sequence[Tensor]) -> Tensor:
        template, params = self.host.bound(index)
        return visit.run(template, hidden, side_inputs, visit.adapt(template.params, [self.leaf(p) for p in params]))

    def module(self, name: str) -> nn.Module:
        if name not in self.modules:
            self.modules[name] = stand_in(self.host.module(name), self.leaf, self.sink)
        return self.modules[name]

    def submodule(self, index: int, path: str, *args: Tensor) -> Tensor:
        key = f"{index}/{path}"
        if key not in self.modules:
            self.modules[key] = stand_in(self.host.stock_module(index, path), self.leaf, self.sink)
        return self.modules[key](*args)

    def __getattr__(self, name: str):
        return getattr(self.host, name)


class SunkHost(LeafHost):
    """A host whose parameters are stand-ins and whose products sink their weight gradients."""

    def __init__(self, host, sink: Sink, leaves: dict[int, Tensor]):
        super().__init__(host, lambda t: leaves.get(id(t), t), sink)
        self.leaves = leaves

    def parameter(self, p: Parameter) -> Tensor:
        """The stand-in for a parameter of a chunk's graph."""
        if isinstance(p.owner, int):
            return self.leaf(self.host.bound(p.owner)[1][p.at])
        return self.leaf(getattr(self.host.module(p.owner), str(p.at)))


def stand_in(module: nn.Module, leaf, sink: Sink | None = None) -> nn.Module:
    """A shallow copy of a module tree that reads other parameters; the module itself is not touched."""
    if sink is not None and type(module) is nn.Linear and not module._forward_hooks and not module._forward_pre_hooks:
        return _LinearStandIn(leaf(module.weight), None if module.bias is None else leaf(module.bias), sink)
    twin = shallow_copy(module)
    twin._parameters = {k: None if p is None else leaf(p) for k, p in module._parameters.items()}
    twin._modules = {k: None if m is None else stand_in(m, leaf, sink) for k, m in module._modules.items()}
    return twin


class _LinearStandIn(nn.Module):
    """A linear map on given tensors, its weight gradient sunk."""

    def __init__(self, weight: Tensor, bias: Tensor | None, sink: Sink):
        super().__init__()
        # Under their usual names: a wrapper such as LoRA looks at the weight of the layer it wraps.
        self.weight, self.bias = weight, bias
        self.sink = sink

    def forward(self, x: Tensor) -> Tensor:
        return sunk_linear(self.sink, x, self.weight, self.bias)


def region_parameters(region: LoweredRegion, host: Host) -> dict[int, Tensor]:
    """Every tensor with a gradient that the region's blocks and new modules read, once each, by id."""
    parameters: dict[int, Tensor] = {}
    for o in region.program_ops:
        tensors: list[Tensor] = []
        if o.kind in ("block", "ffn"):
            tensors += host.bound(o["index"])[1]
            for path in host.submodules_of(o["index"]):
                tensors += host.stock_module(o["index"], path).parameters()
        for name in OPS[o.kind].scopes(o):
            tensors += host.module(name).parameters()
        parameters |= {id(t): t for t in tensors if t.requires_grad}
    return parameters


def own_scopes(o: Op) -> tuple[str, ...]:
    """The module of a token-local op's own parameters, if it has one."""
    return OPS[o.kind].scopes(o) if OPS[o.kind].meaning is not None else ()
