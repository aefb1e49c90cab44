"""``attach`` puts parameters on a stock model and changes nothing else."""

import copy

import pytest
import torch
import zoo

import depthpass as dp

SPEC = dp.TurboConn(bridges=[(1, 0)], group=2, rank=3)


def test_names_and_values_are_those_of_transform_and_the_forward_stays_stock():
    model, batch = zoo.model("llama", layers=2), zoo.batch([5, 4])
    before = model(**batch).logits
    torch.manual_seed(3)
    turbo = dp.transform(model, SPEC)
    torch.manual_seed(3)
    assert dp.attach(model, SPEC) is model
    assert torch.equal(model(**batch).logits, before)
    mine, theirs = model.state_dict(), turbo.state_dict()
    assert mine.keys() == theirs.keys() and "depth.turboconn.s1_d0.down.weight" in mine
    assert all(torch.equal(mine[k], theirs[k]) for k in mine)


def test_an_equal_spec_keeps_the_parameters_and_another_one_is_an_error():
    model = dp.attach(zoo.model("llama", layers=2), SPEC)
    held = model.depth
    dp.attach(model, "{pass: turboconn, bridges: [[1, 0]], group: 2, rank: 3}")
    assert model.depth is held
    with pytest.raises(dp.SpecError, match=r"another spec attached.*del model\.depth"):
        dp.attach(model, dp.TurboConn(bridges=[(1, 0)], group=3, rank=3))
    assert model.depth is held
    del model.depth
    dp.attach(model, dp.TurboConn(bridges=[(1, 0)], group=3, rank=3))
    assert model.depth is not held


def test_a_copy_has_its_own_attached_parameters():
    model = dp.attach(zoo.model("llama", layers=2), SPEC)
    other = dp.attach(copy.deepcopy(model), SPEC)
    assert other.depth is not model.depth


def test_transformed_and_unsuitable_models_are_refused_unchanged():
    turbo = dp.transform(zoo.model("llama", layers=2), SPEC)
    with pytest.raises(dp.SpecError, match="already transformed"):
        dp.attach(turbo, SPEC)
    model = zoo.model("llama", layers=2)
    with pytest.raises(dp.PassError):
        dp.attach(model, dp.TurboConn(bridges=[(7, 0)]))
    assert not hasattr(model, "depth")
