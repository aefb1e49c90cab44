"""KV policies that depend on how tokens are split into calls: ``last``, ``mod:k`` and ``anchor:k``."""

import oracle_program as oracle
import pytest
import torch
import zoo
from turbos import enliven

import depthpass as dp
from depthpass.errors import VerifyError
from depthpass.ir import parse_program, verify

CALLS = [4, 1, 1, 2, 1]
LENGTHS = [9, 7]


def transformed(name, spec, layers=3):
    stock = enliven(zoo.model(name, layers, dtype=torch.float64), std=0.2)
    model = dp.transform(stock, spec)
    enliven(model.depth, seed=1, std=0.3, least=1)
    return stock, model


def in_calls(model, batch, calls):
    """Logits of all tokens, given to a cache in calls of these sizes, and the cache."""
    cache, out, end = dp.DepthCache(model), [], 0
    for size in calls:
        start, end = end, end + size
        out.append(model(
            input_ids=batch["input_ids"][:, start:end], attention_mask=batch["attention_mask"][:, :end],
            past_key_values=cache, use_cache=True,
        ).logits)
    return torch.cat(out, 1), cache


@pytest.mark.parametrize(("name", "kv", "times"), [
    ("llama", "last", 3), ("llama", "mod:2", 3), ("llama", "mod:2", 4), ("gpt2", "mod:2", 4), ("gpt_neox", "anchor:1", 3),
    ("gemma3_text", "last", 3), ("gemma3_text", "mod:3", 4), ("mixtral", "mod:2", 3),
])
def test_calls_equal_the_oracle(name, kv, times):
    stock, model = transformed(name, dp.Loop(start=1, end=2 if name == "mixtral" else 3, times=times, kv=kv))
    end = 2 if name == "mixtral" else 3
    batch = zoo.batch(LENGTHS)
    with torch.no_grad():
        got, cache = in_calls(model, batch, CALLS)
        with oracle.oracle_attention(stock):
            for r, n in enumerate(LENGTHS):
                # A row's first call is shorter by its padding.
                row = oracle.Row(stock, batch["input_ids"][r, -n:], torch.arange(max(LENGTHS))[-n:])
                calls = [CALLS[0] - (max(LENGTHS) - n), *CALLS[1:]]
                want = row.logits(oracle.loop(row, 1, end, times, kv=kv, calls=calls)[-1])
                torch.testing.assert_close(got[r, -n:], want, rtol=1e-9, atol=1e-9)
        whole = model(**batch).logits
    assert (got - whole)[batch["attention_mask"].bool()].abs().max() > 1e-3
    kind, _, k = kv.partition(":")
    kept = min(int(k or 1) + (kind == "anchor"), times)
    assert len(cache) == 3 - (end - 1) + kept * (end - 1) == len(model.depth_program.slots)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_one_call_is_the_loop_with_own_keys(name):
    """Outputs and every gradient of a whole row."""
    stock, model = transformed(name, dp.Loop(start=1, end=3, times=3, kv="last", inject="add"))
    oracle.compare(stock, model, zoo.batch([6, 4]), lambda row, p: oracle.loop(row, 1, 3, 3, inject="add")[-1])


@pytest.mark.parametrize("lowering", ["eager", "auto"])
def test_inside_a_token_loop_calls_count_and_chunks_do_not(lowering):
    spec = [dp.Loop(start=1, end=2, times=3, kv="last"), dp.TurboConn(bridges=[(3, 1)], group=2, rank=4)]
    stock, _ = transformed("llama", dp.Identity())
    models = [dp.transform(stock, spec, lowering=lowering), dp.transform(stock, spec, chunk=1, lowering="eager")]
    for model in models:
        enliven(model.depth, seed=1, std=0.3, least=1)
    batch = zoo.batch(LENGTHS)
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        for calls in ([9], CALLS, [1] * 9):
            (got, cache), (want, _) = (in_calls(m, batch, calls) for m in models)
            torch.testing.assert_close(got[real], want[real], rtol=1e-9, atol=1e-9)
            assert len(cache) == 3


def test_generate_warns_and_the_report_says_so():
    _, model = transformed("llama", dp.Loop(start=1, end=3, times=4, kv="last"))
    batch = zoo.batch([5, 3])
    with pytest.warns(UserWarning, match="not what was trained"):
        cached = model.generate(**batch, max_new_tokens=3, do_sample=False)
    assert cached.shape == (2, 8)
    with pytest.warns(UserWarning, match="split into calls"):
        beams = model.generate(**batch, max_new_tokens=3, num_beams=2, do_sample=False)
    assert beams.shape == (2, 8)
    report = str(dp.report(model, seq_len=8))
    assert "6*m + 9" in report and "cached keys of earlier calls" in report
    own = dp.transform(dp.restore(model), dp.Loop(start=1, end=3, times=4))
    shown, whole = (dp.report(m, seq_len=8) for m in (model, own))
    assert shown.kv_bytes * 9 == whole.kv_bytes * 3
    assert shown.depth == whole.depth == 9


PAST_RULES = {
    "another slot": ("slot 0 past 0", "expected the slot of another visit as past, got its own slot"),
    "a slot": ("slot 0 past 7", "got slot 7, which no visit writes"),
    "alone": ("slot 0 keys 1 past 1", "goes with neither keys nor gate"),
    "same block": ("slot 0 past 2", "expected a past of the same block 0"),
}


@pytest.mark.parametrize("rule", PAST_RULES)
def test_rules_of_past(rule):
    attrs, message = PAST_RULES[rule]
    text = (
        "program M blocks=2 width=8\n%0 = embed\n%1 = block 0 (%0) slot 1\n%2 = block 1 (%1) slot 2\n"
        f"%3 = block 0 (%2) {attrs}\noutput %3"
    )
    with pytest.raises(VerifyError, match=message):
        verify(parse_program(text))
    ok = verify(parse_program(text.replace(attrs, "slot 0 past 1")))
    assert ok.slots == (1, 2) and ok.reads_calls and parse_program(str(ok)) == ok


def test_a_past_that_has_a_past_is_refused():
    text = ("program M blocks=1 width=8\n%0 = embed\n%1 = block 0 (%0) slot 0 past 1\n%2 = block 0 (%1) slot 1 past 0\n"
            "output %2")
    with pytest.raises(VerifyError, match="keeps every call's entries"):
        verify(parse_program(text))
