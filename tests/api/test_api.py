"""Comparisons, twins, the one-line summary, the logger and the progress line."""

import copy
import inspect
import logging
import pickle
import sys

import pytest
import torch
import zoo
from turbos import enliven

import depthpass as dp
from depthpass.log import working

CONFIG = {
    "model_type": "llama", "num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 128, "tie_word_embeddings": False,
}
LOOP = dp.Loop(start=1, end=3, times=3)


@pytest.fixture(scope="module")
def looped():
    return dp.report(CONFIG, LOOP, seq_len=32, batch=2)


def block_flops(width, n=32, batch=2):
    """Forward FLOPs of one block, by hand: q and o, k and v, the three matrices of the MLP, scores and values."""
    weights = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * width
    return 2 * batch * n * weights


def test_a_twin_by_flops_has_the_blocks_that_the_loop_visits(looped):
    config = dp.twin(looped, by="flops")
    # Eight visits of equal blocks: a stock model of eight blocks does the same work, but for what the loop itself adds.
    assert config.num_hidden_layers == 8 and abs(config.intermediate_size - 128) <= 8
    own = dp.report(config, seq_len=32, batch=2)
    wanted, got = (r.cost.at("FLOPs forward", 32, 2) for r in (looped, own))
    assert got == pytest.approx(wanted, rel=0.01)
    # The distance of the two configs is eight against four blocks.
    stock = looped.cost.stock.at("FLOPs forward", 32, 2)
    assert got - stock > 4 * block_flops(120)


def test_a_twin_by_parameters_counts_what_the_passes_add():
    report = dp.report(CONFIG, dp.TurboConn(bridges=[(3, 0), (2, 1)], group=2, rank=40), seq_len=32, batch=2, cost=False)
    config = dp.twin(report, by="params")
    added = 2 * (64 * 40 + 40 * 64)
    block = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64
    assert config.num_hidden_layers == 4 and added < block
    # A wider MLP takes up the rest: three matrices per block, in steps of 8.
    assert config.intermediate_size == 128 + 8 * round(added / (4 * 3 * 64) / 8)


def test_a_twin_keeps_per_layer_lists_and_says_what_it_cannot(looped, caplog):
    kinds = ["sliding_attention", "sliding_attention", "full_attention", "full_attention"]
    config = CONFIG | {"model_type": "qwen2", "layer_types": kinds, "use_sliding_window": True, "sliding_window": 4}
    with caplog.at_level("INFO", logger="depthpass"):
        twin = dp.twin(dp.report(config, dp.Loop(start=0, end=4, times=2), seq_len=8, cost=False), by="params")
    assert twin.num_hidden_layers == 4 and twin.layer_types == kinds  # a loop has no parameters of its own
    assert "twin by params" in caplog.text
    with pytest.raises(dp.SpecError, match="needs a report with its cost"):
        dp.twin(dp.report(CONFIG, LOOP, cost=False))
    with pytest.raises(dp.SpecError, match=r"expected 'flops' or 'params', got 'flop'\. Did you mean 'flops'"):
        dp.twin(looped, by="flop")
    with pytest.raises(dp.SpecError, match="got one on a program alone"):
        dp.twin(dp.report(None, program=looped.program, cost=False), by="params")


def test_specs_side_by_side():
    table = dp.compare(CONFIG, [None, LOOP, dp.Identity()], seq_len=8, cost=False)
    assert table.names == ("stock", "loop(start=1, end=3, times=3)", "identity()")
    depths = [r.depth_at(8) for r in table.reports]
    assert depths == [4, 8, 4]
    named = dp.compare(CONFIG, {"base": None, "deep": "{pass: repeat, start: 0, end: 4, times: 2}"}, seq_len=8, cost=False)
    assert named.names == ("base", "deep") and named.reports[1].depth_at(8) == 8
    with pytest.raises(dp.SpecError, match="several specs"):
        dp.compare(CONFIG, LOOP)
    with pytest.raises(dp.SpecError, match="'identity\\(\\)' twice"):
        dp.compare(CONFIG, [dp.Identity(), dp.Identity()])


def test_groups_side_by_side():
    table = dp.sweep(CONFIG, dp.TurboConn(bridges=[(3, 0)], rank=8), [1, 4], seq_len=16, cost=False)
    assert table.names == ("1", "4")
    assert [r.schedule.chunk for r in table.reports] == [1, 4]
    assert table.reports[0].depth_at(16) > table.reports[1].depth_at(16)


def test_a_model_in_one_line():
    stock = enliven(zoo.model("llama", 3), std=0.2)
    turbo = dp.transform(stock, [dp.Loop(start=1, end=2, times=2), dp.TurboConn(bridges=[(2, 0)], group=2, rank=4)])
    for p in stock.parameters():
        p.requires_grad_(False)
    new = sum(p.numel() for p in dp.new_parameters(turbo))
    whole = new + sum(p.numel() for p in stock.parameters())
    line = dp.summary(turbo)
    assert "\n" not in line and "4 visits of 3 blocks" in line
    assert line.startswith("LlamaForCausalLM, loop(start=1, end=2, times=2) + turboconn(")
    assert f"new params: {new:,} || all params: {whole:,} || trainable: {new:,} ({100 * new / whole:.4f}%)" in line
    with pytest.raises(dp.SpecError, match="expected a transformed model"):
        dp.summary(stock)


def test_captures_are_logged_and_shown_on_a_terminal_alone(monkeypatch, caplog, capsys):
    # Of a process that configures nothing Python's last resort prints warnings, and nothing below them.
    assert not logging.getLogger("depthpass").handlers and logging.lastResort.level == logging.WARNING
    turbo = dp.transform(zoo.model("llama", 2), dp.Identity())
    with caplog.at_level("INFO", logger="depthpass"), torch.no_grad():
        turbo(input_ids=torch.tensor([[3, 4, 5]]))
        turbo(input_ids=torch.tensor([[3, 4]]))
    assert [m.split(":")[0] for m in caplog.messages if "capturing" in m] == ["capturing LlamaForCausalLM"]
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with working("measuring something"):
        pass
    assert "measuring something" in capsys.readouterr().err
    assert dp.progress(False) is True
    try:
        with working("measuring something"):
            pass
        assert capsys.readouterr().err == ""
    finally:
        assert dp.progress(True) is False
    with caplog.at_level("INFO", logger="depthpass"), pytest.raises(KeyError), working("failing"):
        raise KeyError("x")
    assert "failing: KeyError after" in caplog.text


@pytest.mark.parametrize("name", ["search", "report", "emit"])
def test_a_callable_package_is_itself_from_the_first_access_on(name):
    """``dp.search.Space(..)`` as the first line of a script."""
    assert dp.__getattr__(name) is sys.modules[f"depthpass.{name}"] is getattr(dp, name)
    function = getattr(getattr(dp, name), name)
    assert callable(getattr(dp, name)) and inspect.signature(getattr(dp, name)) == inspect.signature(function)
    assert pickle.loads(pickle.dumps(getattr(dp, name))) is copy.deepcopy(getattr(dp, name)) is getattr(dp, name)


def test_new_parameters_of_a_stock_model_are_refused_by_name():
    """Also behind the wrapper of data parallelism, whose model stands in ``module``."""
    with pytest.raises(dp.SpecError, match=r"new_parameters: expected a transformed model, got Linear\. Call dp\.transform"):
        dp.new_parameters(torch.nn.Linear(2, 2))
    wrapper, held = torch.nn.Module(), torch.nn.Module()
    wrapper.module, held.depth = held, torch.nn.ParameterDict({"a": torch.zeros(3)})
    assert [p.shape for p in dp.new_parameters(wrapper)] == [(3,)]


def test_help_says_what_callable_packages_take():
    for package in (dp.report, dp.search, dp.emit):
        assert all(name in package.__doc__ for name in inspect.signature(package).parameters)
