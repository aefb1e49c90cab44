"""Depth, cost and claims of masked diffusion, against unrolled graphs and counts by hand."""

import itertools
import random

import networkx as nx
import pytest
import zoo

import depthpass as dp
from depthpass.analysis.closed_form import n as row
from depthpass.analysis.cost.symbols import AttentionSite, n
from depthpass.analysis.depth import depth
from depthpass.ir import plain
from depthpass.passes import apply_spec
from depthpass.passes.base import Context


def program(blocks, **options):
    stock = plain("M", blocks, 8)
    return apply_spec(stock, [dp.MaskedDiffusion(mask_token=9, **options)], Context.of(stock))


def longest(blocks, tokens, steps, block, rng):
    """Longest path of the unrolled graph: (step, point, position), a written token being an edge to the next step."""
    graph, masked = nx.DiGraph(), list(range(tokens))
    size = tokens if block is None else block
    s = 0
    latest: dict[int, int] = {}
    for start in range(0, tokens, size):
        own = [p for p in masked if start <= p < start + size]
        count = min(steps, len(own))
        for step in range(count):
            chosen = own if step == count - 1 else rng.sample(own, rng.randint(1, len(own) - (count - 1 - step)))
            last = min(tokens, start + size)
            for point in range(blocks):
                for p in range(last):
                    for q in range(last):
                        if block is None or q // size <= p // size:
                            graph.add_edge((s, point, q), (s, point + 1, p), weight=1)
            for p, was in latest.items():
                if p < last:
                    graph.add_edge((was, blocks, p), (s, 0, p), weight=0)
            for p in chosen:
                latest[p] = s
            own = [p for p in own if p not in chosen]
            s += 1
    return nx.dag_longest_path_length(graph)


@pytest.mark.parametrize(("blocks", "steps", "block"), [(1, 3, None), (2, 2, None), (2, 3, 3), (1, 2, 4), (3, 1, 2)])
def test_depth_is_steps_times_blocks(blocks, steps, block):
    depths = depth(program(blocks, steps=steps, block=block))
    for tokens in range(1, 9):
        assert depths.at(tokens) == longest(blocks, tokens, steps, block, random.Random(tokens)), tokens
        assert depths.formula.subs({row: tokens}) == depths.at(tokens)
    assert any("at least one" in note for note in depths.notes)


def test_visible_pairs_are_counted():
    for window, chunk, ahead in [*itertools.product((None, 3, 9), (None,), (None, 0, 4, 7)), (None, 4, 0), (None, 4, 8)]:
        site = AttentionSite(1, 1, 1, 1, window, chunk, ahead)
        for tokens in (1, 3, 4, 5, 11, 12, 30):
            want = sum(
                (k <= q if ahead is None else not ahead or k // ahead <= q // ahead)
                and (window is None or abs(q - k) < window) and (chunk is None or q // chunk == k // chunk)
                for q in range(tokens) for k in range(tokens)
            )
            assert site.pairs(n, n, "visible").subs({n: tokens}) == want, (window, chunk, ahead, tokens)


def test_reports_of_models():
    model = zoo.model("llama", layers=3)
    whole = dp.report(model, dp.MaskedDiffusion(steps=4, mask_token=96), seq_len=20)
    assert whole.depth_at(20) == 12 and whole.number("denoising_depth").value == 12
    assert whole.number("denoising_bits").value == pytest.approx(6.6, abs=0.01)
    claims = "\n".join(str(s.claim) for s in whole.complexity)
    assert "T steps of masked diffusion on P masks lie within T loops on P pads" in claims
    assert any("may write them again" in p for s in whole.complexity for p in s.premises)
    # Twice the visible pairs of a causal mask, but for the diagonal.
    pairs = next(x for s in whole.sections for x in s.numbers if x.label == "FLOPs forward, attention")
    assert pairs.value / pairs.stock == pytest.approx(400 / 210)
    blocks = dp.report(model, dp.MaskedDiffusion(steps=4, mask_token=96, block=8), seq_len=20, cost=False)
    assert blocks.depth_at(20) == 36 and "diffusion" not in "\n".join(s.claim for s in blocks.complexity)
    assert "earlier blocks and the own one, of 8 tokens" in blocks.to_text()
    assert "attention sees blocks of 8 tokens; 4 denoising steps for each, depth is that of all" in str(blocks)
    assert "denoising steps for each" in (page := blocks.to_html()) and "One denoising step is drawn." in page
    only = dp.report(model, dp.Bidirectional(), seq_len=9, cost=False).to_text()
    assert "attention sees" in only and "denoising steps" not in only
