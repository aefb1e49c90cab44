"""What objects show at a prompt and in a notebook."""

from __future__ import annotations

from dataclasses import dataclass
from html import unescape
from typing import Any

import pytest
import torch
import zoo

import depthpass as dp
from depthpass.ir import infer
from depthpass.prompt import LINES, WIDTH, at_prompt
from depthpass.report.tables import compare
from depthpass.tasks import registry as tasks
from tests.report.subjects import BAND, band, subject


@pytest.fixture(scope="module")
def public() -> list[object]:
    """What public calls give back, of long programs where length matters."""
    model = dp.transform(zoo.model("llama"), dp.Loop(0, 2, times=9))
    batch = {"input_ids": torch.randint(1, 30, (2, 9)), "labels": torch.randint(1, 30, (2, 9))}
    report = band(cost=True)
    return [
        report, report.program, report.schedule, report.schedule.regions[0], report.cost, report.depths[None], report.facts,
        report.sections[0],
        subject(), compare(subject(), [("stock", None), ("band", BAND)], cost=False), model.depth_program, dp.DepthCache(model),
        dp.logit_lens(model, batch["input_ids"]), dp.gradients(model, batch),
        dp.gradients(model, {"a": [batch], "b": [batch]}), model._depth.plans.current, report.cost.model, report.critical_path[0],
        report.complexity[0], dp.FlopsLedger(), dp.LatentCurriculum(1, 3), dp.ShiftSchedule(3), dp.CapacityWarmup(9),
        tasks.get("parity"), *dp.load_spec(BAND), dp.FixedPoint(),
        tasks.get("large_add").instance(40, 0), *states(model, batch), dp.recipes.huginn(30),
    ]


def states(model: Any, batch: dict[str, torch.Tensor]) -> list[object]:
    """The model itself, its new parameters, and what its calls leave behind."""
    bridged = dp.transform(zoo.model("llama"), dp.TurboConn(bridges=[(2, 0)], group=2, rank=2), schedule="fixed_point")
    swept = bridged(**batch).sweeps[0]
    cache = bridged(input_ids=batch["input_ids"], past_key_values=dp.DepthCache(bridged)).past_key_values
    op = bridged.depth_program.ops[0]
    model.generate(batch["input_ids"], max_new_tokens=3, do_sample=False, draft="loop:1")
    return [model, model.depth, bridged, bridged.depth, bridged.depth_lowered, swept, model.depth_drafted, cache.layers[0], op,
            infer(bridged.depth_program)[op.name]]


def test_a_model_is_a_card_at_a_prompt_and_its_modules_in_print(public: list[object]) -> None:
    model = next(m for m in public if isinstance(m, dp.DepthModel))
    assert repr(model).startswith("LlamaForCausalLM, transformed by depthpass\n  spec        loop(end=2, times=9)\n")
    assert str(model).startswith("LlamaForCausalLM(\n") and "(q_proj): Linear(" in str(model)
    # As a part of a wrapper's tree, PEFT's say, it is a tree.
    assert "    (q_proj): Linear(" in repr(torch.nn.Sequential(model))
    assert model.depth_lowered is not None and not repr(dp.restore(model)).startswith("LlamaForCausalLM, transformed")


def test_no_object_fills_the_screen(public: list[object]) -> None:
    for shown in public:
        lines = repr(shown).splitlines()
        assert len(lines) <= LINES and max(map(len, lines)) <= 400, (type(shown), lines)
        assert type(shown).__name__ in repr(shown) or repr(shown)[:20] == str(shown)[:20]


def test_notebooks_show_the_same_in_their_own_colours(public: list[object]) -> None:
    for value in public:
        html = value._repr_html_()  # type: ignore[attr-defined]
        assert "color:inherit" in html or "dp-page" in html or "prefers-color-scheme" in html, type(value)


def test_long_texts_and_many_fields_are_cut_with_a_word_on_the_rest() -> None:
    @at_prompt
    class Long:
        def __str__(self) -> str:
            return "\n".join(["x" * 500] * 40)

    @at_prompt
    @dataclass
    class Card:
        weight: torch.Tensor
        many: tuple[int, ...]
        words: str

    lines = repr(Long()).splitlines()
    assert len(lines) == LINES and len(lines[0]) == WIDTH and lines[-1] == "... 29 more lines: print(...) shows them"
    shown = repr(Card(torch.zeros(2, 3), tuple(range(9)), "<b>")).splitlines()
    assert shown == ["Card", "  weight  float32 [2, 3]", "  many    9 of int", "  words   '<b>'"]
    assert "'<b>'" in unescape(Card(torch.zeros(1), (), "<b>")._repr_html_()) and "<b>" not in Card(
        torch.zeros(1), (), "<b>")._repr_html_()
