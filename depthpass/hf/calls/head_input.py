"""What a compiled token hands to the stock head: its product with the vocabulary is then as fast as the token's own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class HeadInput(Tensor):
    """The last hidden state of a decoded token, for the outer class that called the decoder.

    Stock code cuts tokens out of it and multiplies it with its head. A product with a large half-precision weight on a CPU is
    then a compiled one; every other function sees and returns plain tensors.
    """

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        given: dict[str, Any] = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func is Tensor.__getitem__ and not given:
                return plain(args[0])[args[1]].as_subclass(cls)
            args, given = tuple(map(plain, args)), {n: plain(v) for n, v in given.items()}
            if func is F.linear and (product := _product(*args, **given)) is not None:
                return product
            return func(*args, **given)


def taken(model: nn.Module, decoder: nn.Module) -> bool:
    """Whether nothing but stock code sees what the decoder hands to the head: no hook, no head or forward of others."""
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    return type(head) is nn.Linear and not any(
        m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in (head, decoder)
    )


def plain(value: Any) -> Any:
    """A value, or the plain tensor of a :class:`HeadInput`, also inside lists and tuples."""
    if isinstance(value, list | tuple):
        return type(value)(map(plain, value)) if type(value) in (list, tuple) else value
    return value.as_subclass(Tensor) if type(value) is HeadInput else value


def bare(output: Any) -> Any:
    """The outputs of an outer class, which may hand out what its decoder gave it."""
    if isinstance(output, tuple):
        return plain(output)
    for name, value in output.items():
        if type(value) is HeadInput:
            output[name] = plain(value)
    return output


def _product(input: Tensor, weight: Any, bias: Any = None) -> Tensor | None:
    from depthpass_lowering.products.rows import product

    return product(input, weight, bias) if isinstance(weight, Tensor) else None
