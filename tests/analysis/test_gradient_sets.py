"""Gradients of sets of responses, against singular values of plain backward passes, response by response."""

from itertools import pairwise

import pytest
import torch
import zoo

import depthpass as dp

KEPT = ["q_proj", "o_proj"]


def responses(count=3, seed=0):
    g = torch.Generator().manual_seed(seed)

    def ids(n):
        return torch.randint(3, zoo.VOCABULARY, (n,), generator=g).tolist()

    prompts = [ids(4 + i) for i in range(count)]
    return {"fast": [(p, ids(2)) for p in prompts], "slow": [(p, ids(6)) for p in prompts]}


def by_hand(model, pairs):
    """Mean nuclear norm by (block, projection), one response at a time."""
    total = {}
    for prompt, answer in pairs:
        model.zero_grad()
        logits = model(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        torch.nn.functional.cross_entropy(logits, torch.tensor(answer)).backward()
        for block, layer in enumerate(model.model.layers):
            for name in KEPT:
                value = float(torch.linalg.svdvals(getattr(layer.self_attn, name).weight.grad.double()).sum())
                total[block, f"self_attn.{name}"] = total.get((block, f"self_attn.{name}"), 0.0) + value / len(pairs)
    model.zero_grad()
    return total


def test_tables_are_those_of_plain_backward_passes():
    model, sets = zoo.model("llama", 6), responses()
    grads = dp.gradients(model, sets, projections=KEPT)
    want = {name: by_hand(model, pairs) for name, pairs in sets.items()}
    assert grads.counts == {"fast": 3, "slow": 3} and grads.parts == (2, 4)
    for name, report in grads.sets.items():
        assert {(m.block, m.projection): m.nuclear for m in report.layers} == pytest.approx(want[name], rel=1e-4)
    for part, (a, b) in {"all": (0, 6), "0..1": (0, 2), "2..3": (2, 4), "4..": (4, 6)}.items():
        for name in sets:
            for p in ("self_attn.q_proj", "self_attn.o_proj"):
                s = [want[name][i, p] for i in range(a, b)]
                mad = sum(abs(y - x) for x, y in pairwise(s)) / (len(s) - 1)
                assert grads.mad(part)[name][p] == pytest.approx(mad, rel=1e-3)
    rd = {k: (want["slow"][k] - v) / v for k, v in want["fast"].items()}
    assert grads.relative_difference() == pytest.approx(rd, rel=1e-3)
    assert [(b, p) for b, p, _ in grads.largest(3)] == sorted(rd, key=lambda k: -abs(rd[k]))[:3]
    q = [abs(v) for (b, p), v in rd.items() if p.endswith("q_proj") and b < 2]
    assert grads.rd_table()["0..1"]["self_attn.q_proj"] == pytest.approx(sum(q) / 2, rel=1e-3)
    assert "|RD| of slow against fast" in str(grads) and "MAD of nuclear norms, blocks 2..3" in str(grads)
    other = dp.gradients(model, sets, projections=KEPT, parts=(1, 5))
    assert other.mad("1..4")["fast"].keys() == set(grads.sets["fast"].projections)


def test_bad_input():
    model, sets = zoo.model("llama", 2), responses(1)
    for given, message in (
        ({"fast": sets["fast"]}, "at least two sets"), ({**sets, "slow": []}, "got none in 'slow'"),
        ({**sets, "slow": [5]}, r"slow\[0\]: expected a batch with labels or a pair"),
        ({**sets, "slow": [([1], [])]}, r"slow\[0\]: expected a prompt and a response of at least one token"),
        ({**sets, "slow": [([1], [97])]}, r"slow\[0\]: expected token ids of 0 to 96, got 1 to 97"),
    ):
        with pytest.raises(dp.InputError, match=message):
            dp.gradients(model, given)
    with pytest.raises(dp.InputError, match="parts: expected two blocks"):
        dp.gradients(model, sets, parts=(2, 9))
    with pytest.raises(dp.InputError, match="parts: expected sets of responses beside it"):
        dp.gradients(model, {"input_ids": torch.ones(1, 3, dtype=torch.long)}, parts=(0, 1))
    grads = dp.gradients(model, sets, projections=KEPT)
    with pytest.raises(dp.InputError, match="expected one of the sets fast, slow, got 'slo'"):
        grads.relative_difference("fast", "slo")
    with pytest.raises(dp.InputError, match="part: expected one of all"):
        grads.mad("middle")
