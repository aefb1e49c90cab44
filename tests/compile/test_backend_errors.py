"""What the backend cannot honour is refused before anything runs, with what to do instead."""

import importlib.metadata
import tomllib
from pathlib import Path

import pytest
import torch
import zoo
from depthpass_lowering.backend.dynamo import Options, depthpass_backend, planned
from transformers import DynamicCache

import depthpass as dp

SPEC = dp.TurboConn(bridges=[(1, 0)], group=3, rank=2)
Failed = torch._dynamo.exc.BackendCompilerFailed


# Dynamo itself reads .grad of what one piece of a broken graph hands to the next.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def attached(**overrides):
    return dp.attach(zoo.model("llama", layers=2, **overrides), SPEC)


def call(model, batch=None, dynamic=None, **arguments):
    batch = zoo.batch([6, 4]) if batch is None else batch
    for tensor in batch.values() if dynamic is None else ():
        torch._dynamo.maybe_mark_dynamic(tensor, [0, 1])
    options = arguments.pop("options", None)
    compiled = torch.compile(model, backend=depthpass_backend, options=options, dynamic=dynamic)
    return compiled(**batch, **{"use_cache": False, **arguments})


def test_the_entry_point_is_the_backend():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    value = project["entry-points"]["torch_dynamo_backends"]["depthpass"]
    assert importlib.metadata.EntryPoint("depthpass", value, "torch_dynamo_backends").load() is depthpass_backend


def test_unknown_option_and_unknown_inner_compiler():
    with pytest.raises(dp.SpecError, match=r"options: unknown key 'sepc'\. Did you mean 'spec'\? Keys: spec, inner, chunk"):
        Options.read({"sepc": SPEC})
    with pytest.raises(dp.SpecError, match=r"options\.inner: .*got 'inducktor'\. Did you mean 'inductor'\?"):
        Options.read({"inner": "inducktor"})
    for inner in (3, "depthpass", depthpass_backend):
        with pytest.raises(dp.SpecError, match=r"options\.inner"):
            Options.read({"inner": inner})
    with pytest.raises(dp.SpecError, match="mode: expected none, got 'max-autotune'"):
        depthpass_backend(torch.fx.GraphModule({}, torch.fx.Graph()), [], mode="max-autotune")


def test_specs_that_do_not_fit_the_model():
    model = attached()
    parameters = list(model.parameters())

    def plan(**options):
        return planned(model, model, Options.read(options), parameters)

    assert plan()[0] is model.depth and plan(spec=SPEC, chunk=2)[1].schedule.chunk == 2
    with pytest.raises(dp.SpecError, match=r"options\.spec: expected the spec that is attached to the model, got another"):
        plan(spec=dp.TurboConn(bridges=[(1, 0)], group=2, rank=2))
    with pytest.raises(dp.SpecError, match=r"chunk: expected at most 3"):
        plan(chunk=4)
    del model.depth
    with pytest.raises(dp.SpecError, match=r"options: expected a 'spec', got none.*dp\.attach"):
        plan()
    with pytest.raises(dp.SpecError, match=r"4 new parameters \(depth\.turboconn\.s1_d0\.down\.bias, \.\.\.\).*dp\.attach"):
        plan(spec=SPEC)
    with pytest.raises(dp.SpecError, match=r"hands out .* besides the model's own outputs.*dp\.transform"):
        plan(spec={"pass": "taps", "at": [0]})


@pytest.mark.compile
def test_options_reach_the_backend():
    with pytest.raises(Failed, match="SpecError: options: unknown key 'groups'"):
        call(attached(), options={"groups": 4})


@pytest.mark.compile
def test_caches_are_refused():
    model = attached()
    with pytest.raises(Failed, match=r"returns keys and values.*use_cache=False.*dp\.transform"):
        call(model, use_cache=True)
    cache = DynamicCache(config=model.config)
    batch = zoo.batch([6, 6])
    with torch.no_grad():
        model(**batch, past_key_values=cache, use_cache=True)
    batch["attention_mask"] = torch.ones(2, 12, dtype=torch.long)
    with torch.no_grad(), pytest.raises(Failed, match=r"KV cache.*dp\.transform"):
        call(model, batch, past_key_values=cache)


@pytest.mark.compile
def test_fixed_sequence_lengths_are_refused():
    model = attached()
    with pytest.raises(Failed, match=r"number of tokens is fixed to 6.*dynamic=False.*maybe_mark_dynamic"):
        call(model, dynamic=False)
    torch._dynamo.reset()
    with pytest.raises(Failed, match=r"number of tokens is fixed to 1 .*pad it to two"):
        call(model, zoo.batch([1, 1]))


@pytest.mark.compile
def test_graph_breaks_inside_the_model_are_refused():
    model = attached()

    def stop(module, arguments):
        torch._dynamo.graph_break()

    model.model.layers[1].register_forward_pre_hook(stop)
    with pytest.raises(Failed, match=r"expected all 2 blocks of model\.layers in one graph, got .*graph break.*fullgraph=True"):
        call(model)


@pytest.mark.compile
def test_graph_breaks_around_the_model_are_not():
    model = attached()
    batch = zoo.batch([6, 4])
    for tensor in batch.values():
        torch._dynamo.maybe_mark_dynamic(tensor, [0, 1])

    def loss(batch):
        logits = model(**batch, use_cache=False).logits
        torch._dynamo.graph_break()
        return logits.square().mean()

    got = torch.compile(loss, backend=depthpass_backend)(batch)
    with torch.no_grad():
        # Up is still zero, so that the bridges add nothing to the stock model.
        torch.testing.assert_close(got.detach(), loss(batch), rtol=1e-5, atol=1e-6)


@pytest.mark.compile
@pytest.mark.parametrize(("arguments", "message"), [
    ({"attention_mask": torch.ones(2, 1, 6, 6).tril().bool()}, r"attention_mask: expected \[batch, tokens\], got shape"),
    ({"output_hidden_states": True}, r"output_hidden_states.*not supported"),
])
def test_arguments_that_cannot_be_honoured(arguments, message):
    batch = zoo.batch([6, 6])
    batch.pop("attention_mask")
    with pytest.raises(Failed, match=message):
        call(attached(), batch, **arguments)


@pytest.mark.compile
def test_eager_attention_and_checkpointing_are_refused():
    with pytest.raises(Failed, match=r"attention implementation 'eager'.*attn_implementation='sdpa'"):
        call(attached(attn_implementation="eager"))
    model = attached().train()
    model.gradient_checkpointing_enable()
    with pytest.raises(Failed, match=r"tag_activation_checkpoint.*gradient_checkpointing_disable"):
        call(model)


@pytest.mark.compile
def test_a_row_without_real_tokens_is_refused_at_the_call():
    model = attached()
    batch = zoo.batch([6, 4])
    call(model, batch)
    batch["attention_mask"][1] = 0
    with pytest.raises(dp.InputError, match=r"attention_mask: row 1 is padding only"):
        call(model, batch)
