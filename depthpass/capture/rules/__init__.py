"""One rule per op family: where the tokens of an op's result are, or why they cannot be followed.

A rule gets a :class:`~depthpass.capture.rules.call.OpCall` and returns the :data:`~depthpass.capture.axes.Axes` of the
result (a tuple of them for several results); it raises :class:`~depthpass.capture.axes.AxisError` with the rest of a
sentence that starts with the op's name. :data:`RULES` is the table; ops tagged ``pointwise`` by torch need no entry.
"""

from __future__ import annotations

from depthpass.capture.rules.along import (
    along,
    batch_norm,
    cat,
    group_norm,
    last,
    pad,
    pieces,
    reduce,
    select,
    slice_,
    stack,
    unbind,
    unfold,
)
from depthpass.capture.rules.call import Rule
from depthpass.capture.rules.lookups import bucketize, embedding, gather, index, index_select, one_hot, put_back, scatter
from depthpass.capture.rules.products import add_product, convolution, einsum, linear, outer, own_attention, product
from depthpass.capture.rules.shapes import (
    as_complex,
    as_real,
    elementwise,
    expand,
    keep,
    movedim,
    permute,
    repeat,
    repeat_interleave,
    reshape,
    reverse,
    squeeze,
    transpose,
    view,
)
from depthpass.capture.rules.sources import arange, attend, create, experts

_pool = {n: last("pools over", lambda _, k=n: k) for n in (1, 2)}

_TABLE: dict[str, Rule] = {
    # Casts, copies and tensors shaped like another.
    "to type_as _to_copy contiguous alias detach clone lift_fresh lift_fresh_copy dropout alpha_dropout bernoulli real "
    "imag conj resolve_conj resolve_neg zero zeros_like ones_like full_like empty_like rand_like randn_like": keep,
    # Elementwise ops that torch does not tag, or did not in 2.11.
    "where masked_fill multiply subtract divide true_divide floor_divide rsub complex polar fill copy log_sigmoid "
    "special_expit ldexp native_dropout leaky_relu": elementwise,
    # Same entries in the same order.
    "reshape _unsafe_view view_as reshape_as flatten unflatten unsqueeze ravel": reshape,
    "squeeze": squeeze,
    "view": view,
    "transpose swapaxes swapdims t mT matrix_H adjoint": transpose,
    "permute": permute,
    "movedim moveaxis": movedim,
    "numpy_T": reverse,
    "view_as_complex": as_complex,
    "view_as_real": as_real,
    # Copies along an axis.
    "expand expand_as broadcast_to": expand,
    "repeat tile": repeat,
    "repeat_interleave": repeat_interleave,
    # One dimension that must not run over tokens.
    "sum mean prod amax amin max min any all std var std_mean var_mean logsumexp norm linalg_vector_norm argmax argmin "
    "nansum nanmean count_nonzero median aminmax": reduce,
    "softmax _softmax log_softmax _log_softmax _safe_softmax": along("takes a softmax over"),
    "cumsum cumprod cummax cummin logcumsumexp": along("accumulates along"),
    "sort argsort topk kthvalue msort": along("ranks"),
    "flip fliplr flipud": along("reverses"),
    "roll": along("rotates"),
    "fft_fft fft_ifft fft_rfft fft_irfft fft_hfft fft_ihfft": along("transforms"),
    "diff": along("takes differences along"),
    "glu": along("splits"),
    "split split_with_sizes chunk tensor_split unsafe_split unsafe_chunk unsafe_split_with_sizes": pieces,
    "unbind": unbind,
    "select": select,
    "slice narrow": slice_,
    "pad constant_pad_nd": pad,
    "unfold": unfold,
    "cat concat concatenate": cat,
    "stack": stack,
    "tril triu": last("takes a triangle of", lambda _: 2),
    "layer_norm rms_norm": last("normalises over", lambda call: len(call.args["normalized_shape"])),
    "group_norm": group_norm,
    "batch_norm": batch_norm,
    "avg_pool1d max_pool1d adaptive_avg_pool1d adaptive_max_pool1d": _pool[1],
    "avg_pool2d max_pool2d adaptive_avg_pool2d": _pool[2],
    # Look-ups.
    "embedding": embedding,
    "index_select": index_select,
    "index": index,
    "gather": gather,
    "scatter scatter_add scatter_reduce": scatter,
    "slice_scatter select_scatter": put_back,
    "one_hot": one_hot,
    "bucketize searchsorted": bucketize,
    # Products.
    "linear": linear,
    "matmul mm bmm mv dot vdot": product,
    "addmm baddbmm addmv": add_product,
    "outer ger": outer,
    "einsum": einsum,
    "conv1d conv2d conv3d convolution": convolution,
    "scaled_dot_product_attention": own_attention,
    # New tensors.
    "zeros ones full empty rand randn randint new_zeros new_ones new_full new_empty scalar_tensor": create,
    "arange": arange,
}

RULES: dict[str, Rule] = {f"aten::{name}": rule for names, rule in _TABLE.items() for name in names.split()} | {
    "depthpass::attend": attend, "depthpass::experts": experts, "depthpass::mask": keep,
    "depthpass::enter": keep, "depthpass::leave": keep, "depthpass::final": keep,
    "depthpass::function_in": keep, "depthpass::function_out": keep,
}

SIZE_ARGUMENTS = frozenset({"size", "shape", "sizes", "end", "length", "repeats", "split_size", "split_sizes"})
"""Arguments through which an op may be told the number of tokens; as any other argument it would be used as a value."""
