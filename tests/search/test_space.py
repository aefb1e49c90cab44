"""Spaces against counts of the papers and against lists made by hand."""

from __future__ import annotations

import itertools
import random

import pytest

import depthpass as dp
from depthpass.search.space import PRESETS, Space, listing, load_space, stock


def test_the_published_space_has_the_published_number_of_actions():
    """CoLa at L = 28: 106 skips and 424 repeats."""
    assert len(PRESETS["cola"].children(stock(28), 28, 0)) == 530
    assert len(Space(repeat=()).children(stock(28), 28, 0)) == 106


def test_every_block_skipped_kept_or_doubled():
    actual = {p for p in PRESETS["polar"].programs(4)}
    by_hand = {tuple(b for b, n in enumerate(counts) for _ in range(n)) for counts in itertools.product(range(3), repeat=4)}
    assert actual == by_hand - {()}


def test_ranges_run_twice():
    assert set(PRESETS["rys"].programs(3)) == {
        (0, 1, 2), (0, 0, 1, 2), (0, 1, 0, 1, 2), (0, 1, 2, 0, 1, 2), (0, 1, 1, 2), (0, 1, 2, 1, 2), (0, 1, 2, 2)}


def closure(blocks, skip, repeat, times, shortest, most, edits):
    """All programs by following edits one by one, written on lists."""
    actual, front = {tuple(range(blocks))}, {tuple(range(blocks))}
    for _ in range(edits):
        after = set()
        for p in front:
            for start in range(len(p)):
                after |= {p[:start] + p[start + k:] for k in skip if start + k <= len(p)}
                after |= {p[:start + k] + p[start:start + k] * r + p[start + k:] for k in repeat for r in times
                          if start + k <= len(p)}
        front = {p for p in after if shortest <= len(p) <= most}
        actual |= front
    return actual


@pytest.mark.parametrize("fields", [
    dict(skip=(1, 2), repeat=(1, 3), times=(1, 2), shortest=2, longest=1.5, edits=2),
    dict(skip=(), repeat=(2,), times=(3,), shortest=4, longest=3, edits=1),
    dict(skip=(1,), repeat=(1,), times=(1,), shortest=1, longest=1, edits=3),
])
def test_the_programs_are_those_that_edits_reach(fields):
    space = Space(**fields)
    actual, complete = listing(space, 4)
    most = int(fields["longest"] * 4)
    assert complete and len(actual) == len(set(actual))
    assert set(actual) == closure(4, fields["skip"], fields["repeat"], fields["times"], fields["shortest"], most, fields["edits"])
    rng = random.Random(0)
    assert all(space.draw(4, rng) in set(actual) for _ in range(50))


def test_a_listing_stops():
    assert listing(PRESETS["cola"], 28, 1000)[1] is False


@pytest.mark.parametrize("space, words", [
    ("colo", "Did you mean 'cola'"), (dict(skipp=[1]), "Did you mean 'skip'"), (dict(skip=[0]), "space.skip"),
    (dict(times=[]), None), (dict(shortest=0), "space.shortest"), (dict(longest=0.5), "space.longest"),
    (dict(edits=0), "space.edits"), ([[0, -1]], r"space\[0\]"), ([[]], r"space\[0\]"), (3, "expected a name"),
])
def test_wrong_spaces_are_refused(space, words):
    if words is None:
        assert load_space(space).times == ()
        return
    with pytest.raises(dp.InputError, match=words):
        load_space(space)


@pytest.mark.parametrize("space", [
    dict(skip=[], repeat=[]), dict(skip=[], times=[]), dict(skip=[4], repeat=[5]), dict(skip=[], longest=1), [[0, 1, 2, 3]], [],
])
def test_a_space_with_nothing_in_it_is_refused(space):
    with pytest.raises(dp.InputError, match="space"):
        load_space(space).check(4)


def test_blocks_that_the_model_does_not_have():
    with pytest.raises(dp.InputError, match=r"0\.\.3, got 4"):
        load_space([[0, 4]]).check(4)
    with pytest.raises(dp.InputError, match="at most the model's 4 visits"):
        Space(shortest=5).check(4)
