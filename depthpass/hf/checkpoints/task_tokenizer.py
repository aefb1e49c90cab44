"""The tokenizers of :mod:`depthpass.tasks`, built from parts of the ``tokenizers`` library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

SPECIAL = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "mask_token": "<mask>"}


def build(kind: str, words: Sequence[str], padding_side: str) -> Any:
    """A ``PreTrainedTokenizerFast`` over bytes, or over the given characters and words."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if kind == "byte":
        words = sorted(pre_tokenizers.ByteLevel.alphabet())
    elif kind == "symbol":
        # A word behind a space is a token of its own, so that decoding gives the spaces back.
        words = [form for w in words if w != " " for form in (w, f"▁{w}")] + ["▁"]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys([*SPECIAL.values(), *words]))}
    if kind == "symbol":
        # Without a prefix for continuations, WordPiece is the longest match from the left.
        tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>", continuing_subword_prefix="",
                                               max_input_chars_per_word=100_000))
        # Metaspace as a pre-tokenizer would take a space at the start for the one that it puts there.
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(" "), normalizers.Replace(" ", "▁")])
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"▁?\d+|▁?[A-Za-z]+|▁?[^\s▁\dA-Za-z]|\n|▁"), "isolated")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    else:
        tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token=None if kind == "byte" else "<unk>"))
        if kind == "byte":
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel() if kind == "byte" else decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side=padding_side, clean_up_tokenization_spaces=False,
                                   **SPECIAL)
