from dataclasses import replace

import pytest
import sympy as sp
import torch
import zoo
from cost_models import llama_1b, tiny
from hypothesis import given, reject, settings
from torch.utils.flop_counter import FlopCounterMode

import depthpass as dp
from depthpass.analysis.cost import cost, model_cost, visit_equivalents
from depthpass.analysis.cost.symbols import B, g, n
from depthpass.analysis.cost.visits import stacks
from depthpass.errors import InputError, PassError, SpecError
from depthpass.ir import parse_program, plain
from depthpass.passes import Context, apply_spec
from depthpass.passes.turboconn import TurboConn
from depthpass.schedule.regions import schedule
from depthpass.testing import programs

STOCK = plain("LlamaForCausalLM", 4, 32)


def turbo(group=4, blocks=16, width=2048, **fields):
    stock = plain("LlamaForCausalLM", blocks, width)
    return apply_spec(stock, TurboConn(group=group, **fields), Context.of(stock))


def from_lines(*lines, blocks=4, width=32):
    return parse_program("\n".join((f"program LlamaForCausalLM blocks={blocks} width={width}", *lines)))


def test_the_stock_program_costs_the_sum_of_the_parts():
    cost_ = cost(STOCK, tiny(), attention="dense")
    assert cost_.stock is None
    assert sp.expand(cost_["FLOPs forward"] - sum(p.count.total_flops("dense") for p in tiny().parts)) == 0
    assert cost_.at("parameters unique", 10) == cost_.at("parameters visited", 10) == tiny().parameters == 37216
    assert cost_.at("serial steps", 10) == 0 and cost_.at("serial block calls", 10) == 4
    assert all(row.ratio in (1.0, None) for row in cost_.rows(10))


def test_backward_flops_equal_torchs_flop_counter():
    """Two products per product: input and weight gradient. Eager attention recomputes nothing."""
    model = zoo.model("llama")
    model.set_attn_implementation("eager")
    ids = torch.randint(3, zoo.VOCABULARY, (2, 19))
    with FlopCounterMode(display=False) as forward:
        loss = model(input_ids=ids, position_ids=torch.arange(19).expand(2, -1), use_cache=False).logits.sum()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    cost_ = cost(STOCK, model_cost(model), attention="dense")
    assert cost_.at("FLOPs forward", 19, 2) == forward.get_total_flops()
    assert cost_.at("FLOPs backward", 19, 2) == backward.get_total_flops()


def test_a_frozen_base_needs_no_weight_gradients_and_none_below_the_first_new_op():
    everything = cost(turbo(), llama_1b())
    frozen = cost(turbo(), llama_1b(), trainable="new")
    none = cost(turbo(), llama_1b(), trainable="none")
    assert none.at("FLOPs backward", 155) == none.at("activation bytes kept", 155) == 0
    assert frozen.backward_flops["head"] == frozen.flops["head"]
    assert frozen.backward_flops["new"] == 2 * frozen.flops["new"]
    # Bridges land on the outputs of blocks 0, 2, .., 8: block 0 itself needs no backward pass.
    assert sp.expand(frozen.backward_flops["mlp"] - frozen.flops["mlp"] * sp.Rational(15, 16)) == 0
    assert sp.expand(everything.backward_flops["mlp"] - 2 * everything.flops["mlp"]) == 0
    assert frozen.at("FLOPs backward", 155) < 0.51 * everything.at("FLOPs backward", 155)


def test_turboconn_on_llama_1b():
    """15 bridges of rank 120: 7.4 M parameters, 4*dim*r FLOPs per bridge and token, 14 of 16 blocks serial."""
    cost_ = cost(turbo(preset="llama-1b"), llama_1b())
    bridge = 2048 * 120 * 2 + 120 + 2048
    assert cost_.at("parameters new", 155) == 15 * bridge == 7_405_320
    assert cost_.at("parameters unique", 155) == 1_235_814_400 + 15 * bridge
    assert cost_.flops["new"] == 15 * 4 * 2048 * 120 * B * n
    assert cost_["serial block calls"] == 14 * sp.ceiling(n / g) + 2
    assert cost_.at("serial block calls", 155) == 14 * 39 + 2
    assert cost_.at("serial block calls", 155, group=16) == 14 * 10 + 2
    assert cost_["delay line bytes"] == 15 * 120 * 2 * B * g
    assert cost_["KV bytes"] == 16 * 2 * 512 * 2 * B * n
    assert [(r.serial, r.visits) for r in cost_.regions] == [(False, 1), (True, 14), (False, 1)]
    serial = cost_.regions[1]
    weights = 14 * (60_817_408 + 2 * 2048) + 15 * bridge
    assert serial.weight_bytes_per_step == 2 * weights == cost_.at("weight bytes per serial step", 155)
    assert cost_.at("decode block calls", 155) == 16


def test_attention_work_does_not_depend_on_the_chunk():
    assert cost(turbo(4), llama_1b())["FLOPs forward"] == cost(turbo(4), llama_1b(), chunk=1)["FLOPs forward"]


def test_intensity_is_that_of_the_rows_of_a_chunk():
    """FLOPs per byte of a bf16 GEMM of r rows are r, attention aside."""
    region = cost(turbo(4), llama_1b()).regions[1]
    mlp_and_projections = 2 * 60_817_408 * 4 * 8 / (2 * 60_817_408)
    value = float(region.intensity.subs({n: 16, g: 4, B: 8}))
    assert value == pytest.approx(mlp_and_projections, rel=0.02)


@pytest.mark.parametrize(("visits", "ratio"), [
    ([0, 1, 1, 2, 3], sp.Rational(5, 4)),
    ([0, 1, 2, 1, 2, 3], sp.Rational(6, 4)),
    ([0, 3], sp.Rational(2, 4)),
])
def test_layer_programs_cost_their_length(visits, ratio):
    lines = ["%0 = embed", *(f"%{i + 1} = block {b} (%{i}) slot {i}" for i, b in enumerate(visits)),
             f"%{len(visits) + 1} = norm (%{len(visits)})", f"output %{len(visits) + 1}"]
    program = from_lines(*lines)
    cost_ = cost(program, tiny())
    blocks = ("projection", "attention", "mlp")
    for c in blocks:
        assert sp.expand(cost_.flops[c] - ratio * cost_.stock.flops[c]) == 0
    assert cost_.flops["head"] == cost_.stock.flops["head"]
    assert visit_equivalents(program) / 4 == ratio
    assert cost_.at("KV slots", 9) == len(visits)
    assert cost_["KV bytes"] == ratio * cost_.stock["KV bytes"]
    used = len(set(visits))
    block = tiny().blocks[0].weights.total
    assert cost_.at("parameters unique", 9) == tiny().parameters - (4 - used) * block
    assert cost_.at("parameters visited", 9) == cost_.stock.at("parameters visited", 9) + (len(visits) - 4) * block


def test_routed_visits_scale_with_their_share():
    """Queries and own keys of a quarter of the tokens: projections a quarter, attention about a sixteenth."""
    routed = from_lines(
        "%0 = embed", "%1 = block 0 (%0) slot 0", "%2 = linear router (%1) out 1 bias false",
        "%3 = route topk (%2) capacity 0.25", "%4 = gather (%1, %3)", "%5 = block 1 (%4) slot 1",
        "%6 = scatter (%1, %5, %3)", "%7 = norm (%6)", "output %7",
    )
    cost_, block = cost(routed, tiny(), attention="dense"), tiny().blocks[1].count
    one = cost(from_lines("%0 = embed", "%1 = block 0 (%0) slot 0", "%2 = norm (%1)", "output %2"), tiny(),
               attention="dense")

    def extra(c, tokens):
        return cost_.evaluate(cost_.flops[c], tokens, 3) - one.evaluate(one.flops[c], tokens, 3)

    whole = block.flops("dense")
    for tokens in (40, 43):
        k = tokens // 4
        assert extra("projection", tokens) == whole["projection"].subs({B: 3, n: k})
        assert extra("attention", tokens) == whole["attention"].subs({B: 3, n: k})
    assert extra("attention", 40) / whole["attention"].subs({B: 3, n: 40}) == sp.Rational(1, 16)
    assert cost_.at("KV bytes", 40) == one.at("KV bytes", 40) * 5 / 4
    assert cost_.flops["new"] == 2 * 32 * B * n
    assert visit_equivalents(routed) == sp.Rational(5, 4)
    # One decoded token takes the visit with probability 1/4, and then reads a quarter of the keys.
    deepest = cost_["FLOPs decode, deepest token"] - one["FLOPs decode"] - 2 * 32 * B
    expected = cost_["FLOPs decode"] - one["FLOPs decode"] - 2 * 32 * B
    assert sp.expand(4 * expected - deepest) == 0


def test_shared_keys_need_no_keys_of_their_own():
    """The second visit reads the first one's slot: no second slot, and no key and value projections."""
    lines = ["%0 = embed", "%1 = block 0 (%0) slot 0", "%2 = block 0 (%1) slot 1", "%3 = norm (%2)", "output %3"]
    own = cost(from_lines(*lines), tiny())
    lines[2] = "%2 = block 0 (%1) slot 1 keys 0"
    shared = cost(from_lines(*lines), tiny())
    assert own.flops["projection"] - shared.flops["projection"] == 2 * 2 * 32 * 16 * B * n
    assert own.flops["attention"] == shared.flops["attention"]
    assert own["KV bytes"] == 2 * shared["KV bytes"]
    assert own["KV bytes read, decode"] == shared["KV bytes read, decode"]
    assert any("needs no keys and values" in note for note in shared.notes)


def test_a_choice_needs_an_expected_share():
    program = from_lines(
        "%0 = embed", "%1 = linear router (%0) out 1 bias false", "%2 = route threshold (%1)",
        "%3 = gather (%0, %2)", "%4 = block 0 (%3) slot 0", "%5 = scatter (%0, %4, %2)", "%6 = norm (%5)", "output %6",
    )
    assert visit_equivalents(program) == 1
    assert visit_equivalents(program, {"2": 0.3}) == sp.Rational(3, 10)
    assert any("depends on the data" in note for note in cost(program, tiny()).notes)
    with pytest.raises(SpecError, match="expected names of routes"):
        cost(program, tiny(), capacities={"5": 0.5})
    with pytest.raises(SpecError, match="share between 0 and 1, got 2"):
        cost(program, tiny(), capacities={"2": 2})


def test_loops_of_one_token_stack_when_they_read_the_previous_token():
    """Cross-loop parallelism is found in the dependences: two loops, four calls per token."""
    loops = from_lines(
        "%0 = embed", *(f"%{i + 1} = block {i} (%{i}) slot {i}" for i in range(4)),
        "%5 = delay 1 (%4)", "%6 = add (%0, %5)",
        *(f"%{7 + i} = block {i} (%{6 + i}) slot {4 + i} keys {i}" for i in range(4)), "%11 = norm (%10)", "output %11",
    )
    assert stacks(loops) == (("1", "7"), ("2", "8"), ("3", "9"), ("4", "10"))
    cost_ = cost(loops, tiny())
    assert cost_.at("decode block calls", 50) == 4
    assert cost_.at("weight bytes decode", 50) == cost_.stock.at("weight bytes decode", 50)
    plain_loops = from_lines(
        "%0 = embed", *(f"%{i + 1} = block {i % 4} (%{i}) slot {i}" for i in range(8)), "%9 = norm (%8)", "output %9"
    )
    assert len(stacks(plain_loops)) == 8
    assert cost(plain_loops, tiny()).at("decode block calls", 50) == 8


def test_pads_lengthen_the_visits_behind_them():
    padded = from_lines("%0 = embed", "%1 = pad 5 (%0)", "%2 = block 0 (%1) slot 0", "%3 = trim 5 (%2)",
                        "%4 = norm (%3)", "output %4")
    one = from_lines("%0 = embed", "%1 = block 0 (%0) slot 0", "%2 = norm (%1)", "output %2")
    longer, plain_ = cost(padded, tiny()), cost(one, tiny())
    for c in ("projection", "mlp", "attention"):
        assert longer.evaluate(longer.flops[c], 20) == plain_.evaluate(plain_.flops[c], 25)
    assert longer.evaluate(longer.flops["head"], 20) == plain_.evaluate(plain_.flops["head"], 20)


def test_gates_and_their_window():
    """PLT's gate: one sigmoid per head from the query; its own keys are kept for a window only."""
    gated = from_lines("%0 = embed", "%1 = block 0 (%0) slot 0", "%2 = block 0 (%1) slot 1 keys 0 gate g window 4",
                       "%3 = norm (%2)", "output %3")
    cost_ = cost(gated, tiny())
    assert cost_.at("parameters new", 9) == 4 * (8 + 1)
    assert cost_.flops["new"] == 2 * 4 * 8 * B * n
    assert cost_.at("KV bytes", 100) == 4 * 32 * (100 + 4)
    assert cost_.at("KV bytes, whole slots", 100) == 4 * 32 * 200
    assert cost_.at("KV bytes read, decode", 100) == 4 * 32 * (100 + 100 + 4)


def test_held_bytes_equal_a_real_cache():
    """What the report says a state holds is what the state of a transformed model holds."""
    dp = pytest.importorskip("depthpass")
    model = zoo.model("llama")
    turbo_model = dp.transform(model, TurboConn(bridges=((3, 0), (2, 1)), group=3, rank=5))
    cache = dp.DepthCache(turbo_model)
    ids = torch.randint(3, zoo.VOCABULARY, (2, 11))
    with torch.no_grad():
        turbo_model(input_ids=ids, past_key_values=cache, use_cache=True)
    kv, lines = cache.state.nbytes()
    cost_ = cost(turbo_model.depth_program, model_cost(model))
    assert (cost_.at("KV bytes, whole slots", 11, 2), cost_.at("delay line bytes", 11, 2)) == (kv, lines)
    new = sum(p.numel() for name, p in turbo_model.named_parameters() if name.startswith("depth."))
    assert cost_.at("parameters new", 11) == new
    assert cost_.at("parameters unique", 11) == sum(p.numel() for p in turbo_model.parameters())


@settings(max_examples=40)
@given(programs(max_blocks=4, width=32))
def test_every_random_program_has_a_cost(program):
    if program.blocks != 4:
        program = parse_program(str(program).replace(f"blocks={program.blocks}", "blocks=4"))
    try:
        schedule(program)
    except PassError:
        reject()  # a top-k route on a delay cycle
    cost_ = cost(program, tiny())
    for row in cost_.rows(37, 2):
        assert row.value >= 0, row
    assert cost_.at("FLOPs forward", 37, 2) == sum(r.value for r in cost_.flop_rows(37, 2))
    if not any(o.kind == "pad" for o in program):
        assert cost_.at("serial block calls", 37) == cost_.schedule.steps(37)
    assert cost_.at("KV bytes", 37) <= cost_.at("KV bytes, whole slots", 37)
    assert cost_.at("decode block calls", 37) <= len(program.visits)
    inside = sum(cost_.evaluate(r.flops, 37, 2) for r in cost_.regions)
    outside = sum(cost_.evaluate(e, 37, 2) for c, e in cost_.flops.items() if c in ("embed", "norm", "head"))
    assert inside + outside == pytest.approx(cost_.at("FLOPs forward", 37, 2))


def test_bad_input_is_explained():
    cost_ = cost(STOCK, tiny())
    with pytest.raises(InputError, match="tokens: expected an integer of at least 1, got -5"):
        cost_.rows(-5)
    with pytest.raises(InputError, match="batch: expected an integer of at least 1, got 0"):
        cost_.at("KV bytes", 5, 0)
    with pytest.raises(InputError, match="no serial region"):
        cost_.at("KV bytes", 5, 1, group=4)
    with pytest.raises(SpecError, match=r"no quantity .KV byte.\. Did you mean .KV bytes."):
        cost_["KV byte"]
    with pytest.raises(SpecError, match="attention: expected one of visible, dense, got 'sparse'"):
        cost(STOCK, tiny(), attention="sparse")
    with pytest.raises(SpecError, match="the model has 16 of width 2048"):
        cost(STOCK, llama_1b())
    with pytest.raises(SpecError, match="chunk: expected at most 4"):
        cost(turbo(4), llama_1b(), chunk=5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_flops_of_a_visits_lora_are_those_that_torch_counts(name):
    """Beside the same loop without it: forward, backward, and with a frozen base only what the LoRA needs."""
    stock = zoo.model(name)
    ids = torch.randint(3, zoo.VOCABULARY, (2, 19))
    measured, counted = [], []
    for rank in (None, 3):
        model = dp.transform(stock, dp.Loop(1, 3, times=3, lora_rank=rank))
        model(input_ids=ids, use_cache=False)
        with FlopCounterMode(display=False) as forward:
            loss = model(input_ids=ids, use_cache=False).logits.sum()
        with FlopCounterMode(display=False) as backward:
            loss.backward()
        measured.append((forward.get_total_flops(), backward.get_total_flops()))
        actual = dp.report(model, seq_len=19, batch=2).cost
        counted.append((actual.at("FLOPs forward", 19, 2), actual.at("FLOPs backward", 19, 2)))
    added = [b - a for a, b in zip(*measured)]
    assert [b - a for a, b in zip(*counted)] == added and min(added) > 0
    assert actual.evaluate(actual.flops["new"], 19, 2) == actual.evaluate(actual.flops["new"], 190, 1) == added[0]
    assert sum(p.numel() for p in model.depth.parameters()) == actual.at("parameters new", 19)


def test_a_lora_in_a_token_loop_is_multiplied_out_for_every_chunk():
    spec = [dp.Loop(1, 3, times=2, lora_rank=2), dp.TurboConn(bridges=[(4, 1)], group=3, rank=2)]
    bare = [replace(spec[0], lora_rank=None), spec[1]]
    actual, plain_ = (dp.report(zoo.config("llama"), s, seq_len=20).cost for s in (spec, bare))
    once = sum(2 * 2 * a * b for _, a, b in actual.model.blocks[1].matrices)
    # Visits 2, 3 and 4 of 1 2 1 2 lie on the cycle, 1 does not.
    assert actual.evaluate(actual.flops["new"] - plain_.flops["new"], 20) == once + 3 * 7 * once
    chunked = actual.regions[1]
    assert (chunked.serial, chunked.visits) == (True, 3)
    assert actual.evaluate(chunked.flops - plain_.regions[1].flops, 20) == 3 * 7 * once
