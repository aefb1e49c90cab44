"""Training-free loops against stock blocks in a hand-written damped loop: ranges, steps, the naive control."""

import copy
import pickle

import pytest
import torch
from layer_search import answered, build, by_hand, log_prob
from torch import nn

import depthpass as dp
from depthpass.search.damped import Damped
from depthpass.search.samples import Sample, split


class Range(nn.Module):
    """Stock blocks in a row, as damped sub-steps."""

    def __init__(self, blocks, times, step):
        super().__init__()
        self.blocks, self.times, self.step = nn.ModuleList(blocks), times, step

    def forward(self, hidden, *args, **kwargs):
        for _ in range(self.times):
            x = hidden
            for block in self.blocks:
                x = block(x, *args, **kwargs)
            hidden = hidden + (x - hidden) * self.step
        return hidden


def damped(stock, start, end, times, step):
    model = copy.deepcopy(stock)
    blocks = model.model.layers
    model.model.layers = nn.ModuleList([*blocks[:start], Range(blocks[start:end], times, step), *blocks[end:]])
    model.config.num_hidden_layers = len(model.model.layers)
    return model


@pytest.fixture(scope="module")
def subject():
    stock = build(blocks=5)
    return stock, dp.transform(stock, dp.Identity()), answered(stock, 8)


SPACE = dp.search.DampedLoops(lengths=[1, 2], times=[2, 3], steps=[None, 0.25], within=(0.2, 0.8))


def test_a_sweep_scores_every_range_and_step_beside_naive_repetition(subject):
    stock, live, samples = subject
    result = dp.search(live, samples, space=SPACE, method="sweep", score="log_prob")
    searched, held = split([Sample(tuple(p), tuple(a)) for p, a in samples], 0.5, 0)
    loops = [t for t in result.trials if isinstance(t.layers, Damped)]
    assert len(loops) == (3 + 2) * 2 * 2 == len(result.trials) - 1
    with torch.no_grad():
        for t in loops:
            x = t.layers
            model = damped(stock, x.start, x.end, x.times, 1 / x.times if x.step is None else x.step)
            assert t.values == pytest.approx([log_prob(model, s.prompt, s.answer) for s in searched], rel=1e-9), str(x)
            assert len({v.values for v in loops}) == len(loops)
    naive = result.controls["naive"]
    truth = by_hand(stock, searched, {tuple(t.layers) for t in loops}, log_prob)
    assert naive.programs == 10 == len(truth)
    assert naive.best.score == pytest.approx(max(sum(v) / 4 for v in truth.values()), rel=1e-9)
    assert naive.mean == pytest.approx(sum(sum(v) / 4 for v in truth.values()) / 10, rel=1e-9)
    apart = by_hand(stock, held, [naive.best.layers], log_prob)[naive.best.layers]
    best = result.best.held_out.value if result.best.layers != tuple(range(5)) else result.stock.held_out.value
    assert naive.difference.value == pytest.approx(best - sum(apart) / 4, rel=1e-9)
    assert "the same ranges and counts" in str(result) and any("in 2 steps of 1/2" in str(t.layers) for t in loops)
    unshared = dp.search(live, samples, space=SPACE, method="sweep", score="log_prob", memo=False)
    assert unshared.trials == result.trials and unshared.block_visits.saved == 0 < result.block_visits.saved


def test_generation_specs_and_files(subject, tmp_path):
    _, live, samples = subject
    result = dp.search(live, samples[:6], space={"damped": {"lengths": 2, "times": 2}}, method="sweep", score="exact_match")
    for t in result.trials[1:]:
        model = dp.transform(dp.restore(live), t.spec)
        says = [model.generate(torch.tensor([p]), max_new_tokens=len(a), do_sample=False)[0, len(p):].tolist() == list(a)
                for p, a in split([Sample(tuple(p), tuple(a)) for p, a in samples[:6]], 0.5, 0)[0]]
        assert list(t.values) == [float(x) for x in says]
    loops = [t.layers for t in result.trials[1:]]
    assert pickle.loads(pickle.dumps(loops[0])) == loops[0] and loops[0] != tuple(loops[0]) and loops[0] != loops[1]
    data = result.to_dict()
    assert data["trials"][1]["damped"]["times"] == 2 and "damped" not in data["trials"][0]
    assert dp.search(live, samples[:6], space=data["settings"]["space"], method="sweep", score="exact_match").best == result.best
    result.save(tmp_path / "best.yaml")
    assert dp.load_spec(tmp_path / "best.yaml")[0] == result.best.spec
    assert result.heat_map(2).scores[1][2] == next(t.score for t in result.trials[1:] if t.layers.start == 1)


def test_a_part_of_the_change_is_not_the_identity_at_one_pass(subject):
    stock, _, samples = subject
    ids = torch.tensor([samples[4][0]])
    with torch.no_grad():
        once = dp.transform(stock, dp.Loop(1, 3, times=1, damped=0.5))(ids).logits
        half = damped(stock, 1, 3, 1, 0.5)(ids, use_cache=False).logits
        whole = dp.transform(stock, dp.Loop(1, 3, times=1, damped=True))(ids).logits
        assert torch.equal(whole, stock(ids).logits) and not torch.allclose(once, whole)
    torch.testing.assert_close(once, half, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("fields", "message"), [
    ({"times": [1]}, r"space\.times: expected integers of at least 2"), ({"lengths": []}, r"space\.lengths: expected integers"),
    ({"steps": [0.0]}, r"space\.steps: expected parts of the change"), ({"within": (0.5, 0.5)}, r"space\.within: expected two"),
    ({"lengths": [9]}, "space: it contains no range"), ({"length": 2}, r"space\.length: no such field"),
])
def test_bad_input(subject, fields, message):
    _, live, samples = subject
    with pytest.raises(dp.InputError, match=message):
        dp.search(live, samples, space={"damped": fields}, method="sweep")
    with pytest.raises(dp.SpecError, match=r"loop\.damped: expected True, False or a part"):
        dp.Loop(1, 2, damped=2.5)
