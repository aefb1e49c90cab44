"""The CUDA-graph level without CUDA: a stand-in for the recorder, which keeps its inputs in static memory as CUDA does."""

import pytest
import torch
import zoo
from depthpass_lowering.executors import graphed
from depthpass_lowering.executors.graphed import bucket

import depthpass as dp
from depthpass.errors import LoweringError

SPEC = dp.TurboConn(bridges=[(3, 1), (2, 0)], group=3, rank=5)


def step(model, batch):
    model.zero_grad()
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    # transformers' own loss is float32 in a float64 model: a last bit of the logits may round it to the next number.
    logits = model(**batch, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_without_cuda_the_level_says_so():
    turbo = dp.transform(zoo.model("llama", 4), SPEC, lowering="cudagraph")
    with pytest.raises(LoweringError, match=r"'cudagraph' cannot run this call: the model is on cpu"):
        turbo(input_ids=torch.tensor([[4, 5, 6]]), use_cache=False)


def test_buckets_are_multiples_of_the_chunk_and_waste_little():
    for chunk in (1, 3, 8):
        for tokens in range(1, 1200):
            columns = bucket(tokens, chunk)
            assert columns >= tokens and columns % chunk == 0 and columns - tokens < chunk + tokens / 8
        assert len({bucket(t, chunk) for t in range(1, 1024 * chunk + 1)}) <= 64


@pytest.mark.compile
def test_replays_see_new_rows_and_new_weights(monkeypatch):
    recorded = []

    def record(function, samples, allow_unused_input):
        assert allow_unused_input
        static = [t.detach().clone().requires_grad_(t.requires_grad) if not isinstance(t, torch.nn.Parameter) else t
                  for t in samples]
        recorded.append(len(samples))

        class Replay(torch.autograd.Function):
            @staticmethod
            def forward(ctx, *given):
                with torch.no_grad():
                    for s, t in zip(static, given):
                        if s.data_ptr() != t.data_ptr():
                            s.copy_(t)
                with torch.enable_grad():
                    ctx.out = function(*static)
                return tuple(t.detach() for t in ctx.out)

            @staticmethod
            def backward(ctx, *grads):
                wanted = [s for s in static if s.requires_grad]
                actual = iter(torch.autograd.grad(ctx.out, wanted, grads, allow_unused=True))
                return tuple(next(actual) if s.requires_grad else None for s in static)

        return Replay.apply

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record)
    monkeypatch.setattr(graphed.Graphed, "refuse", lambda self, run, region: None)
    stock = zoo.model("gpt2", 4, dtype=torch.float64)  # no float32 norms inside, which compiled code rounds otherwise
    eager, turbo = (dp.transform(stock, SPEC, lowering=level) for level in ("eager", "cudagraph"))
    torch.manual_seed(2)
    values = {k: 0.3 * torch.randn(v.shape, dtype=v.dtype) for k, v in eager.depth.state_dict().items()}
    eager.depth.load_state_dict(values)
    turbo.depth.load_state_dict(values)
    # Rows of 10 to 12 tokens are padded to 12 columns, those of 8 and 9 to 9.
    for lengths, graphs in (([11, 7], 1), ([12, 4], 1), ([10, 3], 1), ([8, 8], 2), ([11, 9], 2)):
        batch = zoo.batch(lengths, seed=len(lengths) + lengths[1])
        (loss, grads), (loss_g, grads_g) = step(eager, batch), step(turbo, batch)
        torch.testing.assert_close(loss_g, loss, rtol=1e-12, atol=1e-12)
        assert grads_g.keys() == grads.keys()
        for name, g in grads.items():
            assert (grads_g[name] - g).abs().max() <= 1e-10 * g.abs().max().clamp_min(1e-12), name
        assert len(recorded) == graphs
        (ran,) = turbo.depth_lowered
        assert (ran.level, ran.padded) == ("cudagraph", -max(lengths) % 3)
        with torch.no_grad():
            for p in stock.parameters():
                p.mul_(1.01)  # shared: both models
