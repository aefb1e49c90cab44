"""``dp.search`` against enumeration by hand: stock models with other lists of blocks, one sample at a time."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from layer_search import answered, build, by_hand, draw, is_right, log_prob

import depthpass as dp
from depthpass.search.samples import Sample, split

SPACE = dict(skip=[1, 2], repeat=[1], times=[1], longest=1.25, edits=2)


def programs_by_hand(blocks=4):
    """Those of SPACE: at most two edits, at most 5 visits."""
    def edit(p):
        yield from (p[:i] + p[i + k:] for k in (1, 2) for i in range(len(p) - k + 1))
        yield from (p[:i] + p[i:i + 1] + p[i:] for i in range(len(p)))

    once = {p for p in edit(tuple(range(blocks))) if 1 <= len(p) <= 5}
    return {tuple(range(blocks))} | once | {p for q in once for p in edit(q) if 1 <= len(p) <= 5}


def parts(samples, share=0.5):
    """The samples that were searched on, and those held out, at seed 0."""
    return split([Sample(tuple(p), tuple(a)) for p, a in samples], share, 0)


@pytest.fixture(scope="module")
def every_program(small):
    """The exhaustive search of SPACE."""
    return dp.search(small.live, small.samples, method="exhaustive", space=SPACE, score="log_prob")


def test_exhaustive_search_equals_enumeration(small, every_program):
    result = every_program
    searched, held = parts(small.samples)
    assert len(searched) == len(held) == 6
    truth = by_hand(small.stock, searched, programs_by_hand(), log_prob)
    assert {t.layers for t in result.trials} == set(truth)
    for trial in result.trials:
        values = [truth[trial.layers][i] for i in range(6)]
        assert trial.values == pytest.approx(values, rel=1e-10) and trial.score == pytest.approx(sum(values) / 6, rel=1e-10)
    means = {p: sum(v) / 6 for p, v in truth.items()}
    best = max(means, key=means.get)
    assert result.best.layers == best and result.best.score == pytest.approx(means[best], rel=1e-10)
    assert result.best.held_out.value == pytest.approx(
        sum(by_hand(small.stock, held, [best], log_prob)[best]) / 6, rel=1e-10)
    # The front, from its definition.
    undominated = {p for p in means if not any(
        q != p and means[q] >= means[p] and len(q) <= len(p) and (means[q], -len(q)) != (means[p], -len(p)) for q in means)}
    assert {f.layers for f in result.front} == undominated
    ppl = dp.search(small.live, small.samples, method="exhaustive", space=SPACE, score="perplexity")
    tokens = sum(len(a) for _, a in searched)
    assert ppl.best.score == pytest.approx(min(math.exp(-sum(v) / tokens) for v in truth.values()), rel=1e-10)
    assert ppl.lower and ppl.best.score <= ppl.stock.score


@pytest.mark.parametrize("score", ["exact_match", "greedy_match"])
def test_exact_match_is_what_generate_says(small, score):
    result = dp.search(small.live, small.samples, method="exhaustive", space=SPACE | {"edits": 1}, score=score)
    searched, _ = parts(small.samples)
    truth = by_hand(small.stock, searched, [t.layers for t in result.trials], is_right)
    assert {t.layers: list(t.values) for t in result.trials} == truth
    assert any(t.score > 0 for t in result.trials) and any(t.score < 1 for t in result.trials)
    # Equal scores: the shortest program is the best one.
    top = max(sum(v) for v in truth.values())
    assert result.best.visits == min(len(p) for p, v in truth.items() if sum(v) == top)


@pytest.mark.parametrize("method", ["random", "beam", "mcts"])
def test_every_method_finds_the_best_program_of_a_small_space(small, every_program, method):
    chosen = dp.search.MCTS(penalty=0.0, exploration=1.0, explore=0.5) if method == "mcts" else (
        dp.search.Beam(width=200, rounds=2) if method == "beam" else method)
    result = dp.search(small.live, small.samples, method=chosen, space=SPACE, score="log_prob", budget=600)
    assert result.best == every_program.best
    again = dp.search(small.live, small.samples, method=chosen, space=SPACE, score="log_prob", budget=600)
    assert again.to_json() == result.to_json()


@pytest.mark.parametrize("space", [{"edits": 1}, {"skip": [1, 2], "repeat": [1, 2], "times": [1], "longest": 1.5, "edits": 2}])
def test_a_tree_search_as_published_ends_with_every_program_of_a_space_with_an_end(small, space):
    """With its length penalty, which leads every walk to the shortest programs first."""
    truth = dp.search(small.live, small.samples, method="exhaustive", space=space, score="log_prob")
    result = dp.search(small.live, small.samples, method="mcts", space=space, score="log_prob", budget=2000)
    assert {t.layers: t.values for t in result.trials} == {t.layers: t.values for t in truth.trials}
    assert result.best == truth.best


def test_a_sweep_is_every_program_of_one_edit_and_its_heat_map(small):
    result = dp.search(small.live, small.samples, method="sweep", space="rys", score="log_prob")
    searched, _ = parts(small.samples)
    ranges = {(s, e): (*range(e), *range(s, 4)) for s in range(4) for e in range(s + 1, 5)}
    assert {t.layers for t in result.trials} == {(0, 1, 2, 3), *ranges.values()} and len(ranges) == 10
    heat = result.heat_map()
    truth = by_hand(small.stock, searched, [ranges[1, 3], ranges[0, 4]], log_prob)
    assert heat.scores[1][2] == pytest.approx(sum(truth[ranges[1, 3]]) / 6) and heat.scores[2][1] is None
    assert heat.scores[0][3] == pytest.approx(sum(truth[ranges[0, 4]]) / 6)
    assert heat.to_svg().count("<title>") == 10 and str(heat).count("\n") == 5
    with pytest.raises(dp.InputError, match="runs 3 times"):
        result.heat_map(3)
    part = dp.search(small.live, small.samples, method="sweep", space="rys", score="log_prob", budget=4)
    assert len(part.trials) == 5 and {t.layers for t in part.trials} < {t.layers for t in result.trials}


@pytest.mark.parametrize("score", ["log_prob", "perplexity", "greedy_match", "exact_match"])
def test_the_memo_changes_no_bit(small, score):
    options = dict(score=score, space="cola", method="random", budget=12, batch=4)
    alone, *shared = (dp.search(small.live, small.samples, memo=limit, **options) for limit in (False, True, 20_000))
    b = alone.to_dict()
    b.pop("block_visits")
    for one in shared:
        a = one.to_dict()
        a.pop("block_visits")
        assert a == b and [t.values for t in one.trials] == [t.values for t in alone.trials]
        assert alone.block_visits.saved == 0 and 0 < one.block_visits.ran < one.block_visits.asked
        assert one.block_visits.asked == alone.block_visits.asked
    whole, limited = shared
    assert whole.block_visits.saved > limited.block_visits.saved


def test_the_memo_runs_every_prefix_once(small):
    result = dp.search(small.live, small.samples[:4], held_out=0, method="exhaustive", space=SPACE, score="log_prob")
    programs = {t.layers for t in result.trials}
    assert result.block_visits.asked == sum(map(len, programs))
    assert result.block_visits.ran == len({p[:n] for p in programs for n in range(1, len(p) + 1)})


def test_streams_and_caches_of_shared_prefixes_are_those_of_a_model_of_its_own(small):
    from depthpass.hf.calls.prefixes import PrefixMemo

    memo, ids = PrefixMemo(1 << 30), torch.randint(13, (3, 7), generator=torch.Generator().manual_seed(0))
    own = dp.transform(small.stock, dp.Identity())
    for layers in [(0, 1, 2, 3), (0, 1, 1, 2, 3), (0, 1, 1, 3), (0, 1, 1, 2, 3, 2)]:
        cache, other = dp.DepthCache(small.live), dp.DepthCache(own)
        dp.switch(own, dp.LayerProgram(layers))
        with torch.no_grad(), dp.using(small.live, dp.LayerProgram(layers)):
            with memo.running(small.live, "ids", layers, True):
                got = small.live(input_ids=ids[:, :5], past_key_values=cache, use_cache=True).logits
            late = small.live(input_ids=ids[:, 5:], past_key_values=cache, use_cache=True).logits
            want = own(input_ids=ids[:, :5], past_key_values=other, use_cache=True).logits
            assert torch.equal(got, want) and len(cache) == len(layers)
            assert torch.equal(late, own(input_ids=ids[:, 5:], past_key_values=other, use_cache=True).logits)
    assert memo.asked == 19 and memo.ran == 4 + 3 + 1 + 1


def test_controls_stand_beside_every_result(small):
    result = dp.search(small.live, small.samples, method="beam", budget=15, score="exact_match")
    assert set(result.controls) == {"random", "input_blind"}
    for c in result.controls.values():
        assert 0 < c.programs <= 15 and c.best.held_out.n == 6 and c.difference.n == 6
        assert c.difference.value == pytest.approx(result.best.held_out.value - c.best.held_out.value)
        assert c.difference.low < c.difference.value < c.difference.high and c.best.score >= c.mean
        assert f"control: {c.name}" in str(result) and f"best minus {c.name}" in str(result)
    blind = result.controls["input_blind"].best.layers
    assert blind in dp.search.space.PRESETS["cola"].children((0, 1, 2, 3), 4, 0) or blind == (0, 1, 2, 3)
    alone = dp.search(small.live, small.samples[:1], method="beam", budget=3, score="exact_match")
    assert alone.best.held_out is None and "nothing is held out" in str(alone)
    given = dp.search(small.live, small.samples[:4], held_out=small.samples[4:], method="beam", budget=3, score="exact_match")
    assert (given.best.searched.n, given.best.held_out.n) == (4, 8)


def test_a_search_per_sample_is_an_oracle_with_the_same_for_random_programs(small):
    result = dp.search(small.live, small.samples, score="greedy_match", space=SPACE, budget=40, per_sample=True,
                       method=dp.search.MCTS(penalty=0.0))
    searched, _ = parts(small.samples)
    truth = by_hand(small.stock, searched, programs_by_hand(), is_right)
    actual = result.per_sample
    for i, trial in enumerate(actual.best):
        tried = {t.layers: t.score for t in result.trials if t.sample == i}
        assert trial.sample == i and trial.score == max(tried.values()) and len(tried) <= 41
        assert all(truth[p][i] == s for p, s in tried.items())
    plain = truth[0, 1, 2, 3]
    right, wrong = ([i for i in range(6) if plain[i] == w] for w in (1, 0))
    assert actual.fixed == pytest.approx(sum(actual.best[i].score for i in wrong) / len(wrong))
    assert actual.shorter is None if not right else 0 <= actual.shorter <= 1
    assert actual.random.n == actual.score.n == 6 and "oracle" in str(result)
    # The best single program is one of the winners, and is scored on all samples.
    assert result.best.layers in {t.layers for t in actual.best} | {(0, 1, 2, 3)}
    assert result.best.score == pytest.approx(sum(truth[result.best.layers]) / 6)


@pytest.mark.parametrize("kind, more", [
    ("gpt2", {}), ("mistral", {"sliding_window": 3}),
    ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
    # Older transformers would take sdpa, which leaves the softcap out.
    ("gemma2", {"sliding_window": 3, "query_pre_attn_scalar": 8, "attn_implementation": "eager"}),
])
def test_other_architectures(kind, more):
    stock = build(kind, **more)
    if kind == "qwen3_moe":
        stock = stock.float()  # torch has no grouped product in float64
    samples = answered(stock, 6)
    result = dp.search(stock, samples, score="exact_match", method="sweep", space=dict(skip=[1], repeat=[2], times=[1]),
                       held_out=0.3)
    actual, _ = parts(samples, 0.3)
    programs = [t.layers for t in result.trials]
    assert {t.layers: list(t.values) for t in result.trials} == by_hand(stock, actual, programs, is_right)
    scores = dp.search(stock, samples, score="log_prob", method="sweep", space=programs, held_out=0.3)
    truth = by_hand(stock, actual, programs, log_prob)
    assert all(t.values == pytest.approx(truth[t.layers], rel=1e-4) for t in scores.trials)


def test_the_model_stays_as_it_was_and_results_load(small, tmp_path):
    stock, ids = copy.deepcopy(small.stock).train(), torch.tensor([[1, 2, 3]])
    before = {n: p.clone() for n, p in stock.named_parameters()}
    result = dp.search(stock, small.samples, method="beam", budget=12, score="perplexity")
    assert type(stock) is type(small.stock) and stock.training and all(m.training for m in stock.modules())
    assert all(torch.equal(p, before[n]) for n, p in stock.named_parameters())
    assert result.save(tmp_path / "best.json").exists() and result.save(tmp_path / "all").is_dir()
    for spec in (result.best.spec, tmp_path / "best.json", tmp_path / "all" / "best.yaml",
                 tmp_path / "all" / f"front-{result.best.visits}.yaml"):
        loaded = dp.transform(small.stock, spec)
        assert [o["index"] for o in loaded.depth_program.visits] == list(result.best.layers)
    loaded(input_ids=ids)
    assert (tmp_path / "all" / "front.svg").read_text().startswith("<svg")
    live = dp.transform(stock, dp.LayerProgram([0, 2, 3])).train()
    with pytest.warns(UserWarning, match="layer_program.* from each block once"):
        outcome = dp.search(live, small.samples, method="beam", budget=2, score="perplexity")
    assert outcome.stock.layers == tuple(range(outcome.blocks)) and live.training and len(live.depth_program.visits) == 3
    with pytest.raises(dp.InputError, match="json file or a folder"):
        result.save(tmp_path / "best.txt")


def test_scores_of_ones_own(small):
    def both(model, samples):
        with torch.no_grad():
            return [log_prob(model, p, a) for p, a in samples]

    options = dict(method="random", space=SPACE, budget=8)
    own = dp.search(small.live, small.samples, score=both, **options)
    same = dp.search(small.live, small.samples, score="log_prob", **options)
    assert [t.layers for t in own.trials] == [t.layers for t in same.trials] and own.best.layers == same.best.layers
    assert [t.score for t in own.trials] == pytest.approx([t.score for t in same.trials], rel=1e-10)
    one = dp.search(small.live, small.samples, score=lambda m, s: sum(both(m, s)) / len(s), **options)
    assert [t.values for t in one.trials] == [t.values for t in own.trials]
    array = dp.search(small.live, small.samples, score=lambda m, s: np.array(both(m, s)), **options)
    assert [t.values for t in array.trials] == [t.values for t in own.trials]
    assert own.settings["score"] == "both"


def test_samples_may_be_drawn(small):
    def drawn(seed):
        return iter(draw(8, seed))

    options = dict(method="random", space=SPACE, budget=3, score="perplexity")
    assert dp.search(small.live, drawn, seed=5, **options).to_json() == dp.search(
        small.live, [tuple(map(torch.tensor, s)) for s in draw(8, 5)], seed=5, **options).to_json()
    assert dp.search(small.live, lambda: draw(8, 5), seed=5, **options).stock.searched.n == 4
    arrays = [(np.array(p), [np.int64(i) for i in a]) for p, a in draw(8, 5)]
    assert dp.search(small.live, arrays, seed=5, **options).to_json() == dp.search(
        small.live, draw(8, 5), seed=5, **options).to_json()


def test_a_search_captures_once(monkeypatch, small):
    import depthpass.hf.model

    captures, real = [], depthpass.hf.model.capture
    monkeypatch.setattr(depthpass.hf.model, "capture", lambda *a: captures.append(1) or real(*a))
    result = dp.search(small.stock, small.samples, score="exact_match", method="random", budget=10)
    assert len(captures) == 1 and len({t.layers for t in result.trials}) == 11


def test_a_peft_model_is_searched_with_its_adapter(small):
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(copy.deepcopy(small.stock), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    for n, p in wrapped.named_parameters():
        if "lora_B" in n:
            torch.nn.init.normal_(p)
    merged = copy.deepcopy(wrapped).merge_and_unload()
    result = dp.search(wrapped, small.samples, score="log_prob", method="sweep", space=[[0, 1, 1, 3]])
    searched, _ = parts(small.samples)
    truth = by_hand(merged, searched, [(0, 1, 2, 3), (0, 1, 1, 3)], log_prob)
    assert all(t.values == pytest.approx(truth[t.layers], rel=1e-8) for t in result.trials)
    assert result.block_visits.saved > 0


def test_equal_samples_are_on_one_side(small):
    searched, held = parts([*small.samples, *small.samples])
    assert len(searched) == len(held) == 12 and not set(searched) & set(held)
    assert parts(small.samples[:1] * 4)[1] == ()


@pytest.mark.parametrize("change, words", [
    (dict(samples=[]), "at least one"), (dict(samples="text"), "pairs"), (dict(samples=[([1], [])]), r"samples\[0\] answer"),
    (dict(samples=[([1, 2],)]), r"samples\[0\]: expected a pair"), (dict(samples=[([1], [13])]), "0 to 12, got 13"),
    (dict(method="mtcs"), "Did you mean 'mcts'"), (dict(score="logprob"), "Did you mean 'log_prob'"),
    (dict(space="cloa"), "Did you mean 'cola'"), (dict(space=dict(skip=[], repeat=[])), "no program"),
    (dict(budget=0), "budget"), (dict(budget=2.5), "budget"), (dict(budget=True), "budget"), (dict(batch=0), "batch"),
    (dict(seed="a"), "seed"), (dict(held_out=1.0), "held_out"), (dict(held_out=[]), "held_out"),
    (dict(samples=[([1], [2])], held_out=[([1], [2])]), r"held_out\[0\]: expected samples that are not"), (dict(memo=-1), "memo"),
    (dict(per_sample=1), "per_sample"), (dict(method="exhaustive", budget=5), "larger budget"),
    (dict(method=dp.SpecError), "method"),
])
def test_what_is_wrong_is_said_before_anything_runs(small, monkeypatch, change, words):
    monkeypatch.setattr(type(small.live), "_run_program", lambda *a: pytest.fail("the model ran"))
    arguments = dict(samples=small.samples, budget=5) | change
    with pytest.raises(dp.InputError, match=words):
        dp.search(small.live, arguments.pop("samples"), **arguments)


def test_options_of_methods_are_checked():
    for wrong in (dict(explore=2), dict(penalty=-1), dict(exploration="a")):
        with pytest.raises(dp.InputError, match="mcts"):
            dp.search.MCTS(**wrong)
    with pytest.raises(dp.InputError, match=r"beam\.width"):
        dp.search.Beam(width=0)


def test_wrong_scores_are_refused(small):
    for value, said in ((math.nan, "NaN"), (math.inf, "infinity"), (-math.inf, "minus infinity")):
        with pytest.raises(dp.InputError, match=rf"got {said} for sample 1 .*\[0, 1, 2, 3\]"):
            dp.search(small.live, small.samples, score=lambda m, s, v=value: [0.0, v] + [0.0] * (len(s) - 2), budget=3)
    with pytest.raises(dp.InputError, match="expected 6 numbers"):
        dp.search(small.live, small.samples, score=lambda m, s: [0.0], budget=3)


def test_wrong_models_are_refused(small):
    with pytest.raises(dp.InputError, match="expected a model with weights, got one on the meta device"):
        dp.search(copy.deepcopy(small.stock).to("meta"), small.samples)
    turbo = dp.transform(small.stock, dp.TurboConn(bridges=[(3, 0)], group=2, rank=2))
    with pytest.raises(dp.InputError, match="turboconn"):
        dp.search(turbo, small.samples)
    with pytest.raises(dp.InputError, match="with a head"):
        dp.search(small.stock.model, small.samples)
    with pytest.raises(dp.InputError, match="expected a model"):
        dp.search("model", small.samples)
    long = [([1] * 12, [2] * 6)]
    with pytest.raises(dp.InputError, match="table has 16 entries"):
        dp.search(build("gpt2"), long)
