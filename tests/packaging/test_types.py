"""ruff and pyright are clean, and a user's script over ``import depthpass as dp`` type-checks, completes and documents itself."""

import ast
import inspect
import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import depthpass as dp
from depthpass.passes.registry import BUILTIN

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = '''
from transformers import LlamaForCausalLM
import depthpass as dp

model = LlamaForCausalLM.from_pretrained("folder")
turbo = dp.transform(model, dp.TurboConn(group=4, bridges=[(6, 1)]), lowering="scheduled")
reveal_type(turbo)
reveal_type(turbo.depth_program)
reveal_type(dp.report(turbo, seq_len=155).seq_len)
reveal_type(dp.restore(turbo))
reveal_type(dp.LayerProgram([0, 1, 1]).layers)
with dp.using(turbo, [dp.Loop(start=1, end=2, times=3)]):
    turbo.generate(max_new_tokens=3)
try:
    dp.switch(turbo, "loop.yaml")
except dp.SpecError as error:
    print(error)
dp.transform(model, dp.Identity(), lowering="indcutor")
dp.transform(model, 3)
dp.Loop(start=1, times=2, tmies=3)
dp.transfrom(model, dp.Identity())
dp.search(model, [], methd="mcts")
'''
# What users write with every public function: nothing in it may be an error.
CALLS = '''
import torch
from transformers import LlamaForCausalLM, Trainer
import depthpass as dp

ids = torch.tensor([[1, 2, 3]])
model = LlamaForCausalLM.from_pretrained("folder")
turbo = dp.transform(model, [dp.TurboConn(group=4), dp.Taps([1])])
dp.from_pretrained("saved").generate(ids, max_new_tokens=4)
dp.attach(model, dp.TurboConn(group=4)).lm_head
dp.materialize(turbo).save_pretrained("stock")
dp.emit(turbo, "served", copies=True).joinpath("config.json")
dp.set_loops(turbo, 3).generate(ids)
dp.set_exit(turbo, 0.9, skip=True).generate(ids, draft="loop:1")
dp.switch(turbo, "loop.yaml", chunk=2).save_pretrained("switched")
with dp.using(turbo, dp.Loop(0, 2, times=2)) as plan:
    plan.program.visits
dp.set_ratios(turbo, [0.5])
dp.capacity_warmup(turbo, 0.1)
dp.only_gates(turbo)[0].numel()
dp.new_parameters(turbo)[0].numel()
str(dp.loops_of(turbo))
dp.summary(turbo).split()
dp.routing_of(turbo, turbo(input_ids=ids)).share.values()
dp.calibrate(turbo, [{"input_ids": ids}]).thresholds[0].hex()
report = dp.report(model, dp.ParallelLoop(loops=2), seq_len=8)
report.depth_at(8).bit_length()
report.to_html().split()
dp.twin(report, by="params").to_dict()
dp.compare(model, {"stock": None, "loop": dp.Loop(0, 2, times=2)}).to_markdown().split()
dp.sweep(model, dp.TurboConn(group=4), [1, 2, 4]).to_svg().split()
dp.contraction(turbo, {"input_ids": ids}).regions
dp.logit_lens(turbo, ids, top=2).settled_at().split()
dp.gradients(model, {"input_ids": ids, "labels": ids}).mad().items()
dp.search(model, [([1], [2])], space="rys").best.spec
dp.search(model, [([1], [2])], space=dp.search.Space(edits=1), method=dp.search.MCTS(penalty=5)).best.layers
dp.plot_depth([["a"]], torch.zeros(1, 1))._repr_html_()
dp.parse_program(str(turbo.depth_program)).visits
dp.load_spec(dp.dump_spec(dp.Repeat(start=1, end=2, times=2)))[0].describe().split()
dp.progress(False)
dp.DepthCache(turbo).get_seq_length().bit_length()
dp.FixedPoint(tol=1e-3).tol
dp.relay_loss({"a": ids}, ids, ids).backward()
dp.exit_loss({"a": ids}, ids, form="expected").backward()
dp.gate_loss({"a": ids}, ids).backward()
dp.aligned_targets([[[1]]], 3)[0].numel()
dp.diffusion_loss(turbo, ids, schedule="cosine").backward()
dp.denoise(turbo, ids, new_tokens=3)
dp.recipes.huginn(8).transform(model)
dp.tasks.get("parity").instance(4, 0).trace
for callback in (dp.FlopsLedger(), dp.StopAtFlops(1e9), dp.RecurrenceCurriculum(mean=4), dp.LatentCurriculum(1, 3),
                 dp.ShiftSchedule(3), dp.CapacityWarmup(100)):
    Trainer(turbo, callbacks=[callback]).train().training_loss
'''
WANTED = ["DepthModel", "Program", "int", "PreTrainedModel", "Sequence[int]"]


def pyright(*arguments, cwd):
    """What pyright says: a list of (file, line from 1, severity, message)."""
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    assert done.stdout.startswith("{"), done.stdout + done.stderr
    return [(d["file"], d["range"]["start"]["line"] + 1, d["severity"], d["message"])
            for d in json.loads(done.stdout)["generalDiagnostics"]]


def test_ruff_is_clean():
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", "."], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_pyright_is_clean_and_a_script_knows_its_types(tmp_path):
    script = tmp_path / "user.py"
    script.write_text(SCRIPT)
    calls = tmp_path / "calls.py"
    inside = [f"search.{name}" for name in dp.search.__all__ if name != "search"]
    calls.write_text(CALLS + "".join(f"reveal_type(dp.{name})\n" for name in (*dp.__all__, *inside)))
    ours = [str(ROOT / folder) for folder in ("depthpass", "kernels", "lowering")]
    said = pyright(*ours, str(script), str(calls), cwd=ROOT)
    assert not [s for s in said if s[2] == "error" and not s[0].endswith("user.py")]
    assert not [s for s in said if s[0].endswith("calls.py") and ("Unknown" in s[3] or '"Any"' in s[3])]
    mine = [s for s in said if s[0].endswith("user.py")]
    assert [m.split('" is "')[1].rstrip('"') for _, _, kind, m in mine if kind == "information"] == WANTED
    wrong = [line for line, text in enumerate(SCRIPT.split("\n"), 1)
             if "indcutor" in text or ", 3)" in text or "tmies" in text or "transfrom" in text or "methd" in text]
    assert sorted({line for _, line, kind, _ in mine if kind == "error"}) == wrong and len(wrong) == 5


def imported_for_checkers():
    """Name -> module of the imports that type checkers see."""
    tree = ast.parse((ROOT / "depthpass/__init__.py").read_text())
    block = next(n for n in tree.body if isinstance(n, ast.If))
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    return {a.name: n.module for n in block.body if isinstance(n, ast.ImportFrom) for a in n.names}


def test_checkers_see_what_attributes_give():
    rooms = dict.fromkeys(("recipes", "tasks"), "depthpass")
    assert imported_for_checkers() == {n: m for names in dp.GROUPS.values() for n, m in names.items()} | rooms
    assert sorted(dp.__all__) == sorted({*imported_for_checkers(), "GROUPS", "kernels", "lowering"})


def test_every_public_function_is_called():
    """Classes of passes and errors apart, whose constructors the dataclass and Exception give."""
    called = {n for n in dp.__all__ if f"dp.{n}" in CALLS + SCRIPT}
    rest = set(dp.__all__) - called - set(dp.GROUPS["passes"]) - set(dp.GROUPS["errors"])
    assert rest == {"GROUPS", "DepthModel", "Program", "SearchResult", "CoevolutionaryDiffusion", "LoopContrast", "kernels",
                    "lowering"}


def test_passes_are_listed():
    assert set(dp.GROUPS["passes"]) == {target.partition(":")[2] for target in BUILTIN.values()} <= set(dir(dp))


@pytest.mark.parametrize("name", sorted(n for names in dp.GROUPS.values() for n in names))
def test_every_public_name_says_what_it_is(name):
    actual = getattr(dp, name)
    text = inspect.getdoc(actual)
    assert text and not text.startswith(f"{name}("), name
    assert name in (dp.__doc__ or "")


@pytest.mark.parametrize("name,near", [("transfrom", "transform"), ("TurboCon", "TurboConn"), ("SpecErorr", "SpecError"),
                                       ("PLT", "ParallelLoop"), ("MoR", "MixtureOfRecursions")])
def test_a_misspelt_name_gets_the_nearest(name, near):
    with pytest.raises(AttributeError, match=f"no attribute '{name}'. Did you mean '{near}'"):
        getattr(dp, name)
    assert not hasattr(dp, "__wrapped__")


def test_literals_of_options_are_what_transform_takes():
    from depthpass_lowering.executors.levels import LEVELS

    from depthpass.hf import transform
    from depthpass.schedule.fixed_point import SCHEDULES

    assert transform.Lowering.__args__ == LEVELS and transform.ScheduleName.__args__ == SCHEDULES
    takes = inspect.signature(transform.transform).parameters
    assert {f.name for f in fields(dp.FixedPoint)} - {"ridge", "start", "backward"} < set(takes)


@pytest.mark.parametrize("package", ["depthpass", "lowering/depthpass_lowering", "kernels/depthpass_kernels"])
def test_packages_say_that_they_are_typed(package):
    assert (ROOT / package / "py.typed").is_file()
