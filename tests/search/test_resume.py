"""``dp.search(resume=FILE)``: searches that were stopped go on to the result of those that were not."""

from __future__ import annotations

import copy
import json

import pytest
import torch

import depthpass as dp

SPACE = dict(skip=[1, 2], repeat=[1], times=[1], longest=1.25, edits=2)
LOOPS = dp.search.DampedLoops(lengths=[1, 2], times=[2, 3], within=(0.25, 1.0))
CASES = {
    "mcts": dict(method="mcts", score="log_prob", space="cola", budget=9),
    "beam": dict(method="beam", score="perplexity", budget=9),
    "random": dict(method="random", score="exact_match", budget=6), "sweep": dict(method="sweep", score="log_prob", space=LOOPS),
    "exhaustive": dict(method="exhaustive", score="greedy_match", space=SPACE | {"edits": 1}),
    "per sample": dict(method=dp.search.MCTS(penalty=0.0), score="log_prob", space=SPACE, budget=3, per_sample=True),
}


class Stopped(Exception):
    """In place of what kills a process."""


def stopping(after):
    calls = []

    def on_trial(done, most):
        calls.append(done)
        if len(calls) == after:
            raise Stopped

    return calls, on_trial


def numbers(result):
    """All that a result says but for the block calls that were made: prefixes are shared within a process."""
    data = result.to_dict()
    data["block_visits"] = data["block_visits"]["asked"]
    return data, [(t.layers, t.values) for t in result.trials]


@pytest.mark.parametrize("case", CASES)
def test_a_stopped_search_goes_on_to_the_same_result(small, tmp_path, case):
    file, options = tmp_path / "trials.jsonl", dict(seed=3, **CASES[case])
    want = dp.search(small.live, small.samples, **options)
    ran = 0
    for after in (1, 4):
        calls, on_trial = stopping(after)
        with pytest.raises(Stopped):
            dp.search(small.live, small.samples, resume=file, on_trial=on_trial, **options)
        ran += len(calls)
        assert len(file.read_text().splitlines()) == 1 + ran
        with file.open("a") as torn:  # killed while it wrote
            torn.write('{"layers": [0, 1')
    calls, on_trial = stopping(None)
    got = dp.search(small.stock, small.samples, resume=file, on_trial=on_trial, **options)
    assert numbers(got) == numbers(want) and got.block_visits.ran >= want.block_visits.ran
    pairs = [json.dumps([entry["layers"], entry.get("damped"), entry["rows"]])
             for entry in map(json.loads, file.read_text().splitlines()[1:])]
    assert len(pairs) == len(set(pairs)) == ran + len(calls)
    calls, on_trial = stopping(1)  # a search that has ended runs nothing
    again = dp.search(small.live, small.samples, resume=str(file), on_trial=on_trial, **options)
    assert again.to_json() == got.to_json() and not calls


def test_a_larger_budget_goes_on_and_another_search_is_refused(small, tmp_path):
    file, options = tmp_path / "trials.jsonl", dict(method="mcts", score="log_prob", space=SPACE, held_out=0.25)
    dp.search(small.live, small.samples, resume=file, budget=4, **options)
    more = dp.search(small.live, small.samples, resume=file, budget=8, batch=3, memo=False, **options)
    assert [t.layers for t in more.trials] == [t.layers for t in dp.search(small.live, small.samples, budget=8, **options).trials]
    other = copy.deepcopy(small.stock)
    with torch.no_grad():
        next(other.parameters())[0, 0] += 1e-12
    shallow = dp.materialize(dp.transform(small.stock, dp.LayerProgram([0, 1, 2])))
    before = file.read_bytes()
    for change, words in [
        (dict(model=other), "other weights"), (dict(model=shallow), "other model"), (dict(samples=small.samples[1:]), "samples"),
        (dict(space="polar"), "space"), (dict(seed=1), "seed: expected 0, got 1"), (dict(held_out=0.5), "held_out"),
        (dict(method="beam"), "method: expected 'mcts', got 'beam'"), (dict(method=dp.search.MCTS(penalty=1)), "options"),
        (dict(score="perplexity"), "score"), (dict(per_sample=True), "per_sample"),
    ]:
        arguments = dict(model=small.live, samples=small.samples, budget=8, resume=file) | options | change
        with pytest.raises(dp.InputError, match=f"resume: .*{words}"):
            dp.search(**arguments, on_trial=lambda *a: pytest.fail("a program ran"))
        assert file.read_bytes() == before


@pytest.mark.parametrize("text, words", [
    ("my notes", "something else"), ("[1]\n", "something else"), ('{"schema": "depthpass.search"}\n', "something else"),
    (None, "line 3"),
])
def test_files_that_are_no_journal_stay_as_they_are(small, tmp_path, text, words):
    file, options = tmp_path / "trials.jsonl", dict(score="log_prob", method="random", budget=2)
    if text is None:
        dp.search(small.live, small.samples, resume=file, **options)
        lines = file.read_text().splitlines(keepends=True)
        lines[2] = lines[2][:20] + "\n"
        text = "".join(lines)
    file.write_text(text)
    with pytest.raises(dp.InputError, match=words):
        dp.search(small.live, small.samples, resume=file, **options)
    assert file.read_text() == text
    with pytest.raises(dp.InputError, match="folder that exists"):
        dp.search(small.live, small.samples, resume=tmp_path / "gone" / "file", **options)
