"""The report as plain data, with a versioned schema."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from depthpass.analysis.closed_form import format_formula
from depthpass.report.numbers import Number, as_json

if TYPE_CHECKING:
    from depthpass.analysis.depth import Depth
    from depthpass.report.report import Report

SCHEMA = "depthpass.report"
VERSION = 1
"""Raised when a field changes its meaning or goes away; new fields may appear within a version."""


def to_dict(report: Report) -> dict[str, Any]:
    """Everything a report says; every number stands beside its unit."""
    data: dict[str, Any] = {
        "schema": SCHEMA,
        "version": VERSION,
        "model": report.model,
        "from_config": None if report.facts is None else report.facts.from_config,
        "spec": report.spec,
        "seq_len": {"value": report.seq_len, "unit": "tokens per row"},
        "batch": {"value": report.batch, "unit": "rows"},
        "program": str(report.program),
        "depth": {name or "output": _depth(report, name, d) for name, d in report.depths.items()},
        "numbers": {x.key: _number(x, s.title) for s in report.sections for x in s.numbers},
        "regions": [
            {"schedule": "serial" if r.serial else "parallel", "chunk": r.chunk, "largest_chunk": r.limit,
             "visits": [f"%{o.name}" for o in r.visits], "blocks": [o["index"] for o in r.visits]}
            for r in report.schedule.regions
        ],
        "stacks": [
            {"largest_step": step.tokens, "block_calls": step.calls,
             "sets": [{"block": s.index, "visits": [f"%{n}" for n in s.names]} for s in step.stacks]}
            for step in report.schedule.stacked
        ],
        "critical_path": {
            "whole": report.path_is_whole,
            "unit": "block visits, token by token",
            "segments": [
                {"token": s.token, "visits": [f"%{v}" for v in s.visits], "blocks": list(s.blocks)}
                for s in report.critical_path
            ],
        },
        "not_counted": list(report.not_counted),
    }
    if report.complexity is not None:
        data["complexity"] = [
            {"claim": s.claim, "premises": list(s.premises), "citation": s.citation, "status": s.status}
            for s in report.complexity
        ]
    if report.cost is not None:
        data["cost_formulas"] = {
            q.name: {"formula": str(q.expr), "unit": q.unit, "note": q.note} for q in report.cost.quantities
        }
        data["cost_regions"] = report.cost.region_rows(report.seq_len, report.batch)
    if report.ceilings is not None:
        data["ceilings"] = {**asdict(report.ceilings), "dtype": str(report.ceilings.dtype).removeprefix("torch.")}
    if report.sufficiency is not None:
        data["task"] = asdict(report.sufficiency)
    return data


def _depth(report: Report, name: str | None, d: Depth) -> dict[str, Any]:
    return {
        "formula": format_formula(report.depth if name is None else d.formula),
        "at_n": d.at(report.seq_len),
        "rate": as_json(d.rate),
        "unit": "block visits",
        "rate_unit": "block visits per token",
        "cycle_ratio": as_json(d.certificate.cycle_ratio),
        "cycle": [f"%{v}" for v in d.certificate.cycle],
        "proof": [
            {"start": r.start, "period": r.period, "step": r.step, "nodes": [str(v) for v in r.nodes]}
            for r in d.certificate.recurrences
        ],
    }


def _number(x: Number, section: str) -> dict[str, Any]:
    data = {"label": x.label, "value": as_json(x.value), "unit": x.unit, "section": section}
    if x.stock is not None:
        data |= {"stock": as_json(x.stock), "ratio": x.ratio}
    if x.out_of is not None:
        data["out_of"] = x.out_of
    if x.least:
        data["at_least"] = True
    if x.note:
        data["note"] = x.note
    return data
