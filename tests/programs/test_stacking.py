"""Stacked steps on stock models: equal to the same calls unstacked and to scoring, in float64."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import zoo
from depthpass_lowering.visits import stacked
from turbos import enliven

import depthpass as dp
from depthpass.ir.text import parse_program
from depthpass.passes import registry
from depthpass.passes.base import Pass

HAND_WRITTEN = """
program LlamaForCausalLM blocks=3 width=32 visits=6 slots=5
  %0 = embed
  %1 = block 0 (%0) slot 0
  %2 = block 1 (%1) slot 1
  %3 = block 2 (%2) slot 2
  %4 = delay 2 (%2)
  %5 = add (%0, %4)
  %6 = block 1 (%5) slot 3 keys 1
  %7 = block 2 (%6) slot 4
  %8 = delay 3 (%7)
  %9 = add (%3, %7, %8)
  %10 = block 0 (%9) slot 5
  output %10
"""


@dataclass(frozen=True)
class Written(Pass):
    """A program written by hand."""

    name: ClassVar[str] = "written_by_hand"

    def apply(self, program, ctx):
        return parse_program(HAND_WRITTEN)


PROGRAMS = {
    "paper": dp.ParallelLoop(loops=3, window=3),
    "hidden_gates": dp.ParallelLoop.loopcoder_v2(window=2),
    "long_window": dp.ParallelLoop(loops=2, window=64, shift=2),
    "own_keys": dp.ParallelLoop(loops=2, kv="own", shift=3),
    "first_keys": dp.ParallelLoop(loops=3, kv="first"),
    "with_feedback": [dp.ParallelLoop(loops=2, window=3), dp.TurboConn(bridges=[(2, 0), (5, 3)], group=2, rank=3)],
}


@pytest.fixture
def calls(monkeypatch):
    """Members of every stacked call."""
    seen, real = [], stacked.StackedVisit.__init__

    def count(self, stack, *rest):
        seen.append(len(stack.visits))
        real(self, stack, *rest)

    monkeypatch.setattr(stacked.StackedVisit, "__init__", count)
    return seen


def pair(name, spec, **overrides):
    """One model stacked and unstacked, with the same random parameters."""
    stock = enliven(zoo.model(name, 3, dtype=torch.float64, **overrides), std=0.2)
    models = [dp.transform(stock, spec, stack=stack) for stack in (True, False)]
    for model in models:
        enliven(model.depth, seed=1, std=0.3, least=1 if len(list(model.depth.parameters())) else 0)
    return models


def split(model, batch, sizes, record=False):
    """Logits of a batch fed in pieces, and the cache."""
    cache, pieces, end = dp.DepthCache(model, record=record), [], 0
    for count in sizes:
        start, end = end, end + count
        pieces.append(model(
            input_ids=batch["input_ids"][:, start:end], attention_mask=batch["attention_mask"][:, :end],
            past_key_values=cache,
        ).logits)
    return torch.cat(pieces, 1), cache


def state(cache):
    slots, lines = (sorted(x.items()) for x in (cache.state.slots, cache.state.lines))
    return [t for _, slot in slots for t in (*slot.keys, *slot.values)] + [t for _, t in lines]


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("lengths", [[9, 9], [9, 5, 7]])
@torch.no_grad()
def test_every_split_into_steps_equals_unstacked_and_scoring(program, lengths, calls):
    one, other = pair("llama", PROGRAMS[program])
    batch = zoo.batch(lengths)
    real = batch["attention_mask"].bool()
    want = other(**batch).logits
    for sizes in ([1] * 9, [5, 1, 1, 2], [2, 2, 3, 1, 1]):
        calls.clear()
        got, cache = split(one, batch, sizes)
        assert calls
        calls.clear()
        plain, reference = split(other, batch, sizes)
        assert not calls
        torch.testing.assert_close(got[real], plain[real], rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(got[real], want[real], rtol=1e-9, atol=1e-9)
        for a, b in zip(state(cache), state(reference), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@torch.no_grad()
def test_a_hand_written_program(calls, monkeypatch):
    monkeypatch.setitem(registry._registered, Written.name, Written)
    one, other = pair("llama", Written())
    assert [(s.tokens, [x.index for x in s.stacks]) for s in one.depth_schedule.stacked] == [(2, [1, 2]), (8, [2])]
    batch = zoo.batch([9, 6])
    real = batch["attention_mask"].bool()
    want = other(**batch).logits[real]
    for sizes, count in (([1] * 9, 18), ([3, 2, 4], 4)):
        calls.clear()
        torch.testing.assert_close(split(one, batch, sizes)[0][real], want, rtol=1e-9, atol=1e-9)
        assert len(calls) == count


@pytest.mark.parametrize("name", ["qwen3", "gpt2", "gemma3_text", "mixtral", "llama4_text"])
@torch.no_grad()
def test_other_models(name, calls):
    one, other = pair(name, dp.ParallelLoop(loops=3, window=3))
    batch = zoo.batch([8, 5])
    real = batch["attention_mask"].bool()
    want = other(**batch).logits[real]
    got = split(one, batch, [4, 1, 1, 1, 1])[0][real]
    assert calls == [3] * 12
    # Llama 4 rotates queries and keys in float32.
    limit = 1e-6 if name == "llama4_text" else 1e-9
    torch.testing.assert_close(got, want, rtol=limit, atol=limit)
    torch.testing.assert_close(got, split(other, batch, [4, 1, 1, 1, 1])[0][real], rtol=limit, atol=limit)


@torch.no_grad()
def test_off_for_many_tokens_for_gradients_and_on_request(calls):
    one, other = pair("llama", dp.ParallelLoop(loops=2, window=3))
    ids = zoo.batch([6, 6])["input_ids"]
    one(input_ids=ids), one(input_ids=ids[:, :2])
    other(input_ids=ids[:, :1])
    with torch.enable_grad():
        one(input_ids=ids[:, :1])
    assert not calls
    one(input_ids=ids[:, :1])
    assert calls == [2, 2, 2]


@torch.no_grad()
def test_a_state_can_be_continued_twice():
    """Keys grow in place, but what an earlier state sees does not change."""
    model, _ = pair("llama", dp.ParallelLoop(loops=2, window=3))
    ids = zoo.batch([8])["input_ids"]
    cache = dp.DepthCache(model)
    model(input_ids=ids[:, :5], past_key_values=cache), model(input_ids=ids[:, 5:6], past_key_values=cache)
    kept = cache.state
    before = [t.clone() for t in state(cache)]
    first = model(input_ids=ids[:, 6:7], past_key_values=cache).logits
    cache.state = kept
    model(input_ids=ids[:, 7:], past_key_values=cache)
    cache.state = kept
    assert all(torch.equal(a, b) for a, b in zip(state(cache), before, strict=True))
    assert torch.equal(model(input_ids=ids[:, 6:7], past_key_values=cache).logits, first)


@torch.no_grad()
def test_crop_and_beams():
    one, other = pair("llama", dp.ParallelLoop(loops=3, window=3))
    batch = zoo.batch([9, 9])
    want = other(**batch).logits
    _, cache = split(one, batch, [3] + [1] * 6, record=True)
    cache.crop(4)
    got = [one(input_ids=batch["input_ids"][:, i : i + 1], past_key_values=cache).logits for i in range(4, 9)]
    torch.testing.assert_close(torch.cat(got, 1), want[:, 4:], rtol=1e-9, atol=1e-9)
    for lengths in ([6, 4], [2, 2]):
        prompt = zoo.batch(lengths)
        options = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "eos_token_id": None}
        assert torch.equal(one.generate(**prompt, **options), other.generate(**prompt, **options, use_cache=False))


def test_a_cache_made_in_inference_mode_goes_on_outside():
    model, _ = pair("llama", dp.ParallelLoop(loops=2, window=3))
    ids = zoo.batch([7])["input_ids"]
    cache = dp.DepthCache(model)
    with torch.inference_mode():
        model(input_ids=ids[:, :4], past_key_values=cache), model(input_ids=ids[:, 4:5], past_key_values=cache)
    with torch.no_grad():
        model(input_ids=ids[:, 5:6], past_key_values=cache)
        last = model(input_ids=ids[:, 6:], past_key_values=cache).logits
        torch.testing.assert_close(last, model(input_ids=ids).logits[:, -1:], rtol=1e-9, atol=1e-9)
