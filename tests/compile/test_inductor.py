"""The compiled level against the eager one: float64 gradients, one compilation for all blocks and chunks, decoded tokens."""

import copy

import pytest
import torch
import zoo
from depthpass_lowering.executors.compiled import CompiledChunk, compiled_graph
from depthpass_lowering.products.joint import Joint
from levels import assert_same, gradients, pair
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from turbos import enliven

import depthpass as dp
from depthpass.errors import LoweringError

pytestmark = pytest.mark.compile

SPEC = dp.TurboConn(bridges=[(2, 0), (2, 1)], group=3, rank=5)


@pytest.fixture(scope="module")
def models():
    """GPT-2 (no float32 norms inside, so that float64 agrees to the last digits) on both levels, random bridges."""
    stock = zoo.model("gpt2", 3, dtype=torch.float64)
    eager, compiled = (dp.transform(stock, SPEC, lowering=level) for level in ("eager", "inductor"))
    torch.manual_seed(5)
    values = {k: 0.3 * torch.randn(v.shape, dtype=v.dtype) for k, v in eager.depth.state_dict().items()}
    eager.depth.load_state_dict(values)
    compiled.depth.load_state_dict(values)
    return eager, compiled


def step(model, batch):
    model.zero_grad()
    out = model(**batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100), use_cache=False)
    out.loss.backward()
    real = batch["attention_mask"].bool()
    return out.logits[real].detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def compiled_of(model) -> list[CompiledChunk]:
    """The compiled chunks of a model's regions."""
    return [c for graph, held in compiled_graph.kept.items() if graph.program is model.depth_program for c in held.values()]


def compilations(model) -> list[Joint]:
    """All compiled segments of a model's regions."""
    segments = {s for one in compiled_of(model) for s in one.segments}
    return [joint for segment in segments for joint in segment.joints.values()]


@pytest.mark.codegen
def test_gradients_equal_and_blocks_chunks_and_lengths_share_one_compilation(models):
    eager, compiled = models
    for lengths in ([11, 7], [8, 8], [15, 3]):  # 11 and 8 leave a shorter last chunk
        batch = zoo.batch(lengths)
        (logits, grads), (logits_c, grads_c) = step(eager, batch), step(compiled, batch)
        torch.testing.assert_close(logits_c, logits, rtol=1e-12, atol=1e-12)
        assert grads_c.keys() == grads.keys()
        for name, g in grads.items():
            assert (grads_c[name] - g).abs().max() <= 1e-10 * g.abs().max().clamp_min(1e-12), name
        # Before, between and behind the two attention calls, whatever the chunk and length.
        assert len(compilations(compiled)) == 3


@pytest.mark.codegen
def test_dropout_is_drawn_as_on_the_level_below():
    stock = zoo.model("gpt2", 3, dtype=torch.float64, resid_pdrop=0.3, attn_pdrop=0.0).train()
    seen = []
    for level in ("scheduled", "inductor"):
        turbo = dp.transform(stock, SPEC, lowering=level).train()
        torch.manual_seed(1)
        with torch.no_grad():
            for p in turbo.depth.parameters():
                p.copy_(0.3 * torch.randn(p.shape))
        torch.manual_seed(2)  # compiling draws nothing
        seen.append(step(turbo, zoo.batch([9, 6])))
    torch.testing.assert_close(seen[1][0], seen[0][0], rtol=1e-12, atol=1e-12)
    for name, g in seen[0][1].items():
        torch.testing.assert_close(seen[1][1][name], g, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("one_capture")
@pytest.mark.parametrize("name", ["gemma3_text", "gpt_oss", "apertus"])
def test_windows_sinks_and_formulas_that_fill_in_place(name):
    """Blocks with windows, sinks and an activation whose gradient is not functional; their norms compute in float32."""
    eager, compiled = pair(name, SPEC, layers=3, level="inductor")  # a block of each kind in the token loop
    batch = zoo.batch([10, 7])
    one, other = gradients(eager, batch), gradients(compiled, batch)
    torch.testing.assert_close(other[0], one[0], rtol=1e-5, atol=1e-6)
    for name, g in one[1].items():
        assert (other[1][name] - g).norm() <= 1e-5 * g.norm() + 1e-9, name


@pytest.mark.usefixtures("one_capture")
def test_blocks_that_differ_by_their_bridges_share_their_compilations():
    """Seven blocks with another number of bridges each: bridges become calls between segments that are all alike."""
    bridges = [(7, d) for d in range(6)] + [(s, 0) for s in range(2, 7)] + [(6, 1), (5, 1), (6, 2)]
    eager, compiled = pair("gpt2", dp.TurboConn(bridges=bridges, group=3, rank=4), layers=8, level="inductor")
    batch = zoo.batch([11, 8])
    assert_same(gradients(eager, batch), gradients(compiled, batch))
    (one,) = compiled_of(compiled)
    assert one.apart and len(compilations(compiled)) == 3  # before, between and behind the attention calls


@pytest.mark.codegen
def test_a_program_without_a_token_loop_is_compiled_too():
    stock = zoo.model("gpt2", 3, dtype=torch.float64)
    spec = {"pass": "layer_program", "layers": [0, 1, 2, 1, 2]}
    eager, compiled = (dp.transform(stock, spec, lowering=level) for level in ("eager", "inductor"))
    graphs = []
    for lengths in ([9, 6], [13, 13], [7, 5, 6]):
        batch = zoo.batch(lengths)
        (logits, grads), (logits_c, grads_c) = step(eager, batch), step(compiled, batch)
        torch.testing.assert_close(logits_c, logits, rtol=1e-12, atol=1e-12)
        for name, g in grads.items():
            torch.testing.assert_close(grads_c[name], g, rtol=1e-9, atol=1e-12)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] > 0 and len(set(graphs)) == 1  # one compilation for any number of rows and tokens
    assert not compiled.depth_lowered


def of_the_head(gm) -> bool:
    """Whether a graph computes as many numbers per token as there are words."""
    values = [n.meta.get("val") for n in gm.graph.nodes if n.op == "call_function"]
    return any(isinstance(v, torch.Tensor) and v.dim() == 3 and v.shape[-1] == zoo.VOCABULARY for v in values)


@pytest.mark.codegen(of=of_the_head)
def test_capped_logits_stay_what_they_are_in_a_backward_pass():
    """torch.compile saves a view of them that it may take for memory of its own."""
    model = dp.transform(zoo.model("gemma2", 2, final_logit_softcapping=30.0), dp.Identity(), lowering="inductor").train()
    ids = torch.randint(3, 60, (3, 8))
    out = model(input_ids=ids, labels=ids, use_cache=False)
    logits = out.logits.detach().clone()
    out.loss.backward()
    assert torch.equal(out.logits, logits)


def test_weights_are_read_anew_at_every_call(models):
    eager, compiled = models
    batch = zoo.batch([9, 9])
    with torch.no_grad():
        for p in compiled.parameters():  # the stock parameters are those of the eager model
            p.mul_(1.01)
        for name, p in eager.depth.named_parameters():
            p.copy_(compiled.depth.get_parameter(name))
    assert torch.allclose(step(compiled, batch)[0], step(eager, batch)[0], atol=1e-12)


@pytest.mark.codegen
def test_a_decoded_token_is_one_graph_and_equals_the_eager_level(models):
    eager, compiled = models
    batch = zoo.batch([7, 4])
    seen = []
    with torch.no_grad():
        for model in (eager, compiled):
            cache, mask = dp.DepthCache(model), batch["attention_mask"]
            logits = [model(**batch, past_key_values=cache, use_cache=True).logits[:, -1]]
            for token in (5, 9, 7):
                mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
                ids = torch.tensor([[token], [token + 1]])
                logits.append(model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True).logits[:, -1])
            seen.append(torch.stack(logits))
            assert len(cache.state.slots) == 3 and cache.state.slots[1].keys[0].shape[2] == 10
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-12, atol=1e-12)
    assert len(compiled._depth.tokens) == 1 and not eager._depth.tokens
    for options in ({"batch": batch}, {"batch": {k: t[1:] for k, t in batch.items()}, "num_beams": 2}):
        rows = options.pop("batch")
        a, b = (m.generate(**rows, max_new_tokens=5, do_sample=False, **options) for m in models)
        assert torch.equal(a, b)
    assert len(compiled._depth.tokens) == 1  # two rows each time, so one graph


def test_a_state_that_was_left_behind_does_not_write_into_rooms_that_went_on(models):
    _, compiled = models
    batch = zoo.batch([7, 4])
    ids, mask = torch.randint(3, 90, (2, 4)), batch["attention_mask"]

    @torch.no_grad()
    def advance(cache, column):
        seen = torch.cat([mask, mask.new_ones(2, cache.get_seq_length() - 6)], 1)
        return compiled(input_ids=ids[:, column : column + 1], attention_mask=seen, past_key_values=cache).logits

    with torch.no_grad():
        cache = dp.DepthCache(compiled)
        compiled(**batch, past_key_values=cache)
        advance(cache, 0)
        fork = copy.copy(cache)  # the same rooms
        first = advance(cache, 1)
        advance(fork, 3)
        went_on = advance(cache, 2)
        whole = torch.cat([batch["input_ids"], ids[:, :3]], 1), torch.cat([mask, mask.new_ones(2, 3)], 1)
        expected = compiled(input_ids=whole[0], attention_mask=whole[1], use_cache=False).logits[:, -2:]
    torch.testing.assert_close(torch.cat([first, went_on], 1), expected, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_weights_that_a_compiled_token_was_not_made_for(models):
    """Other strides compile another one; a class of its own, as quantized weights have, is refused by name."""
    batch = zoo.batch([7, 7])
    token = {"input_ids": batch["input_ids"][:, -1:]}

    def filled(model):
        cache = dp.DepthCache(model)
        model(input_ids=batch["input_ids"], past_key_values=cache)
        return cache

    eager, compiled = models
    projection = compiled.transformer.h[1].attn.c_proj
    whole = projection.weight.data  # of the eager model, too
    projection.weight.data = (-whole).t().contiguous().t()
    rows = [model(**token, past_key_values=filled(model)).logits for model in models]
    projection.weight.data = whole
    torch.testing.assert_close(rows[1], rows[0], rtol=1e-10, atol=1e-10)
    assert (rows[0] - eager(**token, past_key_values=filled(eager)).logits).abs().max() > 1e-3
    cache, kept = filled(compiled), projection.weight
    projection.weight = nn.Parameter(TwoTensor(whole, whole), requires_grad=False)
    with pytest.raises(LoweringError, match=r"cannot compile a decoded token: a weight is a TwoTensor"):
        compiled(**token, past_key_values=cache)
    projection.weight = kept


@pytest.mark.usefixtures("one_capture")
def test_a_decoded_token_behind_latents_is_one_graph():
    stock = enliven(zoo.model("gpt2", 2, dtype=torch.float64), std=0.2)
    specs = [dp.TurboConn(bridges=[(1, 0)], group=2, rank=3), dp.Coconut(2, after=2)]
    models = [dp.transform(stock, specs, lowering=level) for level in ("eager", "inductor")]
    for m in models:
        enliven(m.depth, seed=1, std=0.3, least=1)
    batch, options = zoo.batch([5, 3]), {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    actual = [m.generate(**batch, **options, output_logits=True, return_dict_in_generate=True) for m in models]
    assert torch.equal(actual[0].sequences, actual[1].sequences)
    torch.testing.assert_close(torch.stack(actual[1].logits), torch.stack(actual[0].logits), rtol=1e-10, atol=1e-10)
    assert len(models[1]._depth.tokens) == 1


@pytest.mark.usefixtures("one_capture")
@pytest.mark.parametrize("wide", [False, True])
def test_autocast_follows_the_eager_level(wide):
    """Wide enough, and the cast weights are packed."""
    sizes = {"hidden_size": 192, "intermediate_size": 256} if wide else {}
    eager, compiled = pair("llama", SPEC, dtype=torch.float32, layers=3, level="inductor", sizes=sizes)
    batch = zoo.batch([14, 8])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        one, other = gradients(eager, batch), gradients(compiled, batch)
    torch.testing.assert_close(one[0], other[0], rtol=3e-2, atol=3e-2)
    for name, g in one[1].items():
        assert other[1][name].dtype == g.dtype
        assert (g - other[1][name]).norm() <= 0.05 * g.norm() + 1e-6, name


def test_what_cannot_be_compiled_is_said(models):
    _, compiled = models
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        cache = dp.DepthCache(compiled)
        compiled(**zoo.batch([5]), past_key_values=cache)
        with pytest.raises(LoweringError, match="cannot compile a decoded token: autocast is on"):
            compiled(input_ids=torch.tensor([[4]]), past_key_values=cache)
    routed = dp.transform(dp.restore(compiled), dp.MixtureOfRecursions(start=1, end=2, mode="threshold"), lowering="inductor")
    with pytest.raises(LoweringError, match=r"cannot compile a decoded token: op route "):
        routed.generate(**zoo.batch([5]), max_new_tokens=2, do_sample=False)
