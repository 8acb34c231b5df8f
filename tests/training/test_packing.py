"""Packs hold every job once, within their limits, and end no later than an even share or the largest job asks."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_ensemble.config import Range, TrainingConfig
from ray_ensemble.training.packing import packs, shared_workers, side_by_side


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 1000), max_size=30), st.integers(1, 8), st.integers(1, 6))
def test_packs_are_a_partition_within_their_limits(sizes, most, at_once):
    found = packs(sizes, most, at_once)
    assert sorted(place for pack in found for place in pack) == list(range(len(sizes)))
    loads = [sum(sizes[i] for i in pack) for pack in found]
    assert loads == sorted(loads, reverse=True)
    for pack, load in zip(found, loads, strict=True):
        assert len(pack) <= most
        assert load <= max(*sizes, -(-sum(sizes) // at_once))


def test_one_a_pack_is_the_biggest_first():
    assert packs([3, 9, 5, 9], 1, 2) == [[1], [3], [2], [0]]


@pytest.mark.parametrize(
    ("sizes", "at_once", "wanted"),
    [
        ([10, 10, 10, 10], 2, [[0, 1], [2, 3]]),  # both places stay busy
        ([10, 10, 10, 10], 1, [[0, 1, 2, 3]]),
        ([80, 20, 20, 20], 2, [[0], [1, 2, 3]]),  # the small ones end before the large one
    ],
)
def test_packs_leave_no_place_idle(sizes, at_once, wanted):
    assert packs(sizes, 4, at_once) == wanted


def test_workers_follow_the_size_of_a_job():
    fixed, ranged = TrainingConfig(workers=2), TrainingConfig(workers=Range(min=1, max=4))
    assert [fixed.workers_of(steps, 400) for steps in (400, 100)] == [2, 2]
    assert [ranged.workers_of(steps, 400) for steps in (400, 300, 200, 100, 10)] == [4, 3, 2, 1, 1]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 1000), min_size=1, max_size=20), st.integers(1, 64), st.integers(1, 16))
def test_workers_are_shared_by_steps_within_what_there_is(steps, held, most):
    workers = shared_workers(steps, held, most)
    assert all(1 <= count <= most for count in workers)
    if most >= held:
        assert sum(workers) >= min(held, sum(steps)), "nothing lies idle"
    at_once = side_by_side(workers, held)
    assert at_once == 1 or sum(sorted(workers)[-at_once:]) <= held, "whichever run, they fit"
    for one, its in zip(steps, workers, strict=True):
        for other, theirs in zip(steps, workers, strict=True):
            assert one <= other or its >= theirs, "a longer job has no fewer workers"


def test_a_baseline_with_the_steps_of_all_groups_gets_half():
    assert shared_workers([4, 1, 1, 1, 1], 16, 16) == [8, 2, 2, 2, 2]
    assert shared_workers([4, 1, 1, 1, 1], 16, 4) == [4, 3, 3, 3, 3]
    assert shared_workers([5, 5, 5], 3, 8) == shared_workers([9, 1, 1], 2, 8) == [1, 1, 1]
    # More groups than fit run in turn beside the baseline, which still has half.
    many = shared_workers([32, *[1] * 32], 16, 8)
    assert many == [8, *[1] * 32]
    assert side_by_side(many, 16) == 9
    assert side_by_side([3, 3], 2) == 1


def test_auto_is_not_for_packs_or_shares_of_a_gpu():
    assert TrainingConfig(workers="auto", batch_size=1).most_workers == 1
    with pytest.raises(ValueError, match="pack: several adapters"):
        TrainingConfig(workers="auto", pack=2)
    with pytest.raises(ValueError, match="several workers cannot share a GPU"):
        TrainingConfig(workers="auto", gpus=0.5)
