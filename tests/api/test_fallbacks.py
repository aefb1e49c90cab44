"""What runs otherwise than asked, or slower than it could, is said once through the logger ``depthpass``, and only once."""

from __future__ import annotations

import functools
import logging
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import zoo
from depthpass_kernels import packed_linear, select
from depthpass_lowering.executors.compiled import Compiled
from depthpass_lowering.executors.graphed import Graphed
from depthpass_lowering.executors.scheduled import Scheduled
from torch._subclasses import FakeTensorMode
from turbos import enliven, transformed

import depthpass as dp
from depthpass import log
from depthpass.hf.calls.step import advance_token
from depthpass.hf.decoding.tokens import Tokens
from depthpass.ir import plain
from depthpass.report import kept

Patch = pytest.MonkeyPatch


@functools.cache
def model() -> Any:
    """Eight damped iterations: drafts of seven cannot pay, drafts of one are seldom right."""
    return transformed("llama", dp.Loop(start=1, end=3, times=8, damped=True, inject="concat"))


def draft(spec: str) -> None:
    ids = torch.tensor([[3, 5, 7, 9]])
    model().generate(ids, do_sample=False, eos_token_id=None, pad_token_id=0, max_new_tokens=12, draft=spec, draft_tokens="auto")


@functools.cache
def bridged() -> Any:
    turbo = dp.transform(zoo.model("llama", 2, attention_dropout=0.1), dp.TurboConn(bridges=[(1, 0)], group=3, rank=6),
                         schedule=dp.FixedPoint(max_sweeps=2))
    enliven(turbo.depth, least=1)
    return turbo


def dropout(patch: Patch) -> None:
    """A call that sweeps leave to the token loop, as it is one chunk."""
    bridged().train()(**zoo.batch([3]))


def region(level: Any, patch: Patch, reason: str | None) -> None:
    """A level asked about a region that it has a reason not to run, or none."""
    patch.setattr(Scheduled if reason else Graphed, "refuse", lambda *_: reason)
    patch.setattr(Compiled, "refuse", lambda *_: reason)
    run = SimpleNamespace(context=SimpleNamespace(count=9))
    with torch.no_grad():
        level.level(run, SimpleNamespace(calls=[{"index": 1}], size=3))


def sweeps(patch: Patch) -> None:
    with torch.no_grad():
        assert bridged().eval()(**zoo.batch([20])).sweeps[0].sequential


def token(patch: Patch) -> None:
    """One decoded token over a cache that keeps residuals."""
    ids = torch.zeros(1, 1, dtype=torch.long)
    call = SimpleNamespace(tensors={"input_ids": ids}, use_cache=True, cache=SimpleNamespace(residual_bits=4), valid=None)
    runtime = SimpleNamespace(_depth=SimpleNamespace(lowering="inductor"))
    with torch.no_grad():
        assert advance_token(runtime, None, None, call, SimpleNamespace(length=3, record=False), None) is None  # type: ignore


def kernel(patch: Patch) -> None:
    select._say_reference.cache_clear() if not SAID else None
    with FakeTensorMode():
        x = torch.empty(1, device="cuda", dtype=torch.float64)
    assert select.resolve("slot_attention", "auto", x) == "naive"


def packed(patch: Patch) -> None:
    packed_linear._say_unpacked.cache_clear() if not SAID else None
    before = torch._C._get_mkldnn_enabled()  # mkldnn.flags() warns of the TF32 of Intel's GPUs
    try:
        torch._C._set_mkldnn_enabled(False)
        assert not packed_linear.blocked(torch.ones(1), torch.ones(1))
    finally:
        torch._C._set_mkldnn_enabled(before)


def unwritable(patch: Patch) -> None:
    patch.setenv(kept.VARIABLE, __file__)  # a file where the folder should be
    kept.write("key", kept.Kept(None, None))  # type: ignore[arg-type]


def no_charts(patch: Patch) -> None:
    patch.setitem(sys.modules, "matplotlib.figure", None)
    report = dp.report(None, program=plain("Llama", 1, 8), seq_len=3)
    assert "<svg" in report.to_html() and "dp-chart\"" not in report.to_html()


def processor(patch: Patch) -> None:
    class Locked:
        def __init__(self) -> None:
            self.lock = threading.Lock()

    assert list(Tokens.drafting(SimpleNamespace(processors=[Locked()]))) == []  # type: ignore[arg-type]


SAID: list[str] = []
CASES: dict[str, tuple[int, str, Callable[[Patch], object]]] = {
    "auto runs a region eager": (logging.INFO, "attention dropout is on", dropout),
    "the compiler backend runs a region eager":
        (logging.WARNING, "blocks 1 runs op by op .* because hooks", lambda p: region(Compiled(strict=False), p, "hooks")),
    "cudagraph scores without a recording": (logging.INFO, "not recorded", lambda patch: region(Graphed(), patch, None)),
    "sweeps end in the token loop": (logging.WARNING, "max_sweeps=2", sweeps),
    "a draft never pays": (logging.WARNING, "drafts nothing: a draft costs 16 visits of 18", lambda _: draft("loop:7")),
    "a draft pauses": (logging.INFO, "too few drafted tokens are kept", lambda _: draft("loop:1")),
    "a processor stays out of drafts": (logging.INFO, "Locked, which cannot be copied", processor),
    "a token is not compiled": (logging.WARNING, "'inductor' decodes a token uncompiled, because the cache keeps", token),
    "a kernel's reference on a GPU": (logging.INFO, "slot_attention runs as plain torch ops on the GPU, because", kernel),
    "weights are not packed": (logging.INFO, "do not pack their weights", packed),
    "a folder that was asked for": (logging.WARNING, "nothing is kept in", unwritable),
    "a page without charts": (logging.WARNING, "no charts: .*pip install", no_charts),
}


@pytest.mark.parametrize("case", CASES)
def test_a_fallback_is_said_once(case: str, caplog: pytest.LogCaptureFixture, monkeypatch: Patch) -> None:
    level, message, trigger = CASES[case]
    monkeypatch.setattr(log, "_said", set())
    SAID.clear()
    with caplog.at_level(level, logger="depthpass"):
        for _ in range(2):
            trigger(monkeypatch)
            SAID.append(case)
    actual = [r for r in caplog.records if r.name == "depthpass" and re.search(message, r.getMessage())]
    assert [r.levelno for r in actual] == [level], caplog.text


def test_warnings_reach_people_who_configured_nothing() -> None:
    code = "from depthpass.log import fallback as say; [say(*x) for x in [('slower', True), ('slower', True), ('x', False)]]"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "slower\n")
