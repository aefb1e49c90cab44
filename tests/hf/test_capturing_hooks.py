"""A stock model keeps hooks after one call with output_hidden_states=True; they must not be in the way."""

import torch
import zoo

import depthpass as dp


def test_a_model_that_was_asked_for_hidden_states_transforms_and_keeps_its_own_hooks():
    stock = zoo.model("llama", layers=2)
    ids = torch.randint(3, zoo.VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(0))
    before = stock(input_ids=ids, output_hidden_states=True).hidden_states
    turbo = dp.transform(stock, dp.TurboConn(bridges=[(1, 0)], group=2, rank=4), lowering="scheduled")
    with torch.no_grad():
        torch.testing.assert_close(turbo(input_ids=ids).logits, stock(input_ids=ids).logits)
    for model in (stock, dp.restore(turbo)):
        after = model(input_ids=ids, output_hidden_states=True).hidden_states
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
