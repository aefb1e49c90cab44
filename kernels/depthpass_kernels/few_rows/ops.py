"""The ops of a decoded token on a CPU, for graphs: they trust their arguments, and have no gradient.

One Python call above the compiled code, without the checks of ``torch.library.custom_op``, which cost as much as the work.
"""

from __future__ import annotations

import torch
from torch import Tensor

from depthpass_kernels.few_rows.build import load

_LIBRARY = torch.library.Library("depthpass_kernels", "FRAGMENT")
_LIBRARY.define("few_rows_product(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_LIBRARY.define("few_queries_attention(Tensor q, Tensor k, Tensor v, Tensor seen, float scale) -> Tensor")


def _run(name: str, dtype: torch.dtype, *arguments) -> None:
    built = load(name, dtype)
    if isinstance(built, Exception):
        raise RuntimeError(f"the compiled {name} of few rows is not to be had on this machine") from built
    built(*arguments, torch.get_num_threads())


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    x, (out, inner) = x.contiguous(), weight.shape
    y = x.new_empty(*x.shape[:-1], out)
    _run("product", x.dtype, weight, x, x if bias is None else bias, y, x.numel() // inner, out, inner, bias is not None)
    return y


def _attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> Tensor:
    q, k, v, seen = q.contiguous(), k.contiguous(), v.contiguous(), seen.contiguous()
    batch, heads, queries, dim = q.shape
    y = q.new_empty(batch, heads, queries, v.shape[-1])
    _run("attention", q.dtype, q, k, v, seen, y, batch, heads, queries, k.shape[2], dim, v.shape[-1], seen.shape[0], scale)
    return y


_LIBRARY.impl("few_rows_product", _product, "CPU")
_LIBRARY.impl("few_queries_attention", _attention, "CPU")


@torch.library.register_fake("depthpass_kernels::few_rows_product", lib=_LIBRARY)
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.register_fake("depthpass_kernels::few_queries_attention", lib=_LIBRARY)
def _(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> Tensor:
    return q.new_empty(*q.shape[:-1], v.shape[-1])


few_rows_op = torch.ops.depthpass_kernels.few_rows_product.default
few_queries_op = torch.ops.depthpass_kernels.few_queries_attention.default
