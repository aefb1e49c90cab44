"""Numbers of reports, against counts made by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import sympy
import torch
import zoo
from transformers import AutoConfig

import depthpass
import depthpass as dp
import depthpass.report as package
from depthpass.analysis.closed_form import n
from depthpass.analysis.roofline import assumed
from depthpass.errors import InputError, PassError, SpecError, UnsupportedModelError
from depthpass.ir import plain
from depthpass.report import Subject, build_report, report
from depthpass.schedule import schedule
from depthpass.tasks.shapes import parity
from tests.analysis.systems import bridged, parallel_loops, recursions
from tests.report.subjects import BAND, LLAMA_1B, band, small, subject


def test_the_published_1b_layout() -> None:
    shown = band()
    assert shown.depth == 16 + 14 * sympy.floor((n - 1) / sympy.Integer(4))
    assert (shown.depth_at(155), shown.depth_at(1), shown.depth_at(4097)) == (548, 16, 16 + 14 * 1024)
    assert (shown.serial_blocks, shown.visits, shown.chunk) == (14, 16, 4)
    assert shown.recursions == math.ceil(155 / 4) == 39
    assert shown.serial_block_calls == 14 * 39 + 2
    assert shown.new_parameters == 15 * ((2048 * 120 + 120) + (120 * 2048 + 2048)) == 7_405_320
    assert len(shown.program.slots) == 16
    assert len(shown.delay_lines) == 15 and shown.delay_line_values == 15 * 4 * 120
    assert shown.kv_bytes == 8 * 155 * 16 * 2 * 8 * 64 * 2
    assert shown.number("delay_line_bytes").value == 15 * 4 * 120 * 8 * 2
    assert shown.number("stock_parameters").value == 1_235_814_400


def test_critical_path_by_token() -> None:
    shown = band()
    assert [s.token for s in shown.critical_path] == list(range(2, 155, 4))
    assert shown.critical_path[0].blocks == tuple(range(15))
    assert all(s.blocks == tuple(range(1, 15)) for s in shown.critical_path[1:-1])
    assert shown.critical_path[-1].blocks == tuple(range(1, 16))
    assert shown.path_is_whole


def test_long_paths_are_kept_from_their_end() -> None:
    replaced = replace(small(), seq_len=9001)
    assert replaced.depth_at(9001) == 4 + 4500
    assert not replaced.path_is_whole
    assert sum(len(s.visits) for s in replaced.critical_path) == 2000
    assert replaced.critical_path[-1].token == 9000


def test_the_stock_model() -> None:
    shown = subject().report(None, seq_len=10, cost=False)
    assert (shown.depth, shown.serial_blocks, shown.chunk, shown.recursions) == (16, 0, None, 1)
    assert (shown.serial_block_calls, shown.new_parameters, shown.delay_line_values) == (16, 0, 0)
    assert shown.number("kv_bytes").ratio == 1.0


def test_a_smaller_chunk_changes_the_schedule_only() -> None:
    shown = subject().report(BAND, seq_len=155, chunk=2, cost=False)
    assert shown.depth == band().depth
    assert (shown.chunk, shown.recursions, shown.serial_block_calls) == (2, 78, 14 * 78 + 2)


def test_gated_windows_keep_fewer_keys() -> None:
    """Parallel loops: the first keeps all keys, each later one a window; 1.4 percent at 4.6k tokens (R = 2, W = 64)."""
    program = parallel_loops(16, 2, window=64)
    facts = replace(subject().facts, width=8)
    shown = build_report(program, schedule(program), facts, 4600, 1)
    per_token = 2 * 8 * 64 * 2
    assert shown.kv_bytes == 16 * per_token * (4600 + 64)
    assert shown.number("kv_bytes").ratio == pytest.approx(1 + 64 / 4600)
    assert round(100 * (shown.number("kv_bytes").ratio - 1), 1) == 1.4
    assert shown.slot_tokens == {**dict.fromkeys(range(16), 4600), **dict.fromkeys(range(16, 32), 64)}


SIZED_BY_BLOCKS = {
    "query gates": ("llama", dp.ParallelLoop(loops=2, window=4)),
    "hidden gates": ("qwen3", dp.ParallelLoop(loops=2, window=4, gate="hidden")),
    "per-visit LoRA": ("gpt2", dp.Loop(1, 3, times=3, lora_rank=2)),
    "LoRA of a drawn count": ("llama", dp.Loop(1, 3, times=(1, 4), lora_rank=2)),
    "a balancing bias is no parameter": ("llama", dp.MixtureOfRecursions(start=1, router="token", balancing="loss_free")),
}


@pytest.mark.parametrize("case", SIZED_BY_BLOCKS)
def test_new_parameters_are_counted_on_models_and_sized_on_configs(case: str) -> None:
    name, spec = SIZED_BY_BLOCKS[case]
    stock = zoo.model(name)
    model = dp.transform(stock, spec)
    want = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in stock.parameters())
    for source, given in ((model, None), (stock, spec), (zoo.config(name), spec)):
        shown = dp.report(source, given, seq_len=9, cost=False)
        assert (shown.new_parameters, shown.unsized_parameters, want > 0) == (want, (), True)
        assert shown.number("new_parameters").figure == f"{want:,}"
        assert f"{want:,} new" in str(shown)


def test_a_model_with_fewer_loops_than_it_was_made_for_keeps_its_parameters() -> None:
    model = dp.transform(zoo.model("llama"), dp.Loop(1, 3, times=4, lora_rank=2))
    before = dp.report(model, seq_len=5, cost=False).new_parameters
    assert dp.report(dp.set_loops(model, 2), seq_len=5, cost=False).new_parameters == before


def test_parameters_that_nothing_sizes_are_a_lower_bound_by_name() -> None:
    program = parallel_loops(2, 2)
    shown = build_report(program, schedule(program), None, 5, 1)
    assert shown.unsized_parameters == ("g0", "g1")
    number = shown.number("new_parameters")
    assert "g0, g1" in number.note and number.text == "at least 0 parameters"
    assert "<b>at least 0</b>" in shown.to_html() and "at least 0" in str(shown) and "at least 0" in shown.to_text()
    assert shown.to_dict()["numbers"]["new_parameters"]["at_least"] is True
    assert any("attention gates" in line for line in shown.not_counted)


def test_taps_have_a_depth_of_their_own() -> None:
    shown = small()
    assert shown.depths["middle"].at(7) == 3 + 3
    assert shown.number("depth_at_n.middle").value == 6
    assert shown.number("depth_rate").value == Fraction(1, 2)


def test_pads_lengthen_the_token_loop_and_the_cache() -> None:
    program = bridged(6, [(5, 1, 3)], pads=4)
    shown = build_report(program, schedule(program), None, 64, 1)
    assert shown.recursions == math.ceil((64 + 4) / 3)
    assert shown.serial_block_calls == 4 * math.ceil(68 / 3) + 2
    assert shown.depth_at(64) == 6 + 4 * (67 // 3) == shown.serial_block_calls
    assert set(shown.slot_tokens.values()) == {68}
    assert "4 pads" in shown.number("recursions").note


def test_routes_are_said_to_be_bounds() -> None:
    program = recursions(2, 3, "topk")
    shown = build_report(program, schedule(program), None, 64, 1)
    assert shown.depth == 8
    assert any("Routes" in line for line in shown.not_counted)


def test_cost_agrees_with_the_rest_of_the_report() -> None:
    shown, plainer = band(cost=True), band()
    cost = shown.cost
    assert shown.kv_bytes == plainer.kv_bytes == cost.at("KV bytes", 155, 8)
    assert cost.at("delay line bytes", 155, 8) == shown.number("delay_line_bytes").value
    assert cost.at("serial block calls", 155, 8) == shown.serial_block_calls
    assert cost.at("serial steps", 155, 8) == shown.recursions
    assert cost.at("parameters new", 155, 8) == shown.new_parameters
    assert cost.at("KV slots", 155, 8) == len(shown.program.slots)
    assert shown.number("cost_flops_forward").ratio > 1
    assert not any("ask for the cost analysis" in line for line in shown.not_counted)


def test_times_and_tasks() -> None:
    shown = subject().report(BAND, seq_len=155, batch=8, ceilings=assumed("h200"), task=parity(155, "chain"))
    assert shown.number("cost_floor_forward").value > shown.number("cost_floor_forward").stock > 0
    assert shown.sufficiency.needed_depth == parity(155, "chain").depth
    assert shown.number("task_sufficient").value == "yes"
    stock = subject().report(None, seq_len=155, task=parity(155, "chain"), cost=False)
    assert stock.number("task_missing_depth").value == parity(155, "chain").depth - 16


def test_what_is_proven_depends_on_the_program() -> None:
    stock = subject().report(None, seq_len=4, cost=False).complexity
    assert any("AC^0" in s.claim for s in stock)
    assert any("delays" in s.claim and s.status == "no statement" for s in band().complexity)


def test_a_transformed_model_reports_itself() -> None:
    model = zoo.model("llama")
    spec = "{pass: turboconn, bridges: [[3, 0], [2, 1]], group: 3, rank: 5}"
    turbo = depthpass.transform(model, spec)
    own = report(turbo, seq_len=20, batch=2, cost=False)
    planned = report(model, spec, seq_len=20, batch=2, cost=False)
    assert own.program == planned.program and own.spec == planned.spec
    assert own.depth_at(20) == 4 + 3 * 6
    assert not own.facts.from_config and own.facts == planned.facts
    assert own.new_parameters == sum(p.numel() for p in turbo.depth.parameters())
    assert own.facts.parameters == sum(p.numel() for p in model.parameters())
    with pytest.raises(SpecError, match="already transformed"):
        report(turbo, spec)


def test_every_form_of_a_model_gives_the_same_report(tmp_path) -> None:
    config = zoo.config("gpt2", layers=6)
    config.save_pretrained(tmp_path)
    spec = "{pass: turboconn, bridges: [[5, 1]], group: 2, rank: 3}"
    with torch.device("cpu"):
        model = zoo.model("gpt2", layers=6)
    forms = [config, tmp_path, str(tmp_path / "config.json"), config.to_dict(), model]
    reports = [report(form, spec, seq_len=9, cost=False) for form in forms]
    assert {m.depth_at(9) for m in reports} == {6 + 4 * 4}
    assert len({m.program for m in reports}) == 1
    assert [m.facts.from_config for m in reports] == [True] * 4 + [False]


def test_program_text_instead_of_a_spec() -> None:
    config = zoo.config("llama", layers=3)
    text = "program M blocks=3 width=32\n %0 = embed\n %1 = block 2 (%0) slot 0\n %2 = norm (%1)\n output %2"
    shown = report(config, program=text, seq_len=5, cost=False)
    assert (shown.depth, shown.serial_blocks) == (1, 0)
    assert report(None, program=text, seq_len=5).depth == 1
    with pytest.raises(SpecError, match="got both"):
        report(config, BAND, program=text)
    with pytest.raises(SpecError, match="got none"):
        report(None)
    with pytest.raises(SpecError, match="the program is for 3 blocks of width 32, the model has 2"):
        report(zoo.config("llama", layers=2), program=text, cost=False)


def test_the_package_is_the_function() -> None:
    assert depthpass.report is package
    assert depthpass.report(LLAMA_1B, BAND, seq_len=5, cost=False).depth_at(5) == 30


@pytest.mark.parametrize(
    ("field", "value"), [("seq_len", 0), ("seq_len", -4), ("seq_len", 2.5), ("batch", 0), ("batch", True)]
)
def test_bad_sizes(field: str, value: object) -> None:
    with pytest.raises(SpecError, match=f"{field}: expected an integer of at least 1"):
        subject().report(None, cost=False, **{field: value})


def test_bad_chunks_specs_and_models(tmp_path) -> None:
    with pytest.raises(SpecError, match="chunk: expected at most 4"):
        subject().report(BAND, chunk=8, cost=False)
    with pytest.raises(PassError, match=r"expected positions in 0\.\.15"):
        subject().report("{pass: turboconn, bridges: [[40, 0]]}", cost=False)
    with pytest.raises(SpecError, match="ceilings"):
        subject().report(BAND, cost=False, ceilings=assumed("h200"))
    with pytest.raises(InputError, match="cannot be read"):
        report(tmp_path / "confg.json")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"Did you mean 'config\.json'"):
        report(tmp_path / "confg.json")
    with pytest.raises(InputError, match="is not JSON"):
        report(tmp_path)
    with pytest.raises(InputError, match="'model_type'"):
        report({"hidden_size": 3})
    with pytest.raises(InputError, match="got int"):
        report(7)
    with pytest.raises(UnsupportedModelError, match="Did you mean 'llama'"):
        report({"model_type": "lama"})
    with pytest.raises(UnsupportedModelError, match="no class 'MyForCausalLM'"):
        report({**LLAMA_1B, "architectures": ["MyForCausalLM"]})
    with pytest.raises(UnsupportedModelError, match="no causal language model can be built") as caught:
        report(AutoConfig.for_model("t5"))
    assert len(str(caught.value)) < 400  # transformers' own message lists every class that it knows


def test_beyond_the_positions_of_the_config() -> None:
    shown = report(zoo.config("gpt2"), seq_len=500, cost=False)
    assert any("beyond the 128 positions" in line for line in shown.not_counted)


def test_subject_reads_a_model_once() -> None:
    s = Subject.of(LLAMA_1B)
    assert s.facts is s.facts
    assert s.report(BAND, seq_len=3, cost=False).facts is s.facts


def test_plain_programs_have_no_facts() -> None:
    program = plain("M", 3, 8)
    shown = build_report(program, schedule(program), None, 4, 1)
    assert shown.kv_bytes is None
    assert any("head counts" in line for line in shown.not_counted)
