"""Clustering on matrices with a known answer, and on estimates of generated tasks."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from ray_ensemble.config import TrainingConfig
from ray_ensemble.errors import InputError
from ray_ensemble.estimator import Estimator, sample_subsets
from ray_ensemble.estimator.affinity import affinity
from ray_ensemble.estimator.planted import planted_tasks
from ray_ensemble.grouping.clustering import (
    cluster_sdp,
    cluster_sdp_penalty,
    cluster_spectral,
    largest_penalty,
    penalised_relaxation,
    relaxation,
)
from ray_ensemble.grouping.partitions import from_labels, improve, random_partition

METHODS = pytest.mark.parametrize("cluster", [cluster_sdp, cluster_spectral])


def blocks(labels, noise=0.0, scale=1.0, seed=0):
    labels = np.asarray(labels)
    drawn = np.random.default_rng(seed).normal(size=(len(labels), len(labels))) * noise
    matrix = np.where(np.equal.outer(labels, labels), 1.0, -0.3) + (drawn + drawn.T) / 2
    np.fill_diagonal(matrix, 0.0)
    return matrix * scale


@METHODS
@pytest.mark.parametrize("labels", [[0, 0, 0, 1, 1, 1], [0, 1, 2, 0, 1, 2, 0, 1, 2, 0], [0, 0, 0, 0, 0, 1, 1, 2]])
@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_blocks_are_found(cluster, labels, scale):
    for seed in range(3):
        found = cluster(blocks(labels, 0.3, scale, seed), max(labels) + 1, seed)
        assert found == from_labels(labels)


@METHODS
def test_exactly_m_groups_come_back_whatever_the_matrix(cluster):
    generator = np.random.default_rng(0)
    for matrix in (np.zeros((6, 6)), blocks([0] * 5 + [1]), generator.random((6, 6))):
        symmetric = (matrix + matrix.T) / 2
        for m in (1, 2, 4, 5, 6):
            found = cluster(symmetric, m, 5)
            assert len(found) == m
            assert sorted(task for group in found for task in group) == list(range(6))
            assert found == cluster(symmetric, m, 5)


@METHODS
def test_more_groups_than_tasks_is_wrong_input(cluster):
    with pytest.raises(InputError, match="more groups than tasks: 4 groups of 3 tasks"):
        cluster(np.zeros((3, 3)), 4, 0)
    with pytest.raises(ValueError, match="symmetric"):
        cluster(np.triu(np.ones((3, 3))), 2, 0)
    with pytest.raises(ValueError, match="finite"):
        cluster(np.full((3, 3), np.nan), 2, 0)


def test_relaxation_is_feasible_and_bounds_every_partition():
    matrix = blocks([0, 0, 0, 1, 1, 2, 2, 2], noise=1.0)
    for m in (2, 3, 4):
        solution = relaxation(matrix, m)
        np.testing.assert_allclose(solution.sum(axis=1), 1, atol=1e-5)
        assert np.trace(solution) == pytest.approx(m, abs=1e-5)
        assert solution.min() > -1e-6
        assert np.linalg.eigvalsh(solution).min() > -1e-6
        bound = (matrix * solution).sum() + 1e-5
        for seed in range(30):
            partition = random_partition(8, m, seed)
            assert sum(matrix[np.ix_(group, group)].sum() / len(group) for group in partition) <= bound


def test_relaxation_is_solved_once_per_m():
    matrix = blocks([0, 0, 1, 1])
    assert relaxation(matrix, 2) is relaxation(matrix.copy(), 2)
    assert relaxation(matrix, 2) is not relaxation(matrix, 3)


def density(partition, matrix):
    return sum(matrix[np.ix_(group, group)].sum() / len(group) for group in partition)


def test_penalised_relaxation_is_feasible_and_bounds_every_partition_of_any_m():
    matrix = blocks([0, 0, 0, 1, 1, 2, 2, 2], noise=1.0)
    for penalty in (-0.5, 0.0, 0.3, 2.0):
        solution = penalised_relaxation(matrix, penalty)
        np.testing.assert_allclose(solution.sum(axis=1), 1, atol=1e-5)
        assert solution.min() > -1e-6
        assert np.linalg.eigvalsh(solution).min() > -1e-6
        bound = (matrix * solution).sum() - penalty * np.trace(solution) + 1e-5
        for seed in range(40):
            partition = random_partition(8, 1 + seed % 8, seed)
            assert density(partition, matrix) - penalty * len(partition) <= bound


def test_the_trace_falls_with_the_penalty_down_to_one_at_the_largest():
    matrix = blocks([0, 0, 0, 1, 1, 2, 2, 2], noise=0.5)
    top = largest_penalty(matrix)
    traces = [np.trace(penalised_relaxation(matrix, part * top)) for part in (0.0, 0.2, 0.5, 0.8, 0.95, 1.05, 1.5)]
    assert all(later <= earlier + 1e-4 for earlier, later in pairwise(traces))
    assert traces[-3] > 1.001
    np.testing.assert_allclose(traces[-2:], 1, atol=1e-3)
    assert largest_penalty(np.zeros((4, 4))) == 0


@pytest.mark.parametrize("labels", [[0, 0, 0, 1, 1, 1], [0, 1, 2, 0, 1, 2, 0, 1, 2, 0], [0] * 7, list(range(5))])
def test_the_penalised_relaxation_finds_the_blocks_and_their_number(labels):
    """No objective tells: the density itself, which zero for a task alone makes comparable between numbers of groups."""
    matrix = blocks(labels, 0.2)
    found = cluster_sdp_penalty(matrix, range(1, len(labels) + 1), 0, lambda partition: -density(partition, matrix))
    assert found == from_labels(labels)


def test_the_number_of_groups_is_one_of_those_allowed_and_the_objective_decides():
    matrix = blocks([0, 0, 0, 1, 1, 1, 2, 2, 2])
    seen = []

    def watched(partition):
        seen.append(len(partition))
        return -len(partition)

    assert len(cluster_sdp_penalty(matrix, [2, 5], 0, watched)) == max(seen)
    assert set(seen) <= {2, 5}
    assert cluster_sdp_penalty(np.zeros((1, 1)), [1], 0, len) == ((0,),)
    with pytest.raises(InputError, match="more groups than tasks: 10 groups of 9 tasks"):
        cluster_sdp_penalty(matrix, [2, 10], 0, len)
    with pytest.raises(ValueError, match="no number of groups"):
        cluster_sdp_penalty(matrix, [], 0, len)


@METHODS
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_planted_groups_of_ten_tasks_are_found_from_estimates(cluster, seed):
    tasks, membership = planted_tasks(10, 3, train=80, validation=400, dim=60, seed=seed)
    estimator = Estimator(tasks, TrainingConfig(min_steps=0), 0.05)
    view = affinity(estimator, sample_subsets(10, 50, 3, seed)).symmetric()
    found = improve(cluster(view, 3, 0), estimator.objective)
    assert found.partition == from_labels(membership)


def test_planted_groups_of_sixty_tasks_are_found_by_spectral_and_local_search():
    """The affinity alone does not tell (a tenth of the pairs' noise remains): the local search on the objective has to."""
    tasks, membership = planted_tasks(60, 4, train=40, validation=200, dim=12, signal=3.0, own=0.0, seed=0)
    estimator = Estimator(tasks, TrainingConfig(min_steps=0), 0.02)
    view = affinity(estimator, sample_subsets(60, 120, 10, 0)).symmetric()
    found = improve(cluster_spectral(view, 4, 0), estimator.objective, guide=view, kicks=0)
    assert found.partition == from_labels(membership)
