"""The compiled model computes what the transformed one computes: outputs and every gradient."""

import gc
import warnings

import pytest
import torch
import zoo
from depthpass_lowering.backend.dynamo import depthpass_backend
from depthpass_lowering.executors.compiled import compiled_graph
from transformers.modeling_outputs import CausalLMOutput

import depthpass as dp

pytestmark = pytest.mark.compile


def spec_of(layers):
    return dp.TurboConn(bridges=[(source, 0) for source in range(1, layers)], group=4, rank=4)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Counted:
    """The backend, counting the graphs it compiles."""

    def __init__(self):
        self.compiled = 0

    def __call__(self, gm, arguments, **options):
        compiled = depthpass_backend(gm, arguments, **options)
        self.compiled += 1
        return compiled


def pair(name, layers=2, dtype=torch.float64):
    """A model with attached random parameters, and a transformed one with equal parameters of its own."""
    model, other = (zoo.model(name, layers=layers, dtype=dtype) for _ in range(2))
    turbo = dp.transform(other, spec_of(layers))
    dp.attach(model, spec_of(layers))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.depth.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.3)
    turbo.depth.load_state_dict(model.depth.state_dict())
    return model, turbo


def inputs(lengths, side="left", labels=False, mark=True):
    batch = zoo.batch(lengths, side)
    if labels:
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for tensor in batch.values() if mark else ():
        torch._dynamo.maybe_mark_dynamic(tensor, [0, 1])
    return batch


def gradients(model, output, mask):
    """Gradients of the loss, or of a fixed random form of the real tokens' logits."""
    weight = torch.randn(output.logits.shape, generator=torch.Generator().manual_seed(1), dtype=output.logits.dtype)
    model.zero_grad()
    loss = output.get("loss")
    (loss if loss is not None else (output.logits * weight)[mask].sum()).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_equal(model, turbo, compiled, batch, rtol):
    got, want = compiled(**batch, use_cache=False), turbo(**batch, use_cache=False)
    assert type(got) is type(want)
    mask = batch["attention_mask"].bool()
    torch.testing.assert_close(got.logits[mask], want.logits[mask], rtol=rtol, atol=rtol)
    mine, theirs = gradients(model, got, mask), gradients(turbo, want, mask)
    assert mine.keys() == theirs.keys() and any(n.startswith("depth.") for n in mine)
    for name, g in theirs.items():
        assert (mine[name] - g).abs().max() <= 10 * rtol * g.abs().max().clamp_min(1e-12), name
    if "labels" in batch:
        torch.testing.assert_close(got.loss, want.loss, rtol=rtol, atol=rtol)


@pytest.mark.parametrize(("name", "side", "labels"), [
    ("llama", "left", True), ("qwen3", "right", False), ("gpt2", "left", False), ("gemma3_text", "left", True),
    ("mistral", "right", False),
])
def test_training_equals_transform_at_every_length_with_one_graph(name, side, labels):
    model, turbo = pair(name, layers=3 if name in ("llama", "gemma3_text") else 2)
    backend = Counted()
    compiled = torch.compile(model, backend=backend)
    # Windows of 4 tokens; rows of other numbers, lengths no multiple of the group, one batch without padding.
    for lengths in ([11, 7], [5, 8, 2], [6, 6]):
        assert_equal(model, turbo, compiled, inputs(lengths, side, labels), rtol=1e-12)
    assert backend.compiled == 1


def test_sizes_become_symbolic_without_marks_and_with_dynamic_true():
    model, turbo = pair("llama")
    for dynamic in (None, True):
        torch._dynamo.reset()
        backend = Counted()
        compiled = torch.compile(model, backend=backend, dynamic=dynamic)
        for lengths in ([7, 4], [10, 10]):
            assert_equal(model, turbo, compiled, inputs(lengths, mark=False), rtol=1e-12)
        assert backend.compiled == 1


def test_code_around_the_model_and_explicit_positions():
    model, turbo = pair("llama")

    @torch.compile(backend=depthpass_backend, options={"chunk": 2})
    def step(model, ids, positions):
        return model(input_ids=ids, position_ids=positions, use_cache=False).logits.pow(2).mean()

    ids = inputs([9, 9])["input_ids"]
    positions = torch.arange(4, 13).expand(2, -1).contiguous()
    for tensor in (ids, positions):
        torch._dynamo.maybe_mark_dynamic(tensor, [0, 1])
    got, want = step(model, ids, positions), turbo(input_ids=ids, position_ids=positions).logits.pow(2).mean()
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    # Positions that restart are packed rows, in the same graph.
    again = positions % 7
    torch._dynamo.maybe_mark_dynamic(again, [0, 1])
    torch.testing.assert_close(
        step(model, ids, again), turbo(input_ids=ids, position_ids=again).logits.pow(2).mean(), rtol=1e-12, atol=1e-12
    )


def test_after_a_block_has_run_as_a_module():
    """A transformed model with hooks inside a block, earlier in the process, leaves other models' graphs whole."""
    model, turbo = pair("llama")
    batch = inputs([8, 6])
    with (
        turbo.model.layers[1].mlp.register_forward_hook(lambda m, a, o: None),
        pytest.warns(UserWarning, match="hooks on or in block 1"),
    ):
        turbo(**batch)
    assert_equal(model, turbo, torch.compile(model, backend=depthpass_backend, fullgraph=True), batch, rtol=1e-12)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize(("name", "rows"), [("llama", 1), ("gemma3_text", 2)])
def test_packed_rows(name, rows):
    """Each sequence is a row of its own, outputs and every gradient; a graph of one row runs them one by one."""
    model, turbo = pair(name)
    compiled = torch.compile(model, backend=depthpass_backend)
    for lengths in ([5, 1, 9, 2], [3, 8, 3, 3]):
        ids = zoo.batch([sum(lengths)] * rows, seed=sum(lengths[:1]))["input_ids"]
        positions = torch.cat([torch.arange(n) for n in lengths]).expand(rows, -1).contiguous()
        actual = compiled(input_ids=ids, position_ids=positions, use_cache=False).logits
        wanted = torch.cat([
            torch.cat([turbo(input_ids=x[None], use_cache=False).logits for x in row.split(lengths)], 1) for row in ids
        ])
        # Norms that compute in float32.
        limit = 1e-5 if name == "gemma3_text" else 1e-10
        torch.testing.assert_close(actual, wanted, rtol=limit, atol=limit)
        mask = torch.ones_like(ids, dtype=torch.bool)
        mine, theirs = (gradients(m, CausalLMOutput(logits=x), mask) for m, x in ((model, actual), (turbo, wanted)))
        assert mine.keys() == theirs.keys()
        for n, g in theirs.items():
            assert (mine[n] - g).abs().max() <= 10 * limit * g.abs().max() + 1e-12, n
    labels = ids.masked_fill(positions == 0, -100)
    loss = compiled(input_ids=ids, position_ids=positions, labels=labels, use_cache=False).loss
    torch.testing.assert_close(loss, turbo(input_ids=ids, position_ids=positions, labels=labels).loss)


def but_of_three_rows(gm) -> bool:
    """A chunk of the token loop is compiled for each number of rows, the rest for any: two of them are enough code."""
    values = [n.meta.get("val") for n in gm.graph.nodes if n.op == "placeholder"]
    streams = [v.shape[0] for v in values if isinstance(v, torch.Tensor) and v.dim() == 3]
    return not any(isinstance(rows, int) and rows == 3 for rows in streams)


@pytest.mark.parametrize("inner", [
    "aot_eager", pytest.param("inductor", marks=[pytest.mark.slow, pytest.mark.codegen(of=but_of_three_rows)]),
])
def test_inner_compilers_equal_eager(inner):
    model, turbo = pair("llama", dtype=torch.float32)
    compiled = torch.compile(model, backend=depthpass_backend, options={"inner": inner})
    gc.collect()
    before = set(compiled_graph.kept)
    for lengths in ([8, 6], [12, 12, 12]):
        assert_equal(model, turbo, compiled, inputs(lengths), rtol=3e-6)
    # Inductor compiles the chunks of the token loop, others the blocks.
    assert bool(set(compiled_graph.kept) - before) == (inner == "inductor")


def test_scoring_without_attached_parameters_warns_and_equals_stock():
    model, spec = zoo.model("gemma3_text", layers=2), spec_of(2)
    batch = inputs([9, 6])
    mask = batch["attention_mask"].bool()
    with torch.no_grad():
        want = model(**batch, use_cache=False).logits
        compiled = torch.compile(model, backend=depthpass_backend, options={"spec": spec})
        with pytest.warns(UserWarning, match=r"4 new parameters of the spec exist only inside the compiled.*dp\.attach"):
            got = compiled(**batch, use_cache=False).logits
        torch.testing.assert_close(got[mask], want[mask], rtol=1e-5, atol=1e-6)
    assert not hasattr(model, "depth")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.no_grad():
            compiled(**inputs([4, 8]), use_cache=False)
    dp.attach(model, spec)
    with torch.no_grad(), pytest.raises(dp.LoweringError, match=r"changed after it was compiled.*torch\.compiler\.reset"):
        compiled(**batch, use_cache=False)


def test_specs_without_new_parameters_train_unattached():
    model = zoo.model("llama", layers=2, dtype=torch.float64)
    batch = inputs([7, 5])
    mask = batch["attention_mask"].bool()
    compiled = torch.compile(model, backend=depthpass_backend, options={"spec": "pass: identity"})
    got = compiled(**batch, use_cache=False)
    mine = gradients(model, got, mask)
    want = model(**batch, use_cache=False)
    theirs = gradients(model, want, mask)
    torch.testing.assert_close(got.logits[mask], want.logits[mask], rtol=1e-12, atol=1e-12)
    for name, g in theirs.items():
        torch.testing.assert_close(mine[name], g, rtol=1e-9, atol=1e-9)


def test_blocks_visited_twice_equal_transform():
    spec = {"pass": "layer_program", "layers": [0, 1, 0, 1]}
    model = zoo.model("llama", layers=2, dtype=torch.float64)
    turbo = dp.transform(model, spec)
    batch = inputs([7, 5])
    mask = batch["attention_mask"].bool()
    compiled = torch.compile(model, backend=depthpass_backend, options={"spec": spec})
    got, want = compiled(**batch, use_cache=False).logits[mask], turbo(**batch, use_cache=False).logits[mask]
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
