"""The numbers of a report, section by section, and what they leave out."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from depthpass.report.costs import cost_sections, state_section
from depthpass.report.depths import ahead_sections, depth_section, model_section
from depthpass.report.numbers import Number, Section
from depthpass.report.runs import routing_sections, schedule_section

if TYPE_CHECKING:
    from depthpass.report.report import Report

NOT_COUNTED = (
    "Depth counts block visits; embedding, norms, head and new linear maps, gates and routers weigh 0. It is the "
    "longest path of the unrolled graph: an upper bound on the serial steps that one input needs.",
    "Depth is that of one forward pass over n given tokens; tokens that generate() feeds back add their own passes.",
)

REPEATS = {
    "depth_at_n": "depth", "depth_attention_at_n": "depth_at_n", "depth_mlp_at_n": "depth_at_n", "depth_max_at_n": "depth_at_n",
    "cost_flops_decode_deepest_token": "cost_flops_decode", "cost_kv_bytes_whole_slots": "kv_bytes",
    "cost_kv_bytes_read_decode": "kv_bytes", "cost_kv_bytes_read_decode_deepest_token": "cost_kv_bytes_read_decode",
    "cost_decode_block_calls": "visits", "cache_slots": "visits", "token_visits_max": "visits",
    "cost_parameters_unique": "stock_parameters", "token_steps": "recursions",
}
"""Rows that repeat another as long as both have one value."""

IDLE = {"delay_line_values": 0, "delay_line_bytes": 0, "cost_weight_bytes_per_serial_step": 0, "depth_rate": 0,
        "token_steps": 1}
"""Values that say nothing but that no stream is delayed."""


def sections(report: Report) -> tuple[Section, ...]:
    """All sections in the order in which they are shown."""
    ordered = [model_section(report), depth_section(report), *ahead_sections(report), *routing_sections(report),
               schedule_section(report), state_section(report)]
    if report.cost is not None:
        ordered += cost_sections(report)
    if report.sufficiency is not None:
        ordered.append(task_section(report))
    return _without_repeats(ordered)


def _without_repeats(ordered: list[Section]) -> tuple[Section, ...]:
    """Mark what people need not read twice."""
    values = {x.key: x.value for s in ordered for x in s.numbers}

    def repeats(x: Number) -> bool:
        said = x.key in REPEATS and str(x.value) == str(values.get(REPEATS[x.key]))
        return said or IDLE.get(x.key) == x.value

    return tuple(replace(s, numbers=tuple(replace(x, repeats=repeats(x)) for x in s.numbers)) for s in ordered)


def task_section(report: Report) -> Section:
    """A task's depth and width beside the program's."""
    s = report.sufficiency
    assert s is not None
    return Section(f"Task: {s.task}", (
        Number("task_needed_depth", "depth of its DAG", s.needed_depth, "rounds",
               "level by level; another algorithm may take fewer"),
        Number("task_available_depth", "depth at hand", s.available_depth, "block visits"),
        Number("task_missing_depth", "missing", s.missing_depth, "block visits"),
        Number("task_needed_tokens", "widest level of its DAG", s.needed_tokens, "tokens"),
        Number("task_sufficient", "depth and tokens cover this DAG", "yes" if s.sufficient else "no", "",
               "about this one DAG: no lower bound of the task, and nothing about what training finds"),
    ))


def not_counted(report: Report) -> tuple[str, ...]:
    """What the numbers of this report leave out."""
    notes = [*NOT_COUNTED]
    if any(o.kind == "route" for o in report.program):
        notes.append("Routes choose tokens by their data; depth is the longest over all choices.")
    if report.program.denoise is not None:
        notes.append("Work, bytes and times are those of one denoising step; depth is that of all steps.")
    if report.program.reads_calls:
        notes.append("Depth and work are those of one call: with kv='last' or 'mod:k' a cached token reads keys of later "
                     "iterations, so the function itself changes with the split into calls.")
    if report.unsized_parameters:
        notes.append("New parameters leave out attention gates and per-visit LoRA: no model or config says how large they are.")
    if report.cost is None:
        notes.append("KV bytes hold every token in every slot: sliding windows of the stock layers are not taken off.")
        notes.append("No FLOPs, weight traffic, activations or times: ask for the cost analysis.")
    else:
        notes += report.cost.notes
    if report.kv_bytes is None:
        notes.append("KV bytes: the head counts of this model are not known.")
    facts = report.facts
    if facts is not None and facts.max_positions is not None and report.seq_len > facts.max_positions:
        notes.append(f"n = {report.seq_len} is beyond the {facts.max_positions} positions that the config is made for.")
    return tuple(notes)
