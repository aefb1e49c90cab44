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


@pytest.fixture
def recorded(monkeypatch):
    """Sizes of the recordings made by a stand-in for CUDA's, which keeps memory as CUDA does: inputs, the activations of one
    pass, and gradients, which the next replay writes again."""
    recorded = []

    def record(function, samples, allow_unused_input):
        assert allow_unused_input
        static = [t.detach().clone().requires_grad_(t.requires_grad) if not isinstance(t, torch.nn.Parameter) else t
                  for t in samples]
        recorded.append(len(samples))
        wanted = [s for s in static if s.requires_grad]
        gradients = [torch.zeros_like(s) for s in wanted]
        last = {}

        class Replay(torch.autograd.Function):
            @staticmethod
            def forward(ctx, *given):
                with torch.no_grad():
                    for s, t in zip(static, given, strict=True):
                        if s.data_ptr() != t.data_ptr():
                            s.copy_(t)
                with torch.enable_grad():
                    last["out"] = function(*static)
                return tuple(t.detach() for t in last["out"])

            @staticmethod
            def backward(ctx, *grads):
                if last.get("done") is not last["out"]:
                    last["done"] = last["out"]
                    computed = torch.autograd.grad(last["out"], wanted, grads, allow_unused=True)
                    with torch.no_grad():
                        for held, g in zip(gradients, computed, strict=True):
                            held.zero_() if g is None else held.copy_(g)
                each = iter(gradients)
                return tuple(next(each).detach() if s.requires_grad else None for s in static)

        return Replay.apply

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record)
    monkeypatch.setattr(graphed.Graphed, "refuse", lambda self, run, region: None)
    return recorded


def models():
    """The same program on the eager level and as graphs, on one stock model."""
    stock = zoo.model("gpt2", 4, dtype=torch.float64)  # no float32 norms inside, which compiled code rounds otherwise
    eager, turbo = (dp.transform(stock, SPEC, lowering=level) for level in ("eager", "cudagraph"))
    torch.manual_seed(2)
    values = {k: 0.3 * torch.randn(v.shape, dtype=v.dtype) for k, v in eager.depth.state_dict().items()}
    eager.depth.load_state_dict(values)
    turbo.depth.load_state_dict(values)
    return stock, eager, turbo


def compare(got, want):
    assert got.keys() == want.keys()
    for name, g in want.items():
        assert (got[name] - g).abs().max() <= 1e-10 * g.abs().max().clamp_min(1e-12), name


@pytest.mark.compile
def test_replays_see_new_rows_and_new_weights(recorded):
    stock, eager, turbo = models()
    # Rows of 10 to 12 tokens are padded to 12 columns, those of 8 and 9 to 9.
    for lengths, graphs in (([11, 7], 1), ([12, 4], 1), ([10, 3], 1), ([8, 8], 2), ([11, 9], 2)):
        batch = zoo.batch(lengths, seed=len(lengths) + lengths[1])
        (loss, grads), (loss_g, grads_g) = step(eager, batch), step(turbo, batch)
        torch.testing.assert_close(loss_g, loss, rtol=1e-12, atol=1e-12)
        compare(grads_g, grads)
        assert len(recorded) == graphs
        (ran,) = turbo.depth_lowered
        assert (ran.level, ran.padded) == ("cudagraph", -max(lengths) % 3)
        with torch.no_grad():
            for p in stock.parameters():
                p.mul_(1.01)  # shared: both models


@pytest.mark.compile
@pytest.mark.parametrize("together", [False, True])
def test_gradients_of_passes_add_up(recorded, together):
    """A graph has one set of activations and of gradients: what a pass leaves behind is not to be written by the next one."""
    _, eager, turbo = models()
    sums, kept = {}, []
    for model in (eager, turbo):
        losses = []
        for seed in range(3):
            batch = zoo.batch([12, 12], seed=seed)
            losses.append(model(**batch, use_cache=False).logits.square().mean())
            if not together:
                losses.pop().backward()
                kept.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        if together:
            levels = [r.level for r in turbo.depth_lowered] if model is turbo else []
            sum(losses).backward()
        sums[model] = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        for p in model.parameters():
            p.grad = None
    compare(sums[turbo], sums[eager])
    assert len(recorded) == 1
    if together:  # of the last pass: the first one waits
        assert levels == ["inductor"]


@pytest.mark.compile
def test_a_gradient_that_somebody_keeps_is_not_written_again(recorded):
    _, _, turbo = models()
    first = step_gradients(turbo, 0)
    copies = {n: g.clone() for n, g in first.items()}
    step_gradients(turbo, 1)
    compare(first, copies)


def step_gradients(model, seed):
    """Gradients of a pass, not copied."""
    for p in model.parameters():
        p.grad = None
    model(**zoo.batch([12, 12], seed=seed), use_cache=False).logits.square().mean().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_a_backward_pass_whose_activations_are_gone_says_so():
    recording = graphed.Recording(lambda w: (w * 2,))
    w = torch.nn.Parameter(torch.ones(3))
    (first,), (second,) = recording(w), recording(w)
    with pytest.raises(RuntimeError, match="whose activations a later forward pass has overwritten"):
        first.sum().backward()
    assert recording.waits() is not None
    second.sum().backward()
    assert recording.waits() is None and w.grad.tolist() == [2.0] * 3


@pytest.mark.compile
def test_weights_that_change_before_the_backward_pass_are_refused(recorded):
    _, _, turbo = models()
    loss = turbo(**zoo.batch([12, 12], seed=0), use_cache=False).logits.square().mean()
    with torch.no_grad():
        turbo.transformer.h[1].mlp.c_fc.weight.mul_(2)
    with pytest.raises(RuntimeError, match="in a token loop changed between forward and backward"):
        loss.backward()
