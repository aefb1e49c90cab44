"""The first call may come from anywhere: what it captures does not depend on it, and later calls behave alike."""

import pytest
import torch
import zoo
from captured_once import captured_once
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.func import functional_call, grad, jacrev, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from turbos import enliven, turbo_of

import depthpass as dp
from depthpass.errors import InputError, LoweringError, UnsupportedModelError

IDS = zoo.batch([9, 9], seed=5)["input_ids"]
WARM = pytest.mark.parametrize("warm", [False, True], ids=["first", "later"])


@pytest.fixture(scope="module")
def stock():
    return enliven(zoo.model("llama", 3, dtype=torch.float64))


def model_of(stock, warm, **options):
    transformed = turbo_of(stock) if not options else dp.transform(stock, turbo_of(stock).depth_spec, **options)
    enliven(transformed.depth, seed=1, least=1)
    if warm:
        with captured_once():
            transformed(input_ids=IDS, labels=IDS, use_cache=False)
    return transformed


def gradients(transformed, ids):
    transformed.zero_grad()
    transformed(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    actual = {n: p.grad.clone() for n, p in transformed.named_parameters() if p.grad is not None}
    transformed.zero_grad()
    return actual


NO_RULE = pytest.mark.filterwarnings("ignore:There is a performance drop")
"""Torch has no rule for SDPA under vmap, and runs it row by row."""


@WARM
@NO_RULE
def test_function_transforms_see_the_program(stock, warm):
    transformed = model_of(stock, warm)
    values = {n: p.detach() * 1.1 for n, p in transformed.named_parameters()}

    def loss(values, ids):
        return functional_call(transformed, values, (), {"input_ids": ids, "labels": ids, "use_cache": False}).loss

    rows = zoo.batch([9] * 3, seed=6)["input_ids"][:, None]
    called = functional_call(transformed, values, (), {"input_ids": IDS, "use_cache": False}).logits
    one, each = grad(loss)(values, IDS), vmap(grad(loss), in_dims=(None, 0))(values, rows)
    logits = vmap(lambda i: functional_call(transformed, values, (), {"input_ids": i, "use_cache": False}).logits)(rows)
    slopes = jacrev(lambda w: functional_call(
        transformed, {**values, "model.norm.weight": w}, (), {"input_ids": IDS[:1], "use_cache": False}).logits[0, -1, :2]
    )(values["model.norm.weight"])
    other = turbo_of(enliven(zoo.model("llama", 3, dtype=torch.float64)))
    other.load_state_dict(values)
    torch.testing.assert_close(called, other(input_ids=IDS, use_cache=False).logits)
    wanted = gradients(other, IDS)
    assert any(n.startswith("depth.") and g.abs().max() > 1e-4 for n, g in wanted.items())
    for n, g in wanted.items():
        torch.testing.assert_close(one[n], g)
    for i, row in enumerate(rows):
        torch.testing.assert_close(logits[i], other(input_ids=row, use_cache=False).logits)
        for n, g in gradients(other, row).items():
            torch.testing.assert_close(each[n][i], g)
    norm = other.model.norm.weight
    for k in range(2):
        (slope,) = torch.autograd.grad(other(input_ids=IDS[:1], use_cache=False).logits[0, -1, k], norm)
        torch.testing.assert_close(slopes[k], slope)
    torch.testing.assert_close(
        transformed(input_ids=IDS, use_cache=False).logits, model_of(stock, False)(input_ids=IDS, use_cache=False).logits
    )


@NO_RULE
def test_vmap_over_padded_rows(stock):
    transformed = model_of(stock, False)
    given = zoo.batch([9, 5, 7], seed=3)
    out = vmap(lambda i, m: transformed(input_ids=i, attention_mask=m, use_cache=False).logits)(
        given["input_ids"][:, None], given["attention_mask"][:, None]
    )[:, 0]
    wanted = transformed(**given, use_cache=False).logits
    real = given["attention_mask"].bool()
    torch.testing.assert_close(out[real], wanted[real])


@NO_RULE
def test_routes_by_value_refuse_vmap_by_name(stock):
    routed = dp.transform(stock, dp.MixtureOfRecursions(recursions=2, start=1, end=2, router="expert", mode="threshold"))
    with pytest.raises(InputError, match=r"vmap.*which tokens\s+a route takes"):
        vmap(lambda i: routed(input_ids=i, use_cache=False).logits)(IDS[:, None])
    with pytest.raises(InputError, match=r"vmap.*which tokens\s+a route takes"):
        vmap(lambda i: routed(input_ids=i, position_ids=torch.arange(9)[None] % 5, use_cache=False).logits)(IDS[:, None])


@WARM
def test_hand_scheduled_loops_refuse_function_transforms_by_name(stock, warm):
    transformed = model_of(stock, warm, lowering="scheduled")
    values = {n: p.detach() for n, p in transformed.named_parameters()}
    with pytest.raises(LoweringError, match=r"torch\.func.*lowering=.auto."):
        grad(lambda v: functional_call(transformed, v, (), {"input_ids": IDS, "labels": IDS, "use_cache": False}).loss)(values)


@WARM
@pytest.mark.filterwarnings("ignore:materialize")
@pytest.mark.parametrize("spec", [dp.Identity(), dp.Loop(start=1, end=2, times=2)], ids=["identity", "loop"])
def test_a_flop_counter_counts_whole_numbers(stock, warm, spec):
    transformed = dp.transform(stock, spec)
    # Given, since rotary tables are a product: stock models make those of one row where none are given.
    call = dict(input_ids=IDS, position_ids=torch.arange(IDS.shape[1]).expand_as(IDS), use_cache=False)
    if warm:
        transformed(**call)
    with FlopCounterMode(display=False) as mine:
        transformed(**call)
    # The same blocks in a stock model, in the order in which they are visited.
    same = stock if isinstance(spec, dp.Identity) else dp.materialize(dp.transform(stock, dp.LayerProgram([0, 1, 1, 2])))
    with FlopCounterMode(display=False) as theirs:
        same(**call)
    assert type(mine.get_total_flops()) is int and mine.get_total_flops() == theirs.get_total_flops()


def test_modes_around_the_first_call_are_not_captured(stock):
    wanted = model_of(stock, True)(input_ids=IDS, use_cache=False).logits
    transformed = model_of(stock, False)
    with torch.device("cpu"), torch.autograd.graph.save_on_cpu(), torch.autograd.set_detect_anomaly(True):
        transformed(input_ids=IDS, use_cache=False)
    assert torch.equal(transformed(input_ids=IDS, use_cache=False).logits, wanted)
    transformed = model_of(stock, False)
    with torch.autocast("cpu", torch.bfloat16):
        transformed(input_ids=IDS, use_cache=False)
    assert torch.equal(transformed(input_ids=IDS, use_cache=False).logits, wanted)


class Tripled(TorchFunctionMode):
    """Changes a function that blocks call."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return out * 3 if func is torch.nn.functional.silu else out


class Halved(TorchDispatchMode):
    """Changes an op."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return out / 2 if func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default) else out


@WARM
def test_modes_that_change_what_a_block_computes(stock, warm):
    """A captured graph calls ops, so a mode of ops changes them; it calls no functions, so their modes are refused."""
    transformed = dp.transform(stock, dp.Identity())
    if warm:
        with captured_once():
            transformed(input_ids=IDS, use_cache=False)
    with Halved():
        got, wanted = (m(input_ids=IDS, use_cache=False).logits for m in (transformed, stock))
    torch.testing.assert_close(got, wanted)
    assert (stock(input_ids=IDS, use_cache=False).logits - wanted).abs().max() > 1e-2
    with Tripled(), pytest.raises(UnsupportedModelError, match="Tripled is a TorchFunctionMode"):
        transformed(input_ids=IDS, use_cache=False)
    torch.testing.assert_close(transformed(input_ids=IDS, use_cache=False).logits, stock(input_ids=IDS, use_cache=False).logits)


def test_inference_mode_around_making_and_calling():
    with torch.inference_mode():
        transformed = turbo_of(enliven(zoo.model("llama", 3)))
        wanted = transformed(input_ids=IDS, use_cache=False).logits
    with torch.no_grad():
        torch.testing.assert_close(transformed(input_ids=IDS, use_cache=False).logits, wanted)
    trained = turbo_of(enliven(zoo.model("llama", 3)))
    with torch.inference_mode():
        torch.testing.assert_close(trained(input_ids=IDS, use_cache=False).logits, wanted)
    assert gradients(trained, IDS)


@pytest.mark.parametrize("lowering", ["auto", "eager"])
@pytest.mark.parametrize("count", [5, 1])
def test_a_prompt_read_in_inference_mode_is_gone_on_from_with_gradients(stock, lowering, count):
    """As a stock model goes on from such a cache: the values of the row in one call, the gradients behind any such prompt."""
    transformed, logits, grads = model_of(stock, True, lowering=lowering), [], []
    new = IDS[:, 4 : 4 + count]
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            cache = dp.DepthCache(transformed)
            transformed(input_ids=IDS[:, :4], past_key_values=cache)
        out = transformed(input_ids=new, past_key_values=cache)
        transformed.zero_grad()
        out.logits.square().sum().backward()
        logits.append(out.logits.detach())
        grads.append([p.grad for p in transformed.parameters()])
    with torch.no_grad():
        whole = transformed(input_ids=IDS[:, : 4 + count]).logits[:, 4:]
    torch.testing.assert_close(logits, [whole, whole], rtol=0, atol=1e-9)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-9, atol=1e-9)
    assert sum(g.abs().sum() > 0 for g in grads[0] if g is not None) > 10


def test_a_meta_model_gives_shapes():
    stock = zoo.model("llama", 3).to("meta")
    transformed = turbo_of(stock)
    out = transformed(input_ids=IDS.to("meta"), attention_mask=torch.ones_like(IDS, device="meta"), labels=IDS.to("meta"))
    assert out.logits.shape == stock(input_ids=IDS.to("meta")).logits.shape and out.logits.is_meta
    out.loss.backward()
    assert all(p.grad.shape == p.shape for p in transformed.parameters())
    assert turbo_of(stock)(input_ids=IDS.to("meta"), use_cache=True)[zoo.CACHE].get_seq_length() == IDS.shape[1]
    routed = dp.transform(stock, dp.MixtureOfRecursions(recursions=2, start=1, end=2, router="expert", mode="threshold"))
    with pytest.raises(InputError, match="meta device"):
        routed(input_ids=IDS.to("meta"))


@WARM
@pytest.mark.parametrize("lowering", ["auto", "eager"])
def test_fake_tensors_reach_no_later_call(stock, warm, lowering):
    """Estimators and tracers run models on them; masks and constants are kept for all calls of a process."""
    ids = IDS[:, : 8 - warm]  # sizes of no other test, so that nothing is kept for them yet
    transformed = model_of(stock, False, lowering=lowering)
    if warm:
        transformed(input_ids=IDS, use_cache=False)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        out = transformed(input_ids=mode.from_tensor(ids), labels=mode.from_tensor(ids), use_cache=False)
        assert isinstance(out.logits, FakeTensor) and out.logits.shape[:2] == ids.shape
    fresh = model_of(stock, False, lowering="eager")
    torch.testing.assert_close(
        transformed(input_ids=ids, use_cache=False).logits, fresh(input_ids=ids, use_cache=False).logits, rtol=1e-9, atol=1e-9
    )


@WARM
def test_make_fx_takes_sizes_that_are_numbers(stock, warm):
    transformed = model_of(stock, warm)

    def logits(ids):
        return transformed(input_ids=ids, use_cache=False).logits

    with torch.no_grad():
        for mode in ("real", "fake"):
            graph = make_fx(logits, tracing_mode=mode, _allow_non_fake_inputs=True)(IDS)
            torch.testing.assert_close(graph(IDS.flip(0)), logits(IDS.flip(0)))
        with pytest.raises(InputError, match="sizes that are numbers"):
            make_fx(logits, tracing_mode="symbolic", _allow_non_fake_inputs=True)(IDS)
