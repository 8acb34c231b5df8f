"""Partitions, their neighbours, and the local search against the exact optimum."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from set_partitions import all_partitions

from ray_ensemble.config import TrainingConfig
from ray_ensemble.estimator import Estimator, sample_subsets
from ray_ensemble.estimator.affinity import affinity
from ray_ensemble.estimator.planted import planted_tasks
from ray_ensemble.grouping.exact import best_optimum, estimated_optima
from ray_ensemble.grouping.partitions import (
    Change,
    apply,
    canonical,
    changes,
    from_labels,
    guided_gains,
    improve,
    perturb,
    random_partition,
    resize,
    to_labels,
)


def exact(n, m, objective):
    return min(all_partitions(n, m), key=objective)


def scatter(seed, n):
    """An objective without structure to exploit: each group's cost is drawn at random."""

    def objective(partition):
        return float(sum(np.random.default_rng([seed, *group]).random() * len(group) for group in partition)) / n

    return objective


def test_enumeration_counts_as_stirling_does():
    assert [len(set(all_partitions(7, m))) for m in range(1, 8)] == [1, 63, 301, 350, 140, 21, 1]


def test_canonical_form_is_one_per_partition():
    assert canonical([[3, 1], {2}, (0,)]) == ((0,), (1, 3), (2,)) == canonical([(2,), (0,), (3, 1)])
    assert to_labels(((0,), (1, 3), (2,))) == [0, 1, 2, 1]
    for wrong in ([[0], []], [[0, 1], [1]]):
        with pytest.raises(ValueError, match="not a partition"):
            canonical(wrong)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=12))
def test_labels_and_partitions_are_inverse(labels):
    partition = from_labels(labels)
    assert from_labels(to_labels(partition)) == partition


@given(st.data(), st.integers(1, 12), st.integers(0, 50))
def test_random_partitions_have_the_groups_asked_for(data, n, seed):
    m = data.draw(st.integers(1, n))
    partition = random_partition(n, m, seed)
    assert len(partition) == m
    assert sorted(task for group in partition for task in group) == list(range(n))
    assert partition == random_partition(n, m, seed)
    with pytest.raises(ValueError, match="into"):
        random_partition(n, n + 1, seed)


@settings(deadline=None, max_examples=40)
@given(st.data(), st.integers(1, 9), st.integers(0, 50))
def test_neighbours_are_all_moves_and_swaps(data, n, seed):
    m = data.draw(st.integers(1, n))
    partition = random_partition(n, m, seed)
    found = {apply(partition, change) for change in changes(partition)}
    labels = np.array(to_labels(partition))
    expected = set()
    for task in range(n):
        for group in range(m):
            moved = labels.copy()
            moved[task] = group
            expected.add(from_labels(moved))
        for other in range(n):
            swapped = labels.copy()
            swapped[[task, other]] = swapped[[other, task]]
            expected.add(from_labels(swapped))
    expected = {neighbour for neighbour in expected if len(neighbour) == m}
    assert found - {partition} == expected - {partition}
    assert len(perturb(partition, 5, seed)) == m


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 9), st.integers(1, 4), st.integers(0, 100), st.integers(1, 40))
def test_improve_never_worsens_and_keeps_the_number_of_groups(n, m, seed, neighbours):
    start = random_partition(n, min(m, n), seed)
    objective = scatter(seed, n)
    guide = np.random.default_rng(seed).normal(size=(n, n))
    found = improve(start, objective, seed=seed, neighbours=neighbours, guide=guide + guide.T)
    assert found.objective <= objective(start)
    assert found.objective == objective(found.partition)
    assert len(found.partition) == len(start)
    assert sorted(task for group in found.partition for task in group) == list(range(n))
    assert found == improve(start, objective, seed=seed, neighbours=neighbours, guide=guide + guide.T)
    if found.optimal:
        assert min(map(objective, (apply(found.partition, c) for c in changes(found.partition))), default=1) >= (
            found.objective - 1e-9
        )


def test_improve_respects_its_budget():
    counted = []

    def objective(partition):
        counted.append(partition)
        return -float(len(counted))  # everything is better than what was before

    found = improve(random_partition(9, 3, 0), objective, evaluations=25)
    assert found.evaluations == 25
    assert len(counted) == 26
    assert not found.optimal


@settings(deadline=None, max_examples=40)
@given(st.data(), st.integers(1, 8), st.integers(0, 50))
def test_with_free_m_neighbours_are_also_merges_and_splits(data, n, seed):
    m = data.draw(st.integers(1, n))
    partition = random_partition(n, m, seed)
    guide = np.random.default_rng(seed).normal(size=(n, n))
    fixed = {apply(partition, change) for change in changes(partition)}
    found = {apply(partition, change) for change in changes(partition, range(1, n + 1), guide + guide.T)}
    assert fixed <= found
    fewer, more = ({p for p in found if len(p) == m + by} for by in (-1, 1))
    merged = {canonical([{*a, *b}, *(c for c in partition if c not in (a, b))]) for a, b in combinations(partition, 2)}
    assert fewer == merged
    alone = {
        canonical([{task}, set(group) - {task}, *(other for other in partition if other != group)])
        for group in partition
        for task in group
        if len(group) > 1
    }
    assert alone <= more
    assert len(more) <= 2 * n
    assert fixed | fewer | more == found
    assert {len(apply(partition, change)) for change in changes(partition, [m])} <= {m}


def test_a_group_is_halved_where_its_two_parts_meet():
    labels = np.array([0, 1, 0, 1, 1, 0, 0, 1])
    guide = np.where(np.equal.outer(labels, labels), 1.0, -1.0)
    halves = {apply((tuple(range(8)),), change) for change in changes((tuple(range(8)),), [1, 2], guide)}
    assert from_labels(labels) in halves


def test_changes_that_no_longer_apply_change_nothing():
    partition = ((0, 1), (2,))
    for change in (
        Change("move", 0, 1),
        Change("move", 2, 0),
        Change("swap", 0, 1),
        Change("merge", 0, 1),
        Change("split", 0, 0, (2,)),
        Change("split", 0, 0, (0, 1)),
    ):
        assert apply(partition, change) == partition


@given(st.data(), st.integers(1, 9), st.integers(0, 50))
def test_resize_gives_the_number_of_groups_asked_for(data, n, seed):
    partition = random_partition(n, data.draw(st.integers(1, n)), seed)
    m = data.draw(st.integers(1, n))
    found = resize(partition, m, seed)
    assert len(found) == m
    assert found == canonical(found)
    assert to_labels(found)
    if m >= len(partition):  # splits only: every group lies in one of the old ones
        assert all(any(set(group) <= set(old) for old in partition) for group in found)
    with pytest.raises(ValueError, match="into"):
        resize(partition, n + 1, seed)


def test_perturb_draws_every_neighbour():
    partition = ((0, 1, 2), (3,), (4,), (5, 6))
    expected = {apply(partition, change) for change in changes(partition)} - {partition}
    assert {perturb(partition, 1, seed) for seed in range(1000)} == expected
    assert perturb(((0,), (1,)), 3, 0) == ((0,), (1,))
    assert perturb(((0, 1),), 3, 0) == ((0, 1),)


def test_gain_of_a_change_is_the_difference_of_densities():
    guide = np.random.default_rng(0).normal(size=(9, 9))
    guide += guide.T

    def density(partition):
        return sum(guide[np.ix_(group, group)].sum() / len(group) for group in partition)

    partition = random_partition(9, 3, 1)
    options = changes(partition, range(1, 10), guide)
    assert {change.kind for change in options} == {"move", "swap", "merge", "split"}
    expected = [density(apply(partition, change)) - density(partition) for change in options]
    np.testing.assert_allclose(guided_gains(partition, options, guide), expected, atol=1e-12)


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 9), st.sets(st.integers(1, 6), min_size=1), st.integers(0, 100), st.integers(1, 40))
def test_with_free_m_the_number_of_groups_stays_among_those_allowed(n, counts, seed, neighbours):
    counts = sorted({min(m, n) for m in counts})
    start = random_partition(n, counts[0], seed)
    objective = scatter(seed, n)
    guide = np.random.default_rng(seed).normal(size=(n, n))
    seen = set()

    def watched(partition):
        seen.add(len(partition))
        assert to_labels(partition)
        return objective(partition)

    options = {"seed": seed, "neighbours": neighbours, "guide": guide + guide.T, "counts": counts}
    found = improve(start, watched, **options)
    assert seen <= set(counts)
    assert found.objective == objective(found.partition) <= objective(start)
    assert found == improve(start, objective, **options)


def test_a_start_that_is_not_allowed_is_refused():
    with pytest.raises(ValueError, match="2 groups, where"):
        improve(((0,), (1,)), len, counts=[1])


@pytest.mark.parametrize("price", [0.0, 0.05])
def test_with_free_m_the_optimum_over_all_m_is_reached_from_any_number_of_groups(price):
    tasks, _ = planted_tasks(7, 3, train=60, validation=80, dim=20, seed=4)
    estimator = Estimator(tasks, TrainingConfig(min_steps=0), 0.05)
    best = best_optimum(estimated_optima(estimator, price=price))

    def priced(partition):
        return estimator.objective(partition) + price * len(partition)

    guide = affinity(estimator, sample_subsets(7, 50, 3, 0)).symmetric()
    starts = [random_partition(7, m, m) for m in range(1, 8)]
    found = [improve(start, priced, seed=1, counts=range(1, 8), guide=guide) for start in starts]
    assert sum(each.objective <= best.objective + 1e-9 for each in found) >= 6


def test_gaps_in_the_allowed_numbers_are_crossed():
    """Only 2 and 5 groups are allowed, no merge or split leads from one to the other, and 5 is better."""
    objective = {2: 1.0, 5: 0.0}
    found = improve(random_partition(8, 2, 0), lambda partition: objective[len(partition)], counts=[2, 5])
    assert len(found.partition) == 5


@pytest.mark.parametrize("m", [2, 3, 4])
def test_improve_reaches_the_exact_optimum_from_most_random_starts(m):
    tasks, _ = planted_tasks(7, 3, train=60, validation=80, dim=20, seed=4)
    estimator = Estimator(tasks, TrainingConfig(min_steps=0), 0.05)
    best = estimator.objective(exact(7, m, estimator.objective))
    reached = [
        improve(random_partition(7, m, seed), estimator.objective, seed=seed).objective <= best + 1e-9
        for seed in range(10)
    ]
    assert sum(reached) >= 8
