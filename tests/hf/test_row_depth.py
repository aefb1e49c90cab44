"""Rows of one batch with loop counts of their own: each row's tokens are those that it has alone, at its count."""

import pytest
import torch
import zoo
from turbos import transformed

import depthpass as dp
from depthpass.hf.decoding.row_depth import ladder_of

pytestmark = pytest.mark.usefixtures("one_capture")

BATCH = zoo.batch([9, 6, 7, 9])
SETTINGS = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def alone(model, row, count, passes):
    """What a row generates by itself, without padding, at its count."""
    ids = BATCH["input_ids"][row, BATCH["attention_mask"][row].bool()][None]
    with dp.using(model, passes(count)):
        return model.generate(ids, **SETTINGS)[0, ids.shape[1] :]


@pytest.mark.parametrize(
    ("name", "passes"),
    [
        ("llama", lambda t: dp.Loop(start=1, end=3, times=t)),
        ("llama", lambda t: dp.Loop(times=t, timestep=True)),
        ("gemma3_text", lambda t: dp.Loop(start=1, end=3, times=t)),  # windows
        ("gpt2", lambda t: [dp.Skip(3), dp.Loop(start=1, end=2, times=t, lora_rank=2)]),
    ],
    ids=["llama", "timestep", "gemma3_text", "gpt2"],
)
def test_rows_decode_as_they_do_alone(name, passes):
    model = transformed(name, passes(4))
    for loops in ([1, 4, 2, 2], [3, 1, 1, 3]):
        out = model.generate(**BATCH, **SETTINGS, loops=loops)
        for row, count in enumerate(loops):
            assert torch.equal(out[row, 9:], alone(model, row, count, passes)), (loops, row)
    assert torch.equal(model.generate(**BATCH, **SETTINGS, loops=torch.tensor([4] * 4)), model.generate(**BATCH, **SETTINGS))


def test_the_ladder_runs_no_visit_that_no_row_takes():
    model = transformed("llama", dp.Loop(start=1, end=3, times=4), torch.float32)
    ladder = ladder_of(model, [1, 2, 4])
    assert [p.cost for p in (ladder.first, *ladder.steps, ladder.last)] == [3, 2, 4, 1] and ladder.counts == (2, 4)
    assert ladder.visits([1, 2, 4, 4]) == 4 + 6 + 10 + 10


def test_rows_stop_by_themselves():
    model = transformed("llama", dp.Loop(start=1, end=3, times=3))
    free = model.generate(**BATCH, **SETTINGS, loops=[1, 3, 2, 1])
    stop = int(free[1, 10])
    out = model.generate(**BATCH, **{**SETTINGS, "eos_token_id": stop}, loops=[1, 3, 2, 1])
    assert out[1, 10] == stop and not out[1, 11:].any()
    for row in range(4):
        end = (free[row, 9:] == stop).nonzero()
        keep = 9 + (int(end[0]) + 1 if len(end) else 5)
        assert torch.equal(out[row, :keep], free[row, :keep])


@pytest.mark.parametrize(
    ("spec", "more", "words"),
    [
        (dp.Loop(times=2), {"loops": [1, 2]}, "a number for each of 4 rows, got 2"),
        (dp.Loop(times=2), {"loops": [1, 0, 1, 1]}, "at least 1 for every row"),
        (dp.Loop(times=2), {"loops": 2}, "for every row"),
        (dp.Loop(times=2), {"loops": [1, 2, 1, 1], "draft": "loop:1"}, "no draft"),
        (dp.Loop(times=2), {"loops": [1, 2, 1, 1], "num_beams": 2}, "loops: expected num_beams=1"),
        (dp.Loop(times=2, damped=True), {"loops": [1, 2, 1, 1]}, "hand on one stream"),
        (dp.Loop(times=2, kv="first"), {"loops": [1, 2, 1, 1]}, "hand on one stream"),
        (dp.ParallelLoop(loops=2), {"loops": [1, 2, 1, 1]}, "hand on one stream"),
        (dp.Skip(1), {"loops": [1, 2, 1, 1]}, "generate: expected a spec with a loop"),
        (dp.Loop(times=2, lora_rank=2), {"loops": [1, 3, 1, 1]}, "needs the new parameters"),
    ],
)
def test_bad_input(spec, more, words):
    model = transformed("llama", spec, torch.float32)
    with pytest.raises(dp.InputError, match=words):
        model.generate(**BATCH, **SETTINGS, **more)
