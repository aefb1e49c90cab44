"""Decoders outside the table: nothing names them, structure discovery finds their blocks and masks."""

from __future__ import annotations

import pytest
import torch
import zoo
from capture.dense_run import run
from capture.support_table import FURTHER
from transformers import AutoConfig, AutoModelForCausalLM

from depthpass.capture import capture
from depthpass.capture.attention import signature_names

# One of them in every run: its keys are written in two halves, which once were lost.
QUICK = ("deepseek_v3",)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in FURTHER]
)
def test_further_model(name):
    torch.manual_seed(0)
    built = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **FURTHER[name])).eval()
    batch = zoo.batch([9, 3], "right")
    batch["position_ids"] = torch.arange(9)[None].expand(2, -1).contiguous()
    if "position_ids" not in signature_names(type(built).forward):
        del batch["position_ids"]
    captured = capture(built, batch, {})
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        got, want = run(built, captured, batch).logits, built(**batch).logits
    torch.testing.assert_close(got[real], want[real], rtol=1e-5, atol=1e-5)
