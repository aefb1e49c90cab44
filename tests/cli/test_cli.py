"""The command line, in process: what it prints, where, and with which exit code."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import zoo

from depthpass import cli
from depthpass.lowered import parse_lowered, verify_lowered

BRIDGE = "{pass: turboconn, bridges: [[5, 1]], group: 2, rank: 3}"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A six-block llama of width 32."""
    folder = tmp_path_factory.mktemp("model")
    zoo.config("llama", layers=6).save_pretrained(folder)
    return str(folder / "config.json")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    """Run a command: (exit code, standard output, standard error)."""

    def call(*args: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main([str(a) for a in args])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def test_report_in_text(run, config: str) -> None:
    code, out, err = run("report", config, "--spec", BRIDGE, "--seq-len", 21, "--batch", 3, "--no-cost")
    assert (code, err) == (0, "")
    assert re.search(r"^depth +6 +46 +7.667x  block visits: 6 \+ 4\*floor", out, re.M) and len(out.splitlines()) == 10
    assert "n = 21 tokens, 3 rows" in out
    full = run("report", config, "--spec", BRIDGE, "--seq-len", 21, "--batch", 3, "--no-cost", "--full")[1]
    assert full.startswith(out.rpartition("Not counted")[0])
    assert re.search(r"serial blocks +4 of 6 block visits", full) and "Critical path" in full


def test_report_with_cost_and_times(run, config: str) -> None:
    code, out, _ = run("report", config, "--spec", BRIDGE, "--seq-len", 21, "--ceilings", "1e12,1e11", "--json")
    data = json.loads(out)
    assert code == 0
    assert data["numbers"]["cost_floor_forward"]["value"] > 0
    assert data["cost_formulas"]["FLOPs forward"]["unit"] == "FLOP"


def test_json_is_all_there_is_on_standard_output(run, config: str, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    code, out, _ = run("report", config, "--spec", BRIDGE, "--seq-len", 8, "--no-cost", "--json", "--html", page)
    assert code == 0 and json.loads(out)["depth"]["output"]["at_n"] == 6 + 3 * 4
    assert page.read_text().startswith("<!doctype html>")


def test_markdown_and_dot(run, config: str) -> None:
    assert run("report", config, "--spec", BRIDGE, "--no-cost", "--markdown")[1].startswith("# depthpass report: Llama")
    assert run("report", config, "--spec", BRIDGE, "--no-cost", "--dot")[1].startswith('digraph "LlamaForCausalLM" {')


def test_group_and_preset(run, config: str) -> None:
    out = run("report", config, "--preset", "sparse", "--group", 3, "--no-cost", "--seq-len", 10, "--json")[1]
    sparse = json.loads(out)
    assert sparse["depth"]["output"]["formula"] == "6 + 5*floor((n - 1)/3)"
    given = json.loads(run("report", config, "--spec", BRIDGE, "--group", 7, "--no-cost", "--json")[1])
    assert given["numbers"]["chunk"]["value"] == 7


def test_program_files(run, config: str, tmp_path: Path) -> None:
    file = tmp_path / "program.txt"
    file.write_text("program M blocks=6 width=32\n %0 = embed\n %1 = block 5 (%0) slot 0\n output %1\n")
    on_model = json.loads(run("report", config, "--program", file, "--no-cost", "--json")[1])
    assert on_model["depth"]["output"]["at_n"] == 1 and on_model["from_config"] is True
    assert json.loads(run("report", "--program", file, "--json")[1])["from_config"] is None


def test_tasks(run, config: str) -> None:
    asked = ("report", config, "--no-cost", "--seq-len", 64, "--task", "edit_distance:10,10")
    assert "its DAG has depth 19, at hand 6, missing 13 block visits" in run(*asked)[1]
    out = run(*asked, "--full")[1]
    assert re.search(r"depth of its DAG +19 rounds", out) and re.search(r"missing +13 block visits", out)


def test_show_prints_the_program_around_each_pass(run, config: str) -> None:
    code, out, _ = run("show", config, "--spec", f"[{{pass: identity}}, {BRIDGE}]")
    assert code == 0
    titles = [line.split("(")[0] for line in out.splitlines() if line.startswith("#")]
    assert titles == ["# stock", "# after identity", "# after turboconn"]
    assert out.count("program LlamaForCausalLM blocks=6 width=32") == 3
    shown = json.loads(run("show", config, "--spec", BRIDGE, "--json")[1])
    assert "delay 2" in shown[1]["program"] and "delay" not in shown[0]["program"]


def test_show_prints_what_a_call_runs(run, config: str) -> None:
    code, out, _ = run("show", config, "--spec", BRIDGE, "--lowered")
    assert code == 0 and out.startswith("lowered LlamaForCausalLM call=train level=auto blocks=6 width=32")
    assert "chunks of 2 level scheduled" in out and verify_lowered(parse_lowered(out))
    shown = json.loads(run("show", config, "--spec", BRIDGE, "--lowered", "token", "--json")[1])
    assert shown["call"] == "token" and "level eager because one chunk" in shown["lowered"]
    code, _, err = run("show", config, "--lowered", "decode")
    assert code == 2 and "call: expected one of train, score" in err


def test_compare(run, config: str, tmp_path: Path) -> None:
    file = tmp_path / "long.yaml"
    file.write_text("pass: turboconn\nbridges: [[5, 0]]\ngroup: 4\n")
    code, out, _ = run("compare", config, "stock", "sparse", file, "--no-cost", "--seq-len", 9)
    assert code == 0
    assert out.splitlines()[2].split() == ["stock", "sparse", "long", "unit"]
    assert re.search(r"depth at n = 9 +6 +16 +16  block visits", out)
    differing = run("compare", config, "stock", file, "--no-cost", "--seq-len", 9, "--diff")[1]
    assert re.search(r"depth at n = 9 +6 \(1x\) +16 \(2.667x\)  block visits", differing) and "physical" not in differing


def test_names_are_specs(run, config: str, tmp_path: Path) -> None:
    """A pass or its alias, in full in what is written back; a mergekit file; nested in YAML."""
    out = json.loads(run("report", config, "--spec", "plt", "--no-cost", "--json")[1])
    assert out["spec"]["passes"] == [{"pass": "parallel_loop"}]
    assert json.loads(run("report", config, "--spec", "[{pass: ilr, reuse: [1, 2, 1, 1, 1, 1]}]", "--no-cost", "--json")[1])[
        "numbers"]["visits"]["value"] == 7
    merge = tmp_path / "merge.yml"
    merge.write_text("merge_method: passthrough\nslices:\n- sources: [{model: m, layer_range: [0, 4]}]\n"
                     "- sources: [{model: m, layer_range: [2, 6]}]\n")
    out = run("compare", config, "stock", "mod", merge, "--no-cost", "--diff")[1]
    assert re.search(r"stock +mixture_of_depths\(capacity=0.125\) +merge +unit", out)
    assert re.search(r"block visits per token +6 \(1x\) +6 \(1x\) +8 \(1.333x\)  visits", out)


def test_passes_and_presets_are_listed(run, config: str) -> None:
    from depthpass.passes.registry import ALIASES, pass_names

    code, out, _ = run("passes")
    assert code == 0 and {line.split()[0] for line in out.splitlines()[: len(pass_names())]} == set(pass_names())
    assert all(f"({alias})" in out for alias in ALIASES)
    assert re.search(r"times +an integer, default 2", run("passes", "repeat")[1])
    assert json.loads(run("passes", "plt", "--json")[1])[0]["options"]["loops"] == {"type": "an integer", "default": 2}
    assert "Did you mean 'loop'?" in run("passes", "lop")[2]
    assert "Did you mean 'stock'?" in run("compare", config, "stok", "loop")[2]
    rows = json.loads(run("presets", "--json")[1])
    assert {p["name"] for p in rows} >= {"llama-1b", "llama-8b", "sparse", "rys"}
    out = run("presets")[1]
    assert all(re.search(rf"^ +{p['name']} +{re.escape(p['what'])}$", out, re.MULTILINE) for p in rows)
    assert not re.search(r"[a-zA-Z]\(\w+=", out)  # words, not what Python prints of an object


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(run, shell: str) -> None:
    pytest.importorskip("shtab")
    code, out, _ = run("completion", shell)
    assert code == 0 and all(word in out for word in ("contraction", "--seq-len", "presets"))


def test_version(run) -> None:
    import depthpass

    assert run("--version")[:2] == (0, f"depthpass {depthpass.__version__}\n")


def test_a_task_without_a_size_has_the_size_of_the_row(run, config: str) -> None:
    for task in ("parity", "s3_word_problem", "a5_word_problem"):
        assert f"{task}(64" in run("report", config, "--no-cost", "--seq-len", 64, "--task", task)[1]
    assert "edit_distance(" in run("report", config, "--no-cost", "--seq-len", 4096, "--task", "edit_distance")[1]


def test_outputs_are_checked_before_the_work(run, config: str, tmp_path: Path, monkeypatch) -> None:
    from depthpass.report.subject import Subject

    monkeypatch.setattr(Subject, "of", lambda *_: pytest.fail("read before the output was checked"))
    for bad, why in ((tmp_path, "it is a folder"), (tmp_path / "no" / "x.html", "there is no folder")):
        code, _, err = run("report", config, "--no-cost", "--html", bad)
        assert code == 2 and why in err and "Nothing was computed yet" in err


def test_dash_is_standard_input(run, config: str, monkeypatch) -> None:
    text = Path(config).read_bytes()
    for args, given in ((["report", "-", "--spec", BRIDGE], text), (["report", config, "--spec", "-"], BRIDGE.encode())):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
        code, out, err = run(*args, "--no-cost")
        assert (code, err) == (0, "") and "turboconn(bridges=[(5, 1)], group=2, rank=3)" in out


def test_closed_streams_are_no_error(config: str, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert cli.main(["report", config, "--no-cost"]) == 0
    sys.stdout.close()


def test_listings_fit_the_terminal(run, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for command in ("passes", "presets", "tasks"):
        code, out, _ = run(command)
        assert code == 0 and max(map(len, out.splitlines())) <= 60


def test_hub_ids_fetch_the_config_alone(run, config: str, monkeypatch) -> None:
    from transformers.utils import hub

    asked = []
    monkeypatch.setattr(hub, "cached_file", lambda name, file: asked.append((name, file)) or config)
    assert json.loads(run("report", "meta-llama/Llama-3.2-1B", "--no-cost", "--json")[1])["model"] == "LlamaForCausalLM"
    assert asked == [("meta-llama/Llama-3.2-1B", "config.json")]


def test_a_hub_that_cannot_be_reached_is_one_message(run, monkeypatch) -> None:
    from transformers.utils import hub

    def offline(name, file):
        raise OSError("We couldn't connect to the hub")

    monkeypatch.setattr(hub, "cached_file", offline)
    code, _, err = run("report", "nobody/nothing", "--no-cost")
    assert code == 2 and "no such path here" in err and "couldn't connect" in err


def test_progress_is_for_terminals(capsys, monkeypatch) -> None:
    from depthpass.cli.output import Bar, working

    for shown in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda shown=shown: shown, raising=False)
        monkeypatch.setenv("TERM", "xterm")
        with working("capturing"), Bar("scoring") as bar:
            bar(1, 2)
        assert bool(capsys.readouterr().err) is shown


def test_sweep(run, config: str, tmp_path: Path) -> None:
    plot = tmp_path / "plot.svg"
    code, out, _ = run(
        "sweep", config, "--spec", BRIDGE, "--group", "1,2,4", "--seq-len", 9, "--no-cost", "--plot", plot
    )
    assert code == 0
    assert re.search(r"depth at n = 9 +38 +22 +14  block visits", out)
    assert "<svg xmlns" in plot.read_text()


def test_doctor(run, config: str) -> None:
    code, out, _ = run("doctor", config)
    assert code == 0
    assert re.search(r"ok  blocks +6 of width 32 at model.layers", out)
    assert re.search(r"ok  capture +works: 1 different blocks, 6 attention calls", out)
    topics = {f["topic"]: f for f in json.loads(run("doctor", "--json")[1])}
    assert topics["torch"]["ok"] is True and "capture" not in topics


def test_doctor_says_no(run, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": "bloom", "n_layer": 2, "hidden_size": 16, "n_head": 2, "vocab_size": 50}))
    code, out, _ = run("doctor", file)
    assert code == 1 and re.search(r"NO  capture +refused: ", out)


def test_calibrate_writes_what_report_reads(run, config: str, tmp_path: Path, monkeypatch) -> None:
    from depthpass.analysis import roofline

    measured = roofline.assumed("h200")
    monkeypatch.setattr(roofline, "ceilings", lambda device, dtype: measured)
    file = tmp_path / "machine.json"
    code, out, _ = run("calibrate", "--out", file)
    assert code == 0 and "FLOP/s" in out
    data = json.loads(run("report", config, "--ceilings", file, "--seq-len", 9, "--json")[1])
    assert data["ceilings"]["flops_per_s"] == measured.flops_per_s


def test_demo_is_imported_when_asked_for(run, monkeypatch) -> None:
    fake = types.ModuleType("depthpass.demo")
    fake.run_demo = lambda steps, group, on_step: on_step(1, steps) or 10 * steps + group  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "depthpass.demo", fake)
    assert run("demo", "--steps", "3", "--group", "2")[0] == 32
    assert run("demo", "--steps", "-3")[0] == 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["report"], "expected the path of a config.json"),
        (["repotr"], "Did you mean 'report'?"),
        (["report", "CONFIG", "--sec-len", "5"], "Did you mean '--seq-len'?"),
        (["--verison"], "Did you mean '--version'?"),
        (["report", "CONFIG", "plt.yaml"], "A spec is given with --spec plt.yaml"),
        (["show", "CONFIG", "{pass: loop}"], "A spec is given with --spec '{pass: loop}'"),
        (["tasks", "parity", "--lenghts", "4"], "Did you mean '--lengths'?"),
        (["presets", "mor"], "unrecognized arguments: mor\n"),
        (["report", "CONFIG", "--seq-len", "-5"], "expected an integer of at least 1, got '-5'"),
        (["report", "CONFIG", "--batch", "0"], "expected an integer of at least 1, got '0'"),
        (["report", "CONFIG", "--seq-len", "many"], "got 'many'"),
        (["report", "nowhere/config.json"], "cannot be read"),
        (["report", "CONFIG", "--spec", "missing.yaml"], "missing.yaml' cannot be read"),
        (["report", "CONFIG", "--spec", "{pass: turbocon}"], "Did you mean 'turboconn'?"),
        (["report", "CONFIG", "--spec", "{pass: turboconn, gruop: 3}"], "Did you mean 'group'?"),
        (["report", "CONFIG", "--spec", "{pass: turboconn, group: 0}"], "turboconn.group"),
        (["report", "CONFIG", "--preset", "llama-1"], "Did you mean 'llama-1b'?"),
        (["report", "CONFIG", "--preset", "llama-1b"], "expected a program of at least"),
        (["report", "CONFIG", "--preset", "sparse", "--spec", "{pass: identity}"], "got both"),
        (["report", "CONFIG", "--group", "3"], "--spec or --preset"),
        (["report", "CONFIG", "--spec", "{pass: identity}", "--group", "3"], "no pass of the spec has a group"),
        (["report", "CONFIG", "--preset", "sparse", "--chunk", "9", "--no-cost"], "chunk: expected at most 4"),
        (["report", "CONFIG", "--program", "missing.txt"], "program file 'missing.txt' cannot be read"),
        (["report", "CONFIG", "--ceilings", "h20", "--preset", "sparse"], "Did you mean 'h200'?"),
        (["report", "CONFIG", "--ceilings", "missing.json"], "ceilings file 'missing.json' cannot be read"),
        (["report", "CONFIG", "--ceilings", "h200", "--no-cost"], "times need the cost analysis"),
        (["report", "CONFIG", "--task", "party:3"], "Did you mean 'parity'?"),
        (["report", "CONFIG", "--task", "parity:x"], "expected NAME:SIZE"),
        (["report", "CONFIG", "--task", "parity:0"], "expected an integer of at least 1"),
        (["report", "CONFIG", "--no-cost", "--html", "nowhere/page.html"], "'nowhere/page.html' cannot be written"),
        (["report", "nowhere", "--no-cost", "--html", "nowhere/page.html"], "Nothing was computed yet"),
        (["report", "CONFIG", "--html", "/proc/page.html"], "Nothing was computed yet"),
        (["emit", "nowhere", "--out", "/proc/a/b"], "Nothing was computed yet"),
        (["search", "nowhere", "--samples", "x", "--held-out", "1"], "expected a share of at least 0 and below 1"),
        (["contraction", "nowhere", "--eps", "nan"], "expected a positive number"),
        (["calibrate", "--out", "nowhere/x.json"], "Nothing was computed yet"),
        (["completion", "fihs"], "Did you mean 'fish'?"),
        (["sweep", "CONFIG", "--group", "1,2"], "expected --spec or --preset"),
        (["sweep", "CONFIG", "--preset", "sparse", "--group", "1,0"], "got '0'"),
        (["sweep", "CONFIG", "--preset", "sparse", "--group", "2,2", "--no-cost"], "expected different numbers"),
        (["sweep", "CONFIG", "--spec", "{pass: identity}", "--group", "2"], "field 'group'"),
        (["compare", "CONFIG", "sprase"], "spec text"),
        (["show", "CONFIG", "--preset", "sparse", "--json", "--dot"], "unrecognized arguments: --dot"),
        (["doctor", "nowhere.json"], "cannot be read"),
        (["calibrate", "--dtype", "float8"], "expected one of bfloat16"),
        (["calibrate", "--device", "tpu9"], "expected a torch device"),
        ([], "required: COMMAND"),
    ],
)
def test_bad_input_is_one_clear_message(run, config: str, args: list[str], message: str) -> None:
    code, out, err = run(*(config if a == "CONFIG" else a for a in args))
    assert code == 2
    assert out == ""
    assert message in err
    assert "Traceback" not in err


def test_help_is_no_error(run) -> None:
    code, out, _ = run("report", "--help")
    assert code == 0 and "--seq-len" in out


@pytest.mark.slow
def test_as_a_process(tmp_path: Path) -> None:
    """Standard output is pure JSON also where transformers writes its warnings, and a closed pipe is no error."""
    shape = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
        "vocab_size": 128256, "max_position_embeddings": 131072, "tie_word_embeddings": True, "dtype": "bfloat16",
    }
    file = tmp_path / "config.json"
    file.write_text(json.dumps(shape))
    root = Path(cli.__file__).parents[1]
    paths = os.pathsep.join(str(root / p) for p in (".", "lowering", "kernels"))
    command = [sys.executable, "-m", "depthpass", "report", str(file), "--preset", "llama-1b", "--seq-len", "155"]
    done = subprocess.run(
        [*command, "--json"], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": paths}
    )
    numbers = json.loads(done.stdout)["numbers"]
    assert (numbers["serial_blocks"]["value"], numbers["serial_blocks"]["out_of"]) == (14, 16)
    assert numbers["depth_at_n"]["value"] == 548
    if Path("/dev/full").exists():
        # What was printed is written before the process ends in its own way, or the reader is told.
        with open("/dev/full", "w") as full:
            done = subprocess.run([*command[:3], "presets"], stdout=full, stderr=subprocess.PIPE, text=True,
                                  env={**os.environ, "PYTHONPATH": paths})
        assert done.returncode == 2 and "No space left" in done.stderr
