"""Partitions, their neighbours, and the local search against the exact optimum."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from set_partitions import all_partitions

from ray_ensemble.config import TrainingConfig
from ray_ensemble.estimator import Estimator
from ray_ensemble.estimator.planted import planted_tasks
from ray_ensemble.grouping.partitions import (
    apply,
    canonical,
    changes,
    from_labels,
    guided_gain,
    improve,
    perturb,
    random_partition,
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


def test_gain_of_a_change_is_the_difference_of_densities():
    guide = np.random.default_rng(0).normal(size=(6, 6))
    guide += guide.T

    def density(partition):
        return sum(guide[np.ix_(group, group)].sum() / len(group) for group in partition)

    partition = random_partition(6, 3, 1)
    for change in changes(partition):
        expected = density(apply(partition, change)) - density(partition)
        assert guided_gain(partition, change, guide) == pytest.approx(expected)


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
