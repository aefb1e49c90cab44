"""Programs that compute with absolute positions: a padded row is the row alone, in forward, decoding and generate."""

import oracle_program as oracle
import pytest
import torch
import zoo
from turbos import enliven

import depthpass as dp

SPECS = {
    "plt": dp.ParallelLoop(loops=2, window=3), "iquest": dp.ParallelLoop.iquest(loops=2, window=3),
    "plt, pads": [dp.ParallelLoop(loops=2, window=3), dp.Pad(2, token=5)],
}


def transformed(name, spec, dtype=torch.float64, **sizes):
    stock = enliven(zoo.model(name, 3, dtype=dtype, **sizes), std=0.3)
    model = dp.transform(stock, spec)
    enliven(model.depth, seed=1, std=0.6, least=1)
    return stock, model


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt_neox"])
@pytest.mark.parametrize("system", SPECS)
def test_a_padded_row_is_the_row_alone(name, system):
    _, model = transformed(name, SPECS[system])
    lengths = [9, 5, 6]
    alone = {}
    with torch.no_grad():
        for side in ("left", "right"):
            batch = zoo.batch(lengths, side)
            ids, mask = batch["input_ids"], batch["attention_mask"].bool()
            out = model(**batch, use_cache=False).logits
            for r in range(3):
                key = tuple(ids[r, mask[r]].tolist())
                if key not in alone:
                    alone[key] = model(input_ids=ids[r : r + 1, mask[r]], use_cache=False).logits[0]
                torch.testing.assert_close(out[r, mask[r]], alone[key], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("system", ["plt", "iquest"])
def test_against_an_oracle_and_by_hand_with_a_cache(system):
    spec = SPECS[system]
    stock, model = transformed("llama", spec)
    batch = zoo.batch([9, 5])
    ids, mask = batch["input_ids"], batch["attention_mask"]
    counted = (mask.cumsum(-1) - 1).clamp_min(0)
    gates = [model.depth.parallel_loop.get_submodule(f"v{v}.gate") for v in range(3)]
    with torch.no_grad(), oracle.oracle_attention(stock):
        whole = model(**batch, use_cache=False).logits
        torch.testing.assert_close(model(**batch, position_ids=counted, use_cache=False).logits, whole)
        for r in range(2):
            real = mask[r].bool()
            row = oracle.Row(stock, ids[r, real], torch.arange(int(real.sum())))
            want = row.logits(oracle.parallel_loop(
                row, 2, 3, spec.mix, [lambda q, x, g=g: (q * g.weight).sum(-1) + g.bias for g in gates], shift=spec.shift))
            torch.testing.assert_close(whole[r, real], want, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        cache = dp.DepthCache(model)
        for first, last in ((0, 5), (5, 6), (6, 9)):
            step = model(input_ids=ids[:, first:last], attention_mask=mask[:, :last], past_key_values=cache).logits
            real = mask[:, first:last].bool()
            torch.testing.assert_close(step[real], whole[:, first:last][real], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("system", SPECS)
def test_generate_starts_from_what_forward_says(system):
    _, model = transformed("llama", SPECS[system])
    batch = zoo.batch([8, 4])
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    made_ = model.generate(**batch, **options, output_logits=True, return_dict_in_generate=True)
    with torch.no_grad():
        torch.testing.assert_close(made_.logits[0].double(), model(**batch, use_cache=False).logits[:, -1], rtol=1e-5, atol=1e-5)
    assert torch.equal(made_.sequences[:, 8:], model.generate(**batch, **options, use_cache=False)[:, 8:])
    short = model.generate(batch["input_ids"][1:, 4:], **options)
    assert torch.equal(made_.sequences[1, 4:], short[0])


def test_other_programs_number_columns_as_the_stock_model_does():
    for name in ("llama", "gpt2"):
        stock = enliven(zoo.model(name, 3), std=0.3)
        batch = zoo.batch([9, 5])
        real = batch["attention_mask"].bool()
        with torch.no_grad():
            for spec in (dp.Identity(), dp.ParallelLoop.identity(kv="own", gate_init=0.0, loops=1)):
                assert torch.equal(dp.transform(stock, spec)(**batch).logits[real], stock(**batch).logits[real])
