"""What changes after the first call counts: a transformed model stays what ``restore`` gives, or refuses as it would before."""

import functools
import importlib
import os
import types
from collections import deque
from contextvars import ContextVar

import numpy
import pytest
import torch
import zoo
from captured_once import captured_once
from torch import nn
from turbos import GROUP, enliven, turbo_of

import depthpass as dp
from depthpass.errors import UnsupportedModelError

IDS = zoo.batch([9, 9], seed=5)["input_ids"]


def pair(name, **more):
    """A transformed model that was called once, and what the transform took it from."""
    transformed = dp.transform(enliven(zoo.model(name, 2, **more), least=1), dp.Identity())
    call(transformed)
    return transformed


def shared_pair(name):
    """The same. Equal models share this capture: nothing has changed yet, and what a test changes is captured anew."""
    with captured_once():
        return pair(name)


def call(model, **more):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False, **more)


def agrees(transformed):
    torch.testing.assert_close(call(transformed).logits, call(dp.restore(transformed)).logits)


def every(model, name, value):
    actual = [m for m in model.modules() if name in m.__dict__]
    assert actual
    for module in actual:
        setattr(module, name, value)


def set_config(name, value):
    def change(model):
        assert getattr(model.config, name) != value
        setattr(model.config, name, value)

    return change


def set_attribute(name, value):
    return lambda model: every(model, name, value)


def new_bias(model):
    up = model.model.layers[1].mlp.up_proj
    up.bias = nn.Parameter(torch.randn(up.out_features, generator=torch.Generator().manual_seed(3)))


def dropped_bias(model):
    assert model.model.layers[0].self_attn.q_proj.bias is not None
    model.model.layers[0].self_attn.q_proj.bias = None


def wrapped_forward(model):
    mlp = model.model.layers[1].mlp
    forward = mlp.forward
    mlp.forward = functools.wraps(forward)(lambda h: 2 * forward(h))


def method_forward(model):
    mlp = model.model.layers[0].mlp
    mlp.forward = types.MethodType(lambda self, h: self.down_proj(torch.tanh(self.up_proj(h))), mlp)


def partial_forward(model):
    norm = model.model.layers[1].post_attention_layernorm
    norm.forward = functools.partial(lambda f, h: f(h) + 1, norm.forward)


class TwiceTheMlp(importlib.import_module("transformers.models.llama.modeling_llama").LlamaMLP):
    def forward(self, x):
        return 2 * super().forward(x)


def class_swap(model):
    model.model.layers[1].mlp.__class__ = TwiceTheMlp


def other_activation(model):
    model.model.layers[0].mlp.act_fn = nn.Tanh()


def other_module(model):
    attention = model.model.layers[1].self_attn
    attention.o_proj = enliven(nn.Linear(attention.o_proj.in_features, attention.o_proj.out_features), seed=7)


def halved_rotary(model):
    rotary = model.model.rotary_emb
    rotary.attention_scaling = 0.5


def in_a_container(model):
    model.config.layer_types[0] = "full_attention"


class Slotted:
    """What has no ``__dict__``, with a property in front; a counter of its own that is no change."""

    __slots__ = ("_by", "asked")

    def __init__(self):
        self._by, self.asked = 1.0, 0

    @property
    def by(self):
        self.asked += 1
        return self._by


class Outside(nn.Module):
    """A module that no tree holds."""

    def forward(self, x):
        return x * self.by


SLOTTED, QUEUE, OUTSIDE, ARRAY, CONTEXT = Slotted(), deque([1.0]), Outside(), numpy.ones(2), ContextVar("by", default=1.0)
SCALE, OUTSIDE.by = torch.ones(()), 1.0


@functools.lru_cache
def cached():
    return FACTORS["cached"]


def tagged(x):
    return x * tagged.by


tagged.by = 1.0
FACTORS, GLOBAL, COUNTED = {"list": [1.0], "dict": {"x": 1.0}, "cached": 1.0}, 1.0, 0


class Held:
    factor = 1.0

    def __init__(self):
        self.own, self.tensor, self.asked, self.inner = 1.0, torch.ones(()), 0, types.SimpleNamespace(by=1.0, seen=[])
        self.log, self.steps = [], {}

    def __call__(self, x):
        global COUNTED
        self.asked, COUNTED = self.asked + 1, COUNTED + 1
        return x * self.own * self.factor * self.tensor * self.inner.by


def factor(x, by=(lambda: FACTORS["dict"]["x"], [1.0])):
    return x * FACTORS["list"][0] * by[0]() * by[1][0] * GLOBAL


def closed_over():
    state = {"by": 1.0}
    return lambda x: state["by"] * x


class HeldMlp(importlib.import_module("transformers.models.llama.modeling_llama").LlamaMLP):
    """Reads everything that Python lets a forward read."""

    by_class = [1.0]

    def forward(self, x):
        return factor(self.closed(self.held(super().forward(x)))) * self.by_class[0] * self.names.k * self.loose


def held_model():
    stock = enliven(zoo.model("llama", 2), least=1)
    for layer in stock.model.layers:
        layer.mlp.__class__ = HeldMlp
        layer.mlp.held, layer.mlp.closed, layer.mlp.names = Held(), closed_over(), types.SimpleNamespace(k=1.0)
        layer.mlp.loose = torch.ones(())
    return dp.transform(stock, dp.Identity())


def test_what_a_forward_reads_through_objects_and_globals_counts(captures, monkeypatch):
    transformed = held_model()
    mlp, held = transformed.model.layers[1].mlp, transformed.model.layers[0].mlp.held
    call(transformed)
    call(transformed)
    assert len(captures) == 1  # what the forward itself counts up is no change
    changes = [
        lambda: HeldMlp.by_class.__setitem__(0, 2.0), lambda: FACTORS["list"].__setitem__(0, 2.0), lambda: mlp.loose.mul_(2),
        lambda: FACTORS["dict"].__setitem__("x", 2.0), lambda: factor.__defaults__[0][1].__setitem__(0, 2.0),
        lambda: mlp.closed.__closure__[0].cell_contents.__setitem__("by", 2.0), lambda: setattr(mlp.names, "k", 2.0),
        lambda: setattr(Held, "factor", 2.0), lambda: held.tensor.mul_(2), lambda: monkeypatch.setitem(globals(), "GLOBAL", 2.0),
        lambda: setattr(mlp, "forward", functools.partial(lambda f, x: f(x) * GLOBAL * FACTORS["list"][0], mlp.forward)),
        lambda: FACTORS["list"].__setitem__(0, 0.5), lambda: setattr(held.inner, "by", 2.0),
    ]
    for change in changes:
        before = call(transformed).logits
        change()
        agrees(transformed)
        assert not torch.allclose(call(transformed).logits, before, atol=1e-4)
    counted = len(captures)
    held.log.append(call(transformed).loss)  # beside what is read; no code of the model mentions them
    held.inner.seen.append(1)
    held.steps["now"], held.note = 1, "new"
    call(transformed)
    assert len(captures) == counted


class OddMlp(importlib.import_module("transformers.models.llama.modeling_llama").LlamaMLP):
    """Reads what keeps its values elsewhere than in a ``__dict__``."""

    def forward(self, x):
        x = tagged(OUTSIDE(super().forward(x))) * SLOTTED.by * QUEUE[0] * ARRAY[0] * CONTEXT.get() * cached()
        return x * float(os.environ.get("DEPTHPASS_TEST", "1")) * (2 if SCALE.item() > 1 else 1)


def test_what_is_kept_in_slots_arrays_caches_and_the_environment_counts(captures, monkeypatch):
    stock = enliven(zoo.model("llama", 1), least=1)
    stock.model.layers[0].mlp.__class__ = OddMlp
    transformed = dp.transform(stock, dp.Identity())
    call(transformed)
    call(transformed)
    assert len(captures) == 1  # what the forward itself counts up is no change
    for change in (
        lambda: monkeypatch.setattr(SLOTTED, "_by", 2.0), lambda: QUEUE.appendleft(2.0), lambda: ARRAY.fill(2.0),
        lambda: CONTEXT.set(2.0), lambda: (FACTORS.update(cached=2.0), cached.cache_clear()), lambda: SCALE.fill_(2.0),
        lambda: monkeypatch.setenv("DEPTHPASS_TEST", "2"), lambda: setattr(tagged, "by", 2.0),
        lambda: setattr(OUTSIDE, "by", 2.0),
    ):
        before = call(transformed).logits
        change()
        agrees(transformed)
        assert not torch.allclose(call(transformed).logits, before, atol=1e-4)


@pytest.mark.parametrize("read", [
    lambda held: sum(vars(held).values()), lambda held: getattr(held, "yb"[::-1]),
    lambda held: next(iter(held.__dict__.values())),
], ids=["vars", "getattr", "dict"])
def test_attributes_read_without_their_name_count(read, monkeypatch):
    held = types.SimpleNamespace(by=1.0)
    stock = enliven(zoo.model("llama", 2), least=1)
    stock.model.layers[0].mlp.__class__ = type("ReadMlp", (type(stock.model.layers[0].mlp),), {
        "forward": lambda self, x: super(type(self), self).forward(x) * read(held)})
    transformed = dp.transform(stock, dp.Identity())
    before = call(transformed).logits
    held.by = 3.0
    agrees(transformed)
    assert not torch.allclose(call(transformed).logits, before, atol=1e-4)


CHANGES = {
    "llama": {
        "another class": class_swap,
        "another activation": other_activation,
        "another linear": other_module,
        "a bias where there was none": new_bias,
        "a wrapped forward inside a block": wrapped_forward,
        "a forward bound to a module": method_forward,
        "a partial forward of a norm": partial_forward,
        "scale of rotary tables": halved_rotary,
        "eps of norms": set_attribute("variance_epsilon", 0.5),
    },
    "qwen2": {"scale of attention": set_attribute("scaling", 0.7), "no bias where there was one": dropped_bias},
    "gemma2": {
        "softcap of attention": set_attribute("attn_logit_softcapping", 0.5),
        "softcap of logits": set_config("final_logit_softcapping", 0.3),
    },
    "granite": {
        "scale of logits": set_config("logits_scaling", 4.0),
        "scale of embeddings": set_attribute("embedding_multiplier", 3.0),
        "scale of residuals": set_attribute("residual_multiplier", 0.1),
    },
    "cohere": {"scale of logits": set_attribute("logit_scale", 3.0)},
    "mistral": {"window in the config": set_config("sliding_window", 2)},
    "gemma3_text": {"kinds of layers": in_a_container},
    "mixtral": {"experts per token": set_attribute("top_k", 1)},
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_after_the_first_call_count(name):
    transformed = shared_pair(name)
    for what, change in CHANGES[name].items():
        before = call(transformed).logits
        change(transformed)
        agrees(transformed)
        assert not torch.allclose(call(transformed).logits, before, atol=1e-3), f"{what}: the change has to matter"


def test_tied_tensors_count_as_two_once_they_are(captures):
    """A trace reads a tensor that stands in several places at the first one; where they part, each place has its own."""
    stock = enliven(zoo.model("llama", 2), least=1)
    first, second = stock.model.layers
    ties = [(second.self_attn.q_proj, first.self_attn.o_proj), (first.post_attention_layernorm, first.input_layernorm),
            (stock.model.norm, second.input_layernorm)]
    for one, other in ties:
        one.weight = other.weight
    transformed = dp.transform(stock, dp.Identity())
    tied = call(transformed).logits
    agrees(transformed)
    first, second = transformed.model.layers
    for one in (second.self_attn.q_proj, first.post_attention_layernorm, transformed.model.norm):
        whole, before = one.weight, call(transformed).logits
        one.weight = nn.Parameter(-whole.detach())
        assert (call(transformed).logits - before).abs().max() > 1e-2
        agrees(transformed)
        transformed.zero_grad()
        transformed(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        got = {n: p.grad for n, p in transformed.named_parameters()}
        transformed.zero_grad()
        dp.restore(transformed)(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        for n, p in transformed.named_parameters():
            torch.testing.assert_close(got[n], p.grad)
        one.weight = whole
        count = len(captures)
        assert torch.equal(call(transformed).logits, tied) and len(captures) == count


def test_a_change_counts_in_every_program_and_is_taken_back():
    stock = enliven(zoo.model("llama", 3))
    transformed = turbo_of(stock, bridges=[(2, 0)])
    with captured_once():
        first = call(transformed).logits
    norms = [m for m in transformed.modules() if hasattr(m, "variance_epsilon")]
    kept = norms[0].variance_epsilon
    for norm in norms:
        norm.variance_epsilon = 0.5
    fresh = turbo_of(dp.restore(transformed), bridges=[(2, 0)])
    fresh.depth.load_state_dict(transformed.depth.state_dict())
    assert transformed.depth_program == fresh.depth_program and GROUP == 3
    torch.testing.assert_close(call(transformed).logits, call(fresh).logits)
    for norm in norms:
        norm.variance_epsilon = kept
    assert torch.equal(call(transformed).logits, first)


def test_the_loss_function_counts():
    transformed = shared_pair("llama")
    call(transformed, labels=IDS)
    transformed.loss_function = lambda logits, labels, vocab_size, **_: logits.square().mean()
    assert torch.equal(call(transformed, labels=IDS).loss, call(dp.restore(transformed), labels=IDS).loss)


@pytest.mark.parametrize("tokens", [102, 194])
def test_resized_tied_embeddings_give_the_stock_loss(tokens):
    transformed = dp.transform(enliven(zoo.model("llama", 2, tie_word_embeddings=True)), dp.Identity())
    with captured_once():
        call(transformed, labels=IDS)
    transformed.resize_token_embeddings(tokens, mean_resizing=False)
    torch.testing.assert_close(call(transformed, labels=IDS).loss, call(dp.restore(transformed), labels=IDS).loss)
    transformed(input_ids=IDS, labels=IDS).loss.backward()
    assert transformed.get_input_embeddings().weight.grad.shape[0] == tokens


def test_attention_dropout_counts():
    transformed = dp.transform(enliven(zoo.model("llama", 2)), dp.Identity()).train()
    with captured_once():
        call(transformed)
    every(transformed, "attention_dropout", 0.5)
    assert not torch.equal(call(transformed).logits, call(transformed).logits)
    torch.manual_seed(0)
    mine = call(transformed).logits
    torch.manual_seed(0)
    assert torch.equal(mine, call(dp.restore(transformed)).logits)


def test_bidirectional_attention_is_refused_after_a_call_as_before_it():
    transformed = shared_pair("llama")
    every(transformed, "is_causal", False)
    with pytest.raises(UnsupportedModelError, match="is_causal=False"):
        call(transformed)
    every(transformed, "is_causal", True)
    agrees(transformed)


def test_a_saved_model_is_the_one_that_ran(tmp_path):
    transformed = shared_pair("mistral")
    transformed.config.sliding_window = 2
    transformed.save_pretrained(tmp_path)
    assert torch.equal(call(transformed).logits, call(dp.from_pretrained(tmp_path)).logits)


def test_a_class_and_a_function_that_are_patched_count(monkeypatch):
    from transformers.models.llama import modeling_llama

    transformed = shared_pair("llama")
    first = call(transformed).logits
    rotate = modeling_llama.apply_rotary_pos_emb
    with monkeypatch.context() as patch:
        patch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda q, k, cos, sin, *a, **b: rotate(2 * q, k, cos, sin, *a, **b))
        agrees(transformed)
        assert not torch.allclose(call(transformed).logits, first)
    forward = modeling_llama.LlamaMLP.forward
    with monkeypatch.context() as patch:
        patch.setattr(modeling_llama.LlamaMLP, "forward", lambda self, x: 3 * forward(self, x))
        agrees(transformed)
        assert not torch.allclose(call(transformed).logits, first)
    linear, attention = nn.functional.linear, nn.functional.scaled_dot_product_attention
    for name, other in {  # as libraries of kernels replace them
        "silu": lambda x, inplace=False: x.relu(), "linear": lambda *a: 2 * linear(*a),
        "scaled_dot_product_attention": lambda *a, **b: 2 * attention(*a, **b),
    }.items():
        with monkeypatch.context() as patch:
            patch.setattr(nn.functional, name, other)
            agrees(transformed)
            assert not torch.allclose(call(transformed).logits, first)
    assert torch.equal(call(transformed).logits, first)


def test_hooks_of_all_modules_are_refused_by_name_and_torchs_own_are_not():
    transformed = shared_pair("llama")

    def times(module, args, output):
        return output * 1.5 if type(module).__name__ == "LlamaMLP" else None

    handle = nn.modules.module.register_module_forward_hook(times)
    try:
        with pytest.raises(UnsupportedModelError, match="times is a hook of all modules"):
            call(transformed)
    finally:
        handle.remove()
    with torch.utils.module_tracker.ModuleTracker():
        agrees(transformed)


@pytest.mark.filterwarnings("ignore:hooks on or in block:UserWarning")
def test_a_wrapped_block_runs_its_wrapper_at_every_visit():
    transformed = turbo_of(enliven(zoo.model("llama", 3)), bridges=[(2, 0)])
    with captured_once():
        call(transformed)
    block, seen = transformed.model.layers[1], []
    forward = block.forward

    def counted(hidden, *args, **kwargs):
        seen.append(hidden.shape[1])
        return forward(hidden, *args, **kwargs)

    block.forward = counted
    call(transformed)
    assert sum(seen) == IDS.shape[1]


# What is no change -----------------------------------------------------------------------------------------------


def test_what_no_capture_depends_on_captures_nothing(captures):
    transformed = pair("llama")
    assert len(captures) == 1
    for step in range(3):
        transformed.global_step = step
        transformed.config.use_cache = bool(step % 2)
        transformed.generation_config.max_length = 20 + step
        transformed.model.layers[0].note = f"step {step}"
        with torch.no_grad():
            for p in transformed.parameters():
                p.mul_(1.01)
        transformed.lm_head.weight.data = transformed.lm_head.weight.data.clone()
        call(transformed)
    assert len(captures) == 1
    agrees(transformed)


def test_generating_looks_at_one_watch():
    transformed = turbo_of(enliven(zoo.model("llama", 3)), bridges=[(2, 0)])
    transformed.generate(IDS, max_new_tokens=2, do_sample=False)
    watch = transformed._depth.watches[-1]
    transformed.generate(IDS, max_new_tokens=3, do_sample=False)
    assert transformed._depth.watches[-1] is watch


def test_training_and_evaluation_take_turns_without_new_watches_or_captures(captures):
    transformed = pair("llama")
    kept = set()
    for step in range(20):
        transformed.train(step % 2 == 0)
        call(transformed)
        if step > 1:
            kept.add(id(transformed._depth.watches[-1]))
    assert len(kept) == 2 and len(captures) == 2


def test_old_states_of_a_model_are_forgotten(monkeypatch):
    from depthpass.hf import captured
    from depthpass.hf.modules import watch

    monkeypatch.setattr(captured, "KEPT", 2)
    transformed = shared_pair("llama")
    for step in range(6):
        every(transformed, "variance_epsilon", 0.1 * (step + 1))
        agrees(transformed)
    assert len(transformed._depth.captures) == 2 and len(transformed._depth.watches) <= watch.KEPT
    alive = [c for c in transformed._depth.captures.values()]
    owners = {id(o) for c in alive for o in (c.prologue, c.norm, c.head, *c.blocks)}
    assert set(transformed._depth.bindings) <= owners
