"""Shared by the tests of other libraries: a tokenizer made in memory, tiny transformed models, and what has moved."""

import pytest
import torch
from turbos import enliven, stock_of

import depthpass as dp

SPEC = dp.TurboConn(bridges=[(2, 0)], group=2, rank=4)
WORDS = 90


@pytest.fixture(scope="session")
def tokenizer():
    """Words ``w0 .. w89`` and four special tokens; nothing is read from anywhere."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    vocabulary = {w: i for i, w in enumerate(special + [f"w{i}" for i in range(WORDS)])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>", padding_side="left",
        chat_template="{% for m in messages %}{{ m['content'] }} {% endfor %}",
    )


@pytest.fixture
def turbo():
    """A transformed Llama with random bridges, and its parameters as they are."""
    model = dp.transform(stock_of("llama"), SPEC)
    enliven(model.depth, seed=1, least=1)
    return model


@pytest.fixture
def moved():
    """``moved(model, before)``: names of the new parameters that differ from ``before``."""
    def names(model, before):
        seen = dict(model.depth.named_parameters())
        assert seen.keys() == before.keys()
        return {n for n, p in seen.items() if not torch.equal(p.detach().cpu(), before[n])}

    return names


def weights(model):
    return {n: p.detach().clone() for n, p in model.depth.named_parameters()}


def words(*numbers):
    return " ".join(f"w{n}" for n in numbers)
