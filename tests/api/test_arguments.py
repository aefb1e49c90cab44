"""Arguments of public calls: one clear error for what does not fit, before anything runs."""

import copy
import pickle

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import depthpass as dp
from depthpass import tasks

BAD = [None, 1.5, "x", -1, True, float("nan"), float("inf"), 2**70, np.float64(0.5), torch.tensor(1.5), {}, object(), ["a"]]
IDS = torch.arange(3, 11)[None]


def small():
    torch.manual_seed(0)
    sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes))


@pytest.mark.parametrize("call", [
    lambda: dp.MaskedDiffusion(), lambda: dp.Loop(tims=2), lambda: dp.Coconut(1, "prompt", 3), lambda: dp.T2MLR(1, start=1),
    lambda: tasks.TaskDataset("parity"), lambda: tasks.TaskDataset("parity", 3, sed=1), lambda: dp.denoise(IDS),
    lambda: tasks.get("p_hop", sprad=4), lambda: dp.CoevolutionaryDiffusion(None, len, latnt=3),
])
def test_missing_and_unknown(call):
    with pytest.raises(dp.DepthpassError, match=r"missing|unexpected|too many|multiple values|expected options among"):
        call()


def test_passes_are_copied_and_pickled():
    for spec in (dp.MaskedDiffusion(2, 3), dp.Loop(times=2)):
        assert pickle.loads(pickle.dumps(copy.deepcopy(spec))) == spec


def test_wrong_types():
    """Whatever a number, a word or a function is replaced by: accepted only where it is one, refused by name elsewhere."""
    model = dp.transform(small(), dp.MaskedDiffusion(2, 15))
    tapped = dp.transform(small(), dp.Loop(times=2, taps=True))
    live = dp.transform(small(), dp.Identity())
    samples = [([3, 4], [5])] * 4
    words = tasks.tokenizer("char")
    calls = {
        tasks.TaskDataset: ({"task": "parity", "count": 2, "lengths": 3, "seed": 0, "tokenizer": words, "trace": True},
                            {"seed": [-1, 2**70], "tokenizer": [None], "trace": [True]}),
        lambda **k: next(iter(tasks.TaskStream("parity", 3, **k))): (
            {"seed": 0, "start": 0, "count": 2},
            {"seed": [-1, 2**70], "start": [2**70], "count": [None, 2**70]}),
        tasks.tokenizer: ({"kind": "symbol", "numbers": 2, "tasks": (), "symbols": ()}, {"symbols": [["a"]]}),
        tasks.get("parity").check: ({"prompt": tasks.get("parity").instance(3).prompt, "response": "x"}, {"response": ["x"]}),
        lambda **k: tasks.get("addition", **k): ({"reverse": True}, {"reverse": [True]}),
        lambda **k: dp.denoise(model, IDS, **k): (
            {"new_tokens": 2, "temperature": 0.0, "eos_token": None, "reuse": True, "generator": None, "planner": None},
            {"temperature": [1.5, 2**70, 0.5], "eos_token": [None], "reuse": [True], "generator": [None], "planner": [None]}),
        lambda **k: dp.diffusion_loss(model, IDS, **k): (
            {"labels": IDS, "eps": 0.1, "time": torch.tensor([0.5]), "masked": torch.ones_like(IDS).bool()},
            {"labels": [None], "eps": [0.5], "time": [None], "masked": [None]}),
        lambda **k: dp.LoopContrast(tapped, **k).close(): ({"loop": 1, "scope": "loop", "form": "penalty", "strength": 1.0},
                                                           {"loop": [-1], "strength": [None, 1.5, 2**70, 0.5]}),
        dp.LatentCurriculum: ({"per_step": 1, "stages": 1, "bot": 3, "pad": 0}, {"bot": [None, 2**70], "pad": [2**70]}),
        lambda **k: dp.search(live, samples, space=[[0]], method="random", score="log_prob", **k): (
            {"budget": 1, "seed": 0, "on_trial": None},
            {"budget": [None, 2**70], "seed": [-1, 2**70], "on_trial": [None]}),
    }
    for call, (good, fits) in calls.items():
        call(**good)
        for name in good:
            for bad in BAD:
                if any(repr(bad).removeprefix("np.float64(").rstrip(")") == repr(f) for f in fits.get(name, ())):
                    call(**{**good, name: bad})
                    continue
                with pytest.raises(dp.DepthpassError, match=name.removesuffix("s")):
                    call(**{**good, name: bad})


def test_numbers_of_numpy():
    given = tasks.TaskDataset("parity", np.int64(2), np.int64(3), seed=np.int32(1))
    assert given[1] == tasks.TaskDataset("parity", 2, 3, seed=1)[1]
    with pytest.raises(dp.InputError, match=r"seed: expected an integer, got 1\.5"):
        tasks.TaskDataset("parity", 2, seed=1.5)


def test_specs_take_them_as_plain_numbers():
    spec = dp.TurboConn(bridges=[(np.int64(2), 0)], group=np.int32(2), rank=np.int64(3), alpha=np.float32(0.5))
    assert spec == dp.TurboConn(bridges=[(2, 0)], group=2, rank=3, alpha=0.5)
    assert {type(v) for v in (spec.bridges[0][0], spec.group, spec.rank, spec.alpha)} == {int, float}
    with pytest.raises(dp.SpecError, match=r"group: expected an integer, got .*True"):
        dp.TurboConn(group=np.True_)
