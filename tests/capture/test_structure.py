"""Structural copies: the classes, attributes and tensors of a tree, none of its hooks, and no tie to the old one."""

import functools
import threading

import pytest
import torch
import zoo
from torch import nn

import depthpass as dp
from depthpass.capture.structure import structural_copy
from depthpass.errors import UnsupportedModelError


def tree():
    model = zoo.model("llama", 2)
    first, second = (layer.mlp for layer in model.model.layers)
    forward = first.forward
    first.forward = functools.wraps(forward)(lambda h: forward(h) + 1)
    second.forward = functools.partial(lambda f, h: f(h) * 2, second.forward)
    model.model.layers[0].register_forward_hook(lambda *a: None)
    model.table = {"mlp": [first, (second, model.config)]}
    return model


def test_it_shares_tensors_and_nothing_else():
    model = tree()
    copied = structural_copy(model)
    assert [type(m) for m in copied.modules()] == [type(m) for m in model.modules()]
    assert not {id(m) for m in copied.modules()} & {id(m) for m in model.modules()}
    assert all(p is q for p, q in zip(copied.parameters(), model.parameters(), strict=True))
    assert copied.model.config is copied.config is not model.config and copied.config.to_dict() == model.config.to_dict()
    assert not copied.model.layers[0]._forward_hooks and model.model.layers[0]._forward_hooks
    assert copied.table["mlp"][0] is copied.model.layers[0].mlp
    assert copied.table["mlp"][1] == (copied.model.layers[1].mlp, copied.config)


def test_functions_of_the_old_tree_belong_to_the_new_one():
    model = tree()
    copied = structural_copy(model)
    with torch.no_grad():
        ids = torch.arange(3, 9)[None]
        wanted = model(input_ids=ids).logits
        assert torch.equal(copied(input_ids=ids).logits, wanted)
        for mlp in (layer.mlp for layer in model.model.layers):
            mlp.down_proj = nn.Linear(48, 32, bias=False)
        assert torch.equal(copied(input_ids=ids).logits, wanted)


def test_stand_ins_have_the_shape_and_no_values_of_their_own():
    model = zoo.model("llama", 2, tie_word_embeddings=True)
    with torch.inference_mode():
        model.lm_head.weight = model.model.embed_tokens.weight = nn.Parameter(model.lm_head.weight.clone())
    copied = structural_copy(model)
    stand_in = copied.lm_head.weight
    assert stand_in is copied.model.embed_tokens.weight and isinstance(stand_in, nn.Parameter) and not stand_in.is_inference()
    assert stand_in.shape == model.lm_head.weight.shape and stand_in.stride() == model.lm_head.weight.stride()
    assert stand_in is not model.lm_head.weight


def test_what_cannot_be_copied_is_named():
    stock = zoo.model("llama", layers=2)
    stock.model.layers[0].__dict__["owner"] = stock.model  # leads to the lock, and can be copied
    stock.model.layers[1].mlp.state = {"lock": threading.Lock()}
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.1\.mlp\.state: .* does not copy this dict"):
        dp.transform(stock, dp.Identity())
