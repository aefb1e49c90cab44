"""Decoded tokens as CUDA graphs, without CUDA: a stand-in for the recorder that keeps its memory as CUDA does."""

import pytest
import torch
import zoo
from depthpass_lowering.executors import graphed_token as graphed_step
from depthpass_lowering.executors.levels import executor

import depthpass as dp
from depthpass.errors import LoweringError

SPECS = {
    "turboconn": dp.TurboConn(bridges=[(3, 1), (2, 0)], group=2, rank=5),
    "loop": dp.Loop(start=1, end=3, times=2),
}


def transformed(spec, lowering):
    turbo = dp.transform(zoo.model("llama", 4), spec, lowering=lowering).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for p in turbo.depth.parameters():
            p.copy_(0.2 * torch.randn(p.shape))
    return turbo


def test_without_cuda_decoding_says_so():
    turbo = transformed(SPECS["loop"], "cudagraph")
    with torch.no_grad():
        out = turbo(input_ids=torch.tensor([[4, 5, 6]]), use_cache=True)
        with pytest.raises(LoweringError, match=r"cannot record a decoded token: the model is on cpu.*lowering='inductor'"):
            turbo(input_ids=torch.tensor([[7]]), past_key_values=out.past_key_values, use_cache=True)


@pytest.mark.compile
@pytest.mark.parametrize("name", SPECS)
def test_replays_equal_the_step_they_record(name, monkeypatch):
    """Two caches in turn, padded rows, weights that change in place: each token equals the eager level's."""
    recorded = []

    def record(run):
        run()
        results = [t.clone() for t in run()]
        recorded.append(len(results))

        def replay():
            for held, t in zip(results, run(), strict=True):
                held.copy_(t)

        return replay, results

    monkeypatch.setattr(graphed_step, "record", record)
    monkeypatch.setattr(graphed_step, "obstacle", lambda device: None)
    # The prefill's token loop has no graphs here.
    graphed, eager = transformed(SPECS[name], "cudagraph"), transformed(SPECS[name], "eager")
    monkeypatch.setattr("depthpass_lowering.executors.graphed.Graphed.refuse", lambda self, run, region: "no CUDA here")
    monkeypatch.setattr(executor("cudagraph"), "strict", False)
    batches = [zoo.batch([9, 6]), zoo.batch([7, 7])]
    with torch.no_grad():
        caches = {
            m: [m(**b, use_cache=True).past_key_values for b in batches] for m in (graphed, eager)
        }
        masks = [b["attention_mask"] for b in batches]
        for turn in range(5):
            which = turn % 2
            token = torch.tensor([[5 + turn], [11 - turn]])
            masks[which] = torch.cat((masks[which], torch.ones(2, 1, dtype=torch.long)), 1)
            out = [
                m(input_ids=token, attention_mask=masks[which], past_key_values=caches[m][which], use_cache=True).logits
                for m in (graphed, eager)
            ]
            torch.testing.assert_close(*out, rtol=1e-4, atol=1e-5)
            if turn == 2:
                for m in (graphed, eager):
                    m.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    assert len(recorded) == 2
