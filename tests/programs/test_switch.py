"""Switching a live model between programs and loop counts: nothing is captured, copied or forgotten."""

import threading

import pytest
import torch
import zoo
from turbos import enliven

import depthpass as dp
import depthpass.hf.model

LENGTHS = [8, 5]


@pytest.fixture
def captures(monkeypatch):
    captures, real = [], depthpass.hf.model.capture

    def capture(*args):
        captures.append(args)
        return real(*args)

    monkeypatch.setattr(depthpass.hf.model, "capture", capture)
    return captures


def stock_of(name="llama", layers=3, **more):
    return enliven(zoo.model(name, layers, **more), std=0.2)


def logits(model, batch=None):
    with torch.no_grad():
        return model(**(batch or zoo.batch(LENGTHS))).logits


PROGRAMS = [
    dp.LayerProgram([0, 1, 2, 1, 2]), dp.LayerProgram([2, 0]), dp.IntraLayerRecurrence([2, 1, 3]),
    dp.Loop(start=1, end=2, times=3, kv="first"), [dp.Skip(0), dp.Taps(at=[1], head=True)],
]


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2"])
def test_switching_captures_nothing_and_gives_what_a_fresh_transform_gives(name, captures):
    stock = stock_of(name)
    model = dp.transform(stock, dp.Identity())
    want = logits(model)
    assert torch.equal(want, logits(stock))
    kept = {n: id(p) for n, p in model.named_parameters()}
    count = len(captures)
    actual = [logits(dp.switch(model, spec)) for spec in PROGRAMS]
    assert torch.equal(logits(dp.switch(model, dp.Identity())), want)
    plans = list(model._depth.plans.kept.values())
    for spec, got in zip(PROGRAMS, actual):
        assert torch.equal(logits(dp.switch(model, spec)), got)
    assert list(model._depth.plans.kept.values()) != plans and set(plans) == set(model._depth.plans.kept.values())
    assert len(captures) == count and {n: id(p) for n, p in model.named_parameters()} == kept
    for spec, got in zip(PROGRAMS, actual):
        assert torch.equal(logits(dp.transform(stock, spec)), got)
        assert (got - want).abs().max() > 1e-3
    assert str(model.depth) == str(model.depth_program)


def test_set_loops_keeps_optimizer_state_and_parameters(captures):
    stock = stock_of()
    model = dp.transform(stock, dp.Loop(start=1, end=3, times=1, inject="concat"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batch = zoo.batch([6, 6])
    ids = {n: id(p) for n, p in model.named_parameters()}

    def step():
        optimizer.zero_grad()
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        optimizer.step()
        return loss.detach()

    step()
    state = {id(p): s["exp_avg"] for p, s in optimizer.state.items()}
    count = len(captures)
    for times in (3, 2, 5, 1):
        assert dp.set_loops(model, times) is model and dp.loops_of(model) == times
        assert len(model.depth_program.visits) == 1 + 2 * times
        assert model.config.depthpass["spec"] == model.depth_spec == dp.dump_spec(
            dp.Loop(start=1, end=3, times=times, inject="concat"))
        step()
    assert len(captures) == count
    assert {n: id(p) for n, p in model.named_parameters()} == ids
    assert all(optimizer.state[p]["exp_avg"] is state[id(p)] for p in model.parameters())
    assert {int(s["step"]) for s in optimizer.state.values()} == {5}


def test_one_iteration_has_the_loss_of_the_base_bit_for_bit():
    stock = stock_of("qwen2")
    model = dp.transform(stock, dp.Loop(start=0, end=2, times=4, inject="add", damped=True))
    batch = zoo.batch([7, 7])
    batch["labels"] = batch["input_ids"]
    want = stock.train()(**batch).loss
    want.backward()
    grads = {n: p.grad.clone() for n, p in stock.named_parameters()}
    stock.zero_grad()
    model.train()
    assert not torch.equal(model(**batch).loss, want)
    loss = dp.set_loops(model, 1)(**batch).loss
    loss.backward()
    assert torch.equal(loss, want)
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.grad, grads[n], msg=n)


def test_loops_of_one_name_are_told_apart_by_their_place():
    model = dp.transform(stock_of(), [dp.Loop(0, 1, times=2), dp.Loop(1, 2, times=3)])
    with pytest.raises(dp.SpecError, match=r"loops_of: expected a spec with one loop, got 2 .*scope=, its index .* one of 0, 1"):
        dp.loops_of(model)
    assert dp.loops_of(dp.set_loops(model, 4, scope=1), scope=1) == 4 and dp.loops_of(model, scope=0) == 2


def test_through_peft_and_with_several_loops():
    peft = pytest.importorskip("peft")
    spec = [dp.Loop(start=1, end=2, times=2, lora_rank=2, scope="inner"), dp.Repeat(0, 1, times=1), dp.Taps(at=[0])]
    base = dp.transform(stock_of(), spec)
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["depth"]))
    enliven(model.get_base_model().depth, seed=2, least=1)
    before = logits(model)
    with pytest.raises(dp.SpecError, match=r"expected a spec with one loop, got 2 .*scope=, one of 'inner', 'repeat'"):
        dp.set_loops(model, 3)
    with pytest.raises(dp.SpecError, match=r"got 'iner'. Did you mean 'inner'"):
        dp.set_loops(model, 3, scope="iner")
    dp.set_loops(model, 2, scope="repeat")
    assert [o["index"] for o in base.depth_program.visits] == [0, 0, 1, 1, 2] and dp.loops_of(model, scope=0) == 2
    assert not torch.equal(logits(model), before)
    dp.set_loops(dp.set_loops(model, 1, scope=1), 1, scope="inner")
    fewer = logits(model)
    assert not torch.equal(fewer, before)
    assert torch.equal(logits(dp.set_loops(model, 2, scope="loop")), before)
    with pytest.raises(dp.SpecError, match=r"inner.t2.v1.lora.*made without.*made with loop"):
        dp.set_loops(model, 3, scope="inner")
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    ("spec", "times", "word"),
    [
        (dp.Identity(), 2, "set_loops: expected a spec with a loop, got identity"),
        (dp.Loop(0, 1, 2), 0, r"loop.times: expected .*at least 1"),
        (dp.Loop(0, 1, 2), True, "loop.times"),
        (dp.Loop(0, 1, 2), 2.5, "loop.times"),
        (dp.IntraLayerRecurrence([1, 2, 1]), [1, 2], "one count for each of the 3 visits"),
        (dp.ParallelLoop(loops=2), 0, "parallel_loop.loops"),
    ],
)
def test_loop_counts_that_cannot_be(spec, times, word):
    model = dp.transform(zoo.model("llama", 3), spec)
    before = str(model.depth_program)
    with pytest.raises((dp.SpecError, dp.PassError), match=word):
        dp.set_loops(model, times)
    assert str(model.depth_program) == before
    with pytest.raises(dp.SpecError, match="expected a transformed model, got a stock Llama"):
        dp.set_loops(dp.restore(model), 2)


def test_counts_of_other_passes():
    model = dp.transform(stock_of(), dp.IntraLayerRecurrence([1, 1, 1]))
    want = logits(model)
    dp.set_loops(model, [3, 1, 1])
    assert [o["index"] for o in model.depth_program.visits] == [0, 0, 0, 1, 2]
    assert torch.equal(logits(dp.set_loops(model, 1)), want)
    plt = dp.transform(stock_of(), dp.ParallelLoop(loops=2, window=2))
    want = logits(plt)
    assert len(dp.set_loops(plt, 3).depth_program.visits) == 9
    assert torch.equal(logits(dp.set_loops(plt, 2)), want)


def test_a_cache_of_another_program_is_refused_and_switching_back_takes_it():
    model = dp.transform(stock_of(), dp.Identity())
    ids = zoo.batch([6, 6])["input_ids"]
    cache = dp.DepthCache(model)
    with torch.no_grad():
        model(input_ids=ids[:, :4], past_key_values=cache)
        with dp.using(model, dp.LayerProgram([0, 1, 1, 2])):
            with pytest.raises(dp.CacheError, match=r"4 tokens of another program .*3 visits.*now 4 visits"):
                model(input_ids=ids[:, 4:5], past_key_values=cache)
            mine = dp.DepthCache(model)
            model(input_ids=ids[:, :4], past_key_values=mine)
        got = model(input_ids=ids[:, 4:], past_key_values=cache).logits
        torch.testing.assert_close(got, model(input_ids=ids).logits[:, 4:], rtol=1e-5, atol=1e-5)
        with pytest.raises(dp.CacheError, match="another program"):
            model(input_ids=ids[:, 4:5], past_key_values=mine)
        # Another spec that makes the same program may go on.
        with dp.using(model, dp.Repeat(1, 2, times=2)):
            model(input_ids=ids[:, 4:5], past_key_values=mine)
        mine.reset()
        model(input_ids=ids, past_key_values=mine)


def test_generation_inside_using_is_that_of_a_model_of_its_own():
    stock = stock_of()
    model = dp.transform(stock, dp.Identity())
    batch = zoo.batch(LENGTHS)
    settings = {"max_new_tokens": 5, "do_sample": False, "num_beams": 2}
    want = stock.generate(**batch, **settings)
    for spec in PROGRAMS[:3]:
        with dp.using(model, spec):
            got = model.generate(**batch, **settings)
        assert torch.equal(got, dp.transform(stock, spec).generate(**batch, **settings))
        assert torch.equal(model.generate(**batch, **settings), want)


def test_using_nests_and_threads_do_not_see_each_other():
    model = dp.transform(stock_of(), dp.Identity())
    specs = [dp.Identity(), *PROGRAMS[:3]]
    want = []
    for spec in specs:
        with dp.using(model, spec):
            want.append(logits(model))
            with dp.using(model, dp.Identity()):
                assert torch.equal(logits(model), want[0])
            assert torch.equal(logits(model), want[-1])
            with pytest.raises(dp.SpecError, match="would end with it"):
                dp.switch(model, dp.Identity())
    actual, barrier = [None] * len(specs), threading.Barrier(len(specs))

    def run(i):
        with dp.using(model, specs[i]):
            barrier.wait(timeout=60)
            actual[i] = [logits(model) for _ in range(3)]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(specs))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(torch.equal(g, w) for got, w in zip(actual, want) for g in got)


def test_save_keeps_the_spec_in_force_and_every_parameter(tmp_path):
    model = dp.transform(stock_of(), dp.Loop(start=1, end=2, times=3, lora_rank=2))
    enliven(model.depth, seed=4, least=1)
    three = logits(model)
    dp.set_loops(model, 2)
    two = logits(model)
    model.save_pretrained(tmp_path / "two")
    with dp.using(model, dp.Identity()):
        one = logits(model)
        model.save_pretrained(tmp_path / "one")
    assert model.config.depthpass == {"spec": model.depth_spec}
    loaded = dp.from_pretrained(tmp_path / "two")
    assert dp.loops_of(loaded) == 2 and torch.equal(logits(loaded), two)
    assert torch.equal(logits(dp.set_loops(loaded, 3)), three)
    again = dp.from_pretrained(tmp_path / "one")
    assert torch.equal(logits(again), one) and torch.equal(logits(dp.switch(again, model.depth_spec)), two)
    loaded.save_pretrained(tmp_path / "three")
    assert "parameters" not in loaded.config.depthpass
    assert torch.equal(logits(dp.from_pretrained(tmp_path / "three")), three)


def test_copies_and_reports_follow_the_switch():
    import copy
    import pickle

    model = dp.transform(stock_of(), dp.Loop(start=1, end=2, times=2))
    dp.set_loops(model, 4)
    assert dp.report(model, seq_len=8, cost=False).depth_at(8) == 6
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), logits(model))
        dp.set_loops(twin, 1)
        assert dp.loops_of(model) == 4 and torch.equal(logits(twin), logits(dp.restore(model)))
    with dp.using(model, dp.Identity()):
        assert dp.report(model, seq_len=8, cost=False).depth_at(8) == 3
