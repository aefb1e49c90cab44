"""The roofline floor against the table of Llama-3.2-1B on an assumed H200."""

import pytest
import torch
from cost_models import llama_1b, tiny

from depthpass.analysis.cost import cost
from depthpass.analysis.roofline import Ceilings, Dense, Work, assumed, ceilings, floor
from depthpass.errors import InputError
from depthpass.ir import plain
from depthpass.passes import Context, apply_spec
from depthpass.passes.turboconn import TurboConn

H200 = Ceilings("h200", torch.bfloat16, 790e12, 4.3e12, "assumed", True)
LAYER, HEAD, TOKENS = 60_817_408, 128256 * 2048, 155


def layers(serial, group, *, base_trains=True, count=16):
    one = Work("layer", LAYER, Dense(LAYER), trained=base_trains)
    loop = Work("layer", LAYER, Dense(LAYER), chunk=group, trained=base_trains)
    return [one] * (count - serial) + [loop] * serial + [Work("head", HEAD, Dense(HEAD), trained=base_trains)]


GROUPS = (1, 2, 4, 6, 8, 16)
TABLE = {
    # (serial layers, base trains, weight gradients sunk): floor of a step over the plain step, by batch and group.
    (16, True, True): {8: (12.5, 6.54, 3.51, 2.50, 2.03, 1.25), 32: (3.49, 1.99, 1.23, 1.00, 1.01, 1.00)},
    (12, True, True): {8: (9.65, 5.16, 2.88, 2.12, 1.77, 1.19), 32: (2.87, 1.74, 1.18, 1.00, 1.01, 1.00)},
    (8, True, True): {8: (6.77, 3.77, 2.25, 1.75, 1.52, 1.13), 32: (2.24, 1.50, 1.12, 1.00, 1.00, 1.00)},
    (16, False, True): {8: (18.3, 9.31, 4.76, 3.25, 2.55, 1.38), 32: (4.73, 2.49, 1.35, 1.00, 1.01, 1.00)},
    (14, False, True): {8: (16.1, 8.27, 4.29, 2.97, 2.35, 1.33), 32: (4.27, 2.30, 1.31, 1.00, 1.01, 1.00)},
    (16, True, False): {8: (42.4, 21.5, 10.8, 7.3, 5.7, 2.9), 32: (10.8, 5.5, 2.87, 2.00, 1.72, 1.22)},
}


@pytest.mark.parametrize("case", TABLE)
@pytest.mark.parametrize("batch", [8, 32])
def test_floor_reproduces_the_table(case, batch):
    serial, base_trains, sink = case
    plain_step = floor(layers(0, 1, base_trains=base_trains), H200, tokens=TOKENS, batch=batch).step_s
    for group, want in zip(GROUPS, TABLE[case][batch]):
        step = floor(layers(serial, group, base_trains=base_trains), H200, tokens=TOKENS, batch=batch, sink=sink).step_s
        digits = 1 if want >= 10 or (not sink and want in (7.3, 5.7, 2.9, 5.5)) else 2
        assert round(step / plain_step, digits) == pytest.approx(want, abs=10.0**-digits * 1.01)


@pytest.mark.parametrize(("batch", "milliseconds", "frozen"), [(8, 11.6, 7.8), (32, 46.6, 31), (128, 186, 124)])
def test_plain_step_times(batch, milliseconds, frozen):
    digits = 0 if milliseconds > 100 else 1
    step = floor(layers(0, 1), H200, tokens=TOKENS, batch=batch).step_s
    assert round(1e3 * step, digits) == pytest.approx(milliseconds, abs=0.06)
    assert 1e3 * floor(layers(0, 1, base_trains=False), H200, tokens=TOKENS, batch=batch).step_s == pytest.approx(
        frozen, abs=0.5)


def test_ridge_and_the_time_of_one_layer_below_it():
    assert round(H200.ridge_rows) == 184
    assert H200.gemm_seconds(1, LAYER) == H200.gemm_seconds(183, LAYER) == pytest.approx(28.3e-6, rel=2e-3)
    assert H200.gemm_seconds(184, LAYER) > H200.gemm_seconds(183, LAYER)


def test_a_program_gives_the_same_floor_as_its_layers():
    """All 16 visits serial: a bridge from the last block to the input of the first."""
    stock = plain("LlamaForCausalLM", 16, 2048)
    for group, want in ((4, 1.23), (1, 3.49)):
        program = apply_spec(stock, TurboConn(bridges=((15, 0),), write="input", group=group), Context.of(stock))
        cost_ = cost(program, llama_1b())
        ratio = cost_.floor(H200, TOKENS, 32).step_s / cost_.stock.floor(H200, TOKENS, 32).step_s
        assert ratio == pytest.approx(want, abs=0.011)
    frozen = cost(apply_spec(stock, TurboConn(preset="llama-1b"), Context.of(stock)), llama_1b(), trainable="new")
    base = floor(layers(0, 1, base_trains=False), H200, tokens=TOKENS, batch=32).step_s
    # 14 serial layers and the bridges; block 0 needs no input gradient.
    assert frozen.floor(H200, TOKENS, 32).step_s / base == pytest.approx(1.31, abs=0.03)
    assert frozen.floor(H200, TOKENS, 32).rows()[1][2] == "s"


def test_decode_reads_every_weight_once_per_token():
    cost_ = cost(plain("LlamaForCausalLM", 16, 2048), llama_1b())
    decode = cost_.floor(H200, TOKENS, 1).decode_s
    moved = cost_.at("weight bytes decode", TOKENS) - 2 * 2048 - 2 * 2048  # an embedding row, the final norm
    assert decode == pytest.approx(moved / 4.3e12, rel=1e-6)
    loops = [Work("a", LAYER, Dense(LAYER), stack=0), Work("a again", LAYER, Dense(LAYER), stack=0)]
    one = floor(loops[:1], H200, tokens=5, batch=1).decode_s
    assert floor(loops, H200, tokens=5, batch=1).decode_s == one, "rows of one call share one read"


def test_experts_that_nobody_chose_are_not_read():
    cost_ = cost(plain("Qwen3MoeForCausalLM", 4, 32), tiny("qwen3_moe"))
    one, many = (cost_.floor(H200, 1, batch).decode_s for batch in (1, 10_000))
    assert one < many
    assert cost_.at("weight bytes decode", 1, 1) < cost_.at("weight bytes decode", 1, 64)


def test_routed_work_runs_fewer_rows():
    full = Work("all", LAYER, Dense(LAYER))
    half = Work("half", LAYER, Dense(LAYER), share=0.5)
    big = {"tokens": 10_000, "batch": 8}
    assert floor([half], H200, **big).forward_s == pytest.approx(floor([full], H200, **big).forward_s / 2)


def test_measured_ceilings_are_sane():
    actual = ceilings("cpu", torch.float32, width=64, rows=32, copies=2, repeat=1)
    assert actual.flops_per_s > 0 and actual.bytes_per_s > 0 and not actual.assumed
    assert actual.ridge_rows == pytest.approx(actual.flops_per_s * 4 / (2 * actual.bytes_per_s))
    assert "measured" in actual.source and dict((r[0], r[1]) for r in actual.rows())["dtype"] == "float32"


def test_known_devices_are_marked_as_assumed():
    known = assumed("H200")
    assert known.assumed and "assumed" in known.source
    assert known.flops_per_s == pytest.approx(790e12, rel=2e-3)
    assert known.bytes_per_s == pytest.approx(4.3e12, rel=5e-3)


def test_bad_input_is_explained():
    with pytest.raises(InputError, match=r"unknown device 'h201'\. Did you mean 'h200'\?"):
        assumed("h201")
    with pytest.raises(InputError, match="expected a torch device of this machine"):
        ceilings("cuda:77")
    with pytest.raises(InputError, match="expected a torch device of this machine"):
        ceilings("warp")
    with pytest.raises(InputError, match="device that computes, got 'meta'"):
        ceilings("meta")
    with pytest.raises(InputError, match="floating point dtype"):
        ceilings("cpu", torch.int8)
    with pytest.raises(InputError, match="flops_per_s: expected a positive number"):
        Ceilings("x", torch.bfloat16, 0, 1e12, "", True)
    with pytest.raises(InputError, match="tokens: expected an integer of at least 1"):
        floor([], H200, tokens=0, batch=1)
