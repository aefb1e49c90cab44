"""Recognition of mask predicates: causal, window and chunk exactly; everything else is refused by name."""

from __future__ import annotations

import pytest
import torch
from capture.dense_run import captured
from transformers import masking_utils as mu

from depthpass.capture.attention import capture_attention, capture_mask, recognise_mask
from depthpass.errors import UnsupportedModelError

CAUSAL = mu.causal_mask_function


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 512, 4096])
def test_windows_and_chunks(size):
    window = mu.sliding_window_causal_mask_function(size)
    chunk = mu.chunked_causal_mask_function(size, torch.tensor([2, 0]))
    assert recognise_mask(window, size) == (size, None)
    # A window and chunks of one token are the same mask.
    assert recognise_mask(chunk, size) == ((1, None) if size == 1 else (None, size))


def test_causal():
    assert recognise_mask(CAUSAL, None) == (None, None)
    assert recognise_mask(CAUSAL, 4) == (None, None), "the announced size is not what decides"
    assert recognise_mask(mu.and_masks(CAUSAL, CAUSAL), None) == (None, None)


def test_gemma3_and_llama4_have_both_kinds_of_layer():
    kinds = {s.window for b in captured("gemma3_text").blocks for s in b.template.sites}
    assert kinds == {4, None}
    kinds = {s.chunk for b in captured("llama4_text").blocks for s in b.template.sites}
    assert kinds == {4, None}


def prefix(lengths):
    return mu.or_masks(CAUSAL, lambda b, h, q, k: k < lengths[b])


def fixed_prefix(n):
    return mu.or_masks(CAUSAL, lambda b, h, q, k: k < n)


def far_cut(b, h, q, k):
    return (k <= q) & (q - k < 5000)


def by_head(b, h, q, k):
    return (k <= q) & ((h % 2 == 0) | (q - k < 3))


def by_row(b, h, q, k):
    return (k <= q) & ((b == 0) | (k > 0))


def strict(b, h, q, k):
    return k < q


class Predicate:
    def __call__(self, b, h, q, k):
        return k <= q


def packed(function):
    return mu.and_masks(mu.packed_sequence_mask_function(torch.tensor([[0, 0, 0, 1, 1]])), function)


REFUSED = {
    "bidirectional": (mu.bidirectional_mask_function, None, "bidirectional_mask_function lets tokens see later tokens"),
    "bidirectional window": (mu.sliding_window_bidirectional_mask_function(4), 4, "lets tokens see later tokens"),
    "fixed prefix": (fixed_prefix(3), None, "lets tokens see later tokens"),
    # With zeros in its place this one would look causal.
    "prefix per row": (prefix(torch.tensor([3, 2])), None, r"depends on a tensor of shape \(2,\)"),
    "packed": (packed(CAUSAL), None, "packed sequences from position_ids"),
    "packed window": (
        packed(mu.sliding_window_causal_mask_function(4)), 4, "packed sequences from position_ids"
    ),
    "image blocks": (
        mu.or_masks(CAUSAL, mu.blockwise_overlay(torch.zeros(2, 9, dtype=torch.long))), None, "image blocks"
    ),
    "a cut far away": (far_cut, None, "hides earlier tokens"),
    "heads of several kinds": (by_head, None, "hides earlier tokens"),
    "rows of several kinds": (by_row, None, "hides earlier tokens"),
    "strictly earlier": (strict, None, "hides earlier tokens"),
    "another window than announced": (mu.sliding_window_causal_mask_function(3), 4, "sliding window or chunks of 4"),
    "an object": (Predicate(), None, "depends on a Predicate"),
    "no window": (mu.sliding_window_causal_mask_function(0), 0, "window or chunk of 0 tokens"),
    "broken": (lambda b, h, q, k: q[99999], None, "cannot be evaluated on indices alone"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_other_masks_are_refused_by_name(what):
    function, size, reason = REFUSED[what]
    with pytest.raises(UnsupportedModelError, match=reason):
        recognise_mask(function, size)


def test_offsets_and_missing_masks_are_refused():
    with pytest.raises(UnsupportedModelError, match="q_offset"):
        capture_mask(mask_function=CAUSAL, attention_mask=torch.ones(2, 3), q_offset=2)
    # Decoders of encoder-decoders make a mask that nobody reads; the layer that reads one is refused.
    missing = capture_mask(mask_function=CAUSAL, attention_mask=None)
    with pytest.raises(UnsupportedModelError, match=r"2-D attention_mask .* got none"):
        capture_attention(torch.nn.Identity(), *torch.ones(3, 1, 2, 3, 4), missing)
