"""examples/layer_search.py runs from training to specs, at its smallest size."""

import importlib.util
from pathlib import Path

import depthpass as dp

FILE = Path(__file__).parents[2] / "examples" / "layer_search.py"


def test_the_example_runs(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("layer_search_example", FILE)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.main(["--steps", "3", "--budget", "4", "--samples", "6", "--out", str(tmp_path)])
    out = capsys.readouterr().out
    assert out.count("control: random") == out.count("control: input_blind") == 3 and "an oracle, not a method" in out
    assert isinstance(dp.load_spec(tmp_path / "best.yaml")[0], dp.LayerProgram) and (tmp_path / "heat_map.svg").exists()
