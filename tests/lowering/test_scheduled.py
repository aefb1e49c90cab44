"""The hand-scheduled level against the eager level: float64, random bridges, outputs and every gradient."""

import gc
import weakref

import pytest
import torch
import zoo
from depthpass_lowering.executors.chunk_loop import _GRAPHS
from depthpass_lowering.state.buffers import Buffer
from levels import SPEC, assert_same, gradients, pair

import depthpass as dp
from depthpass.errors import LoweringError, SpecError


# Norm weights that the stock model multiplies in float32 are left out of the 1e-10: see docs/status.md.
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gpt_oss", "qwen3"])
def test_gradients_equal_the_eager_level(name, side):
    eager, scheduled = pair(name)
    batch = zoo.batch([11, 7, 10], side)
    assert_same(gradients(eager, batch), gradients(scheduled, batch))


def test_windows_and_chunks_below_the_group():
    eager, scheduled = pair("gemma3_text", chunk=2)
    batch = zoo.batch([12, 9])
    assert_same(gradients(eager, batch), gradients(scheduled, batch), limit=1e-6)


def test_disjoint_bridges_with_different_roles_and_accumulation():
    spec = [dp.TurboConn(bridges=[(1, 0)], group=2, rank=4), dp.TurboConn(bridges=[(5, 3)], group=4, rank=3, scope="far")]
    eager, scheduled = pair("llama", spec, layers=6)
    assert [r.chunk for r in eager.depth_schedule.serial_regions] == [2, 4]
    batch = zoo.batch([9, 11])
    assert_same(gradients(eager, batch, steps=2), gradients(scheduled, batch, steps=2))


def test_frozen_base_trains_only_the_bridges():
    eager, scheduled = pair("llama")
    for model in (eager, scheduled):
        model.requires_grad_(False)
        model.depth.requires_grad_(True)
    batch = zoo.batch([11, 8])
    one, other = gradients(eager, batch), gradients(scheduled, batch)
    assert {n.split(".")[0] for n in other[1]} == {"depth"}
    assert_same(one, other)


def test_hooks_on_parameters_fire_once_with_the_total():
    _, scheduled = pair("llama")
    seen = []
    weight = scheduled.model.layers[2].mlp.up_proj.weight
    weight.register_hook(lambda g: seen.append(g.clone()))
    _, actual = gradients(scheduled, zoo.batch([11, 8]))
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], actual["model.layers.2.mlp.up_proj.weight"])


def test_autocast_follows_the_eager_level():
    eager, scheduled = pair("llama", dtype=torch.float32)
    batch = zoo.batch([11, 8])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        one = gradients(eager, batch)
        other = gradients(scheduled, batch)
    torch.testing.assert_close(one[0], other[0], rtol=3e-2, atol=3e-2)
    for name, g in one[1].items():
        assert other[1][name].dtype == g.dtype
        assert (g - other[1][name]).norm() <= 0.05 * g.norm() + 1e-6, name


def test_prefill_and_decoding_agree_with_the_eager_level():
    eager, scheduled = pair("gpt_oss")
    batch = zoo.batch([9, 6])
    with torch.no_grad():
        caches = [dp.DepthCache(m) for m in (eager, scheduled)]
        mask = batch["attention_mask"]
        for a, b in ((0, 5), (5, 6), (6, 9)):
            outs = [
                m(input_ids=batch["input_ids"][:, a:b], attention_mask=mask[:, :b], past_key_values=c).logits
                for m, c in zip((eager, scheduled), caches)
            ]
            real = mask[:, a:b].bool()
            torch.testing.assert_close(outs[0][real], outs[1][real], rtol=1e-12, atol=1e-12)
        assert caches[0].state.nbytes() == caches[1].state.nbytes()


@pytest.mark.parametrize(("name", "side"), [("llama", "left"), ("gemma3_text", "right")])
def test_gradients_flow_through_a_cache_of_several_calls(name, side):
    """Keys of earlier calls, delay lines, and streams that no later call reads."""
    models, batch, seen = pair(name), zoo.batch([9, 6], side), []
    ids, mask = batch["input_ids"], batch["attention_mask"]
    for model in models:
        cache, parts = dp.DepthCache(model), []
        for a, b in ((0, 4), (4, 5), (5, 9)):
            parts.append(model(input_ids=ids[:, a:b], attention_mask=mask[:, :b], past_key_values=cache).logits)
        assert {r.level for r in model.depth_lowered} == {"eager" if model is models[0] else "scheduled"}
        logits = torch.cat([parts[0].detach(), *parts[1:]], 1)[mask.bool()]
        model.zero_grad()
        logits.square().sum().backward()
        seen.append((logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    assert_same(*seen, limit=1e-6 if name == "gemma3_text" else 1e-10)


def test_what_cannot_be_scheduled_says_so():
    _, scheduled = pair("llama")
    batch = zoo.batch([7, 5])
    handle = scheduled.model.layers[2].register_forward_hook(lambda m, a, o: None)
    with pytest.raises(LoweringError, match=r"block 2 has hooks.*lowering='auto'"):
        scheduled(**batch, use_cache=False)
    handle.remove()
    latents = dp.transform(zoo.model("llama"), [SPEC, dp.Coconut(2)], lowering="scheduled").train()
    latents.gradient_checkpointing_enable()
    with pytest.raises(LoweringError, match=r"a cache is kept .* activations are computed again"):
        latents(**batch, use_cache=False)
    with pytest.raises(SpecError, match="Did you mean 'scheduled'"):
        dp.transform(zoo.model("llama"), SPEC, lowering="schedule")


@pytest.mark.filterwarnings("ignore:hooks on or in block")
def test_auto_falls_back_where_scheduling_is_not_legal():
    eager, _ = pair("llama")
    auto = dp.transform(dp.restore(eager), SPEC)
    auto.depth.load_state_dict(eager.depth.state_dict())
    calls = []
    auto.model.layers[2].register_forward_hook(lambda m, a, o: calls.append(1))
    batch = zoo.batch([11, 8])
    assert_same(gradients(eager, batch), gradients(auto, batch))
    assert len(calls) == 4  # once per chunk: the block ran as a module
    (ran,) = auto.depth_lowered
    assert (ran.level, ran.blocks, ran.chunk, ran.tokens) == ("eager", (1, 2, 3), 3, 11)
    assert "block 2 has hooks" in ran.reason and "block 2 has hooks" in str(ran)


def test_what_ran_is_on_the_model():
    eager, scheduled = pair("llama", [SPEC, dp.TurboConn(bridges=[(5, 4)], group=2, scope="far")], layers=6)
    batch = zoo.batch([11, 8])
    for model, level in ((eager, "eager"), (scheduled, "scheduled")):
        assert model.depth_lowered == ()
        model(**batch, use_cache=False)
        assert [(r.level, r.blocks, r.chunk, r.reason) for r in model.depth_lowered] == [
            (level, (1, 2, 3), 3, None), (level, (5,), 2, None),
        ]
    scheduled.train().gradient_checkpointing_enable()
    scheduled(**batch, use_cache=False)
    assert all(r.recomputed and "recomputed" in str(r) for r in scheduled.depth_lowered)
    with torch.no_grad():
        scheduled(input_ids=batch["input_ids"][:, :2], use_cache=False)
    assert [r.reason for r in scheduled.depth_lowered] == ["one chunk without gradients"] * 2


def test_a_second_backward_and_weights_that_changed_before_it_are_refused_clearly():
    eager, scheduled = pair("llama")
    loss = scheduled(**zoo.batch([7, 5]), use_cache=False).logits.sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    for model in (eager, scheduled):
        layer = model.model.layers[2]
        for weight in (layer.self_attn.q_proj.weight, layer.input_layernorm.weight):
            loss = model(**zoo.batch([7, 5]), use_cache=False).logits.sum()
            with torch.no_grad():
                weight.mul_(2)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()
            weight.requires_grad_(False)  # a frozen weight is read again, too


@pytest.mark.parametrize(("backward", "again"), [(True, False), (False, False), (False, True)])
def test_a_step_leaves_nothing_behind(backward, again):
    """Nothing of the loop may stay alive through a cycle between graph nodes and the objects they keep."""
    _, scheduled = pair("llama")
    if again:
        scheduled.train().gradient_checkpointing_enable()
    alive = []
    loop = Buffer.write

    def spy(self, *args):
        alive.append(weakref.ref(self))
        return loop(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Buffer, "write", spy)
        loss = scheduled(**zoo.batch([11, 8]), use_cache=False).logits.sum()
        if backward:
            loss.backward()
    assert alive and any(ref() is not None for ref in alive) != backward
    del loss
    gc.collect()
    assert all(ref() is None for ref in alive)


def test_graphs_live_as_long_as_their_own_model():
    """An equal region of another model must not own them: they went when that model did, and were built and compiled again."""
    first, second = (pair("llama", level="scheduled")[1] for _ in range(2))
    for model in (first, second):
        model(**zoo.batch([7, 5]), use_cache=False).logits.sum().backward()
    (mine,) = _GRAPHS[second.depth_schedule.serial_regions[0]].values()
    mine = weakref.ref(mine)
    del first, model
    gc.collect()
    assert mine() is not None
