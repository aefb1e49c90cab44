"""The graph of one chunk: what leaves the loop, which products are joined, and that it is made once."""

import operator

import pytest
import torch
import zoo
from depthpass_lowering.executors import chunk_loop
from depthpass_lowering.fx_passes.distribute import distribute_pass
from depthpass_lowering.fx_passes.products import join_products_pass, land, products
from depthpass_lowering.fx_passes.sink import _absorbed
from torch import fx

import depthpass as dp

aten = torch.ops.aten


def graph_of(name: str, spec, layers: int = 4, **options):
    """The chunk graph that a call of a graphs model runs on."""
    turbo = dp.transform(zoo.model(name, layers), spec, lowering="scheduled", **options)
    turbo(**zoo.batch([9, 6]), use_cache=False)
    (graph,) = [g for graphs in chunk_loop._GRAPHS.values() for g in graphs.values() if g.program is turbo.depth_program]
    turbo(**zoo.batch([13, 6]), use_cache=False)
    assert sum(g.program is turbo.depth_program for graphs in chunk_loop._GRAPHS.values() for g in graphs.values()) == 1
    return graph


def targets(gm: fx.GraphModule) -> list:
    return [n.target for n in gm.graph.nodes if n.op == "call_function"]


def test_one_product_for_what_reads_one_stream_and_one_for_what_lands_together():
    graph = graph_of("llama", dp.TurboConn(bridges=[(3, 1), (3, 0), (2, 0)], group=3, rank=5))
    nodes = [n for n in graph.distributed.loop.graph.nodes if n.target is products]
    # q, k, v; o; gate, up; down of three blocks; the down maps of block 2, and the two of block 3.
    assert sorted(len(n.args[1]) for n in nodes) == sorted([3, 1, 2, 1] * 3 + [1, 2])
    landings = [n for n in graph.distributed.loop.graph.nodes if n.target is land]
    assert sorted(len(n.args[0]) for n in landings) == [1, 2]
    assert not {aten.linear.default, aten.addmm.default} & set(targets(graph.distributed.loop))


@pytest.mark.parametrize(("name", "known"), [("llama", 2), ("gemma", 8), ("gpt2", 0)])
def test_what_depends_on_parameters_and_tables_leaves_the_loop(name, known):
    """Rotary tables once for all blocks; of Gemma also ``1 + weight`` of two norms of three blocks."""
    graph = graph_of(name, dp.TurboConn(bridges=[(3, 0)], group=3, rank=5))
    loop, before = graph.distributed.loop, graph.distributed.before
    given = [n for n in loop.graph.nodes if n.op == "placeholder" and n.name.startswith("known_")]
    assert len(given) == known == len(graph.distributed.axes)
    assert (before is None) == (known == 0)
    opaque = {"loop", *(f"visit_{i}" for i in range(3))}
    hidden = {n for n in loop.graph.nodes if n.op == "placeholder" and n.name in opaque | {"stream_1"}}
    reached = set(hidden)
    for n in loop.graph.nodes:
        if any(a in reached for a in n.all_input_nodes):
            reached.add(n)
    # Everything that is left depends on the chunk.
    assert all(n in reached for n in loop.graph.nodes if n.op == "call_function")


def test_a_reduction_over_tokens_of_a_table_stays_correct_by_staying_inside():
    """A value whose token axis is not certain is not moved."""
    graph = fx.Graph()
    x, table = graph.placeholder("x"), graph.placeholder("table")
    table.meta["axis"] = 1
    doubled = graph.call_function(aten.mul.Tensor, (table, 2))
    unsure = graph.call_function(aten.sum.dim_IntList, (doubled, [1]))
    for n, value, axis in ((doubled, torch.empty(2, 5), 1), (unsure, torch.empty(2), "unknown")):
        n.meta |= {"val": value, "axis": axis}
    graph.output((graph.call_function(operator.add, (x, unsure)),))
    done = distribute_pass(fx.GraphModule({}, graph), [table])
    assert done.moved == 1 and done.axes == (1,)
    assert targets(done.loop) == [aten.sum.dim_IntList, operator.add]
    x, table = torch.randn(2), torch.randn(2, 5)
    (known,) = done.before(table)
    parts = [done.loop(x, table[:, a:b], known[:, a:b])[0] for a, b in ((0, 2), (2, 5))]
    assert torch.allclose(sum(parts) - x, x + 2 * table.sum(1), atol=1e-5)


def test_products_that_must_stay_alone():
    """A weight that something else reads, and a result that is changed in place."""
    graph = fx.Graph()
    x, tied, changed = (graph.placeholder(n) for n in ("x", "tied", "changed"))
    a = graph.call_function(aten.linear.default, (x, tied))
    b = graph.call_function(aten.linear.default, (x, changed))
    b = graph.call_function(aten.add_.Tensor, (b, 1))
    graph.output((a, b, graph.call_function(aten.mul.Tensor, (tied, 2))))
    assert join_products_pass(graph, {tied, changed}) == 0
    gm = fx.GraphModule({}, graph)
    x, tied, changed = torch.randn(3, 4), torch.randn(2, 4), torch.randn(5, 4)
    for got, want in zip(gm(x, tied, changed), (x @ tied.t(), x @ changed.t() + 1, tied * 2)):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(("name", "count"), [("llama", 3), ("gpt2", 3), ("apertus", 0), ("mixtral", 0)])
def test_pointwise_work_between_products_is_not_kept(name, count):
    """One MLP a block; not where an activation has more than pointwise ops, and not where experts run as a whole."""
    graph = graph_of(name, dp.TurboConn(bridges=[(3, 0)], group=3, rank=5))
    sunk = chunk_loop.sunk_graph(graph)
    taken = [n for n in sunk.graph.nodes if n.target is _absorbed]
    assert len(taken) == count
    for n in taken:  # it starts from results of products, or from views of them
        *_, steps, first = n.args[:6]
        assert steps.op == "get_attr" and first.target in (operator.getitem, aten.view.default)
    assert not {aten.silu.default, aten.tanh.default} & set(targets(sunk)) or not count


def test_a_step_keeps_less_than_the_stock_model():
    """Elements that autograd keeps for the blocks, wide MLPs: all of a stock step's against a token loop's."""
    stock = zoo.model("llama", 4, intermediate_size=256)
    turbo = dp.transform(stock, dp.TurboConn(bridges=[(3, 0)], group=3, rank=5), lowering="scheduled")
    ids = zoo.batch([12, 12])["input_ids"]
    kept = []
    for model in (stock, turbo):
        model(input_ids=ids, use_cache=False)  # captures
        storages = {}

        def note(t, storages=storages):
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        alive = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, alive=alive: (alive.append(t), note(t))[1], lambda t: t):
            model(input_ids=ids, use_cache=False)
        kept.append(sum(storages.values()))
    assert kept[1] < kept[0]
