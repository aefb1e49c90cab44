"""Which blocks draw random numbers, and drawing the same ones twice."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states

from depthpass_lowering.host import Host

_DROPOUTS = (torch.ops.aten.dropout.default, torch.ops.aten.native_dropout.default)


def draws(host: Host, index: int) -> bool:
    """Whether a block has dropout switched on, so that no two runs of it are the same."""
    if any(s.dropout for s in host.sites_of(index)):
        return True
    graph = host.bound(index)[0].graph.graph
    if any(n.target in _DROPOUTS and n.args[1] and n.args[2] for n in graph.nodes):
        return True
    inner = (host.stock_module(index, path) for path in host.submodules_of(index))
    return any(isinstance(m, nn.Dropout) and m.p and m.training for part in inner for m in part.modules())


@dataclass(frozen=True)
class RandomState:
    """The generators' states before something was run."""

    cpu: Tensor
    devices: Sequence[int]
    states: Sequence[Tensor]

    @classmethod
    def now(cls, tensors: Sequence[Tensor]) -> RandomState:
        """The states of the CPU and of the tensors' devices."""
        return cls(torch.get_rng_state(), *get_device_states(*tensors))

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Draw from these states, and leave the generators as they were."""
        with torch.random.fork_rng(list(self.devices)):
            torch.set_rng_state(self.cpu)
            set_device_states(self.devices, self.states)
            yield
