"""Sampled subsets and the affinity."""

from __future__ import annotations

import json
import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_ensemble.config import EstimatorConfig, TrainingConfig
from ray_ensemble.estimator import Estimator, sample_subsets
from ray_ensemble.estimator.affinity import (
    SUBSETS_PER_TASK,
    affinity,
    gradient_similarity,
    job_subsets,
    nearest_pairs,
)
from ray_ensemble.estimator.planted import planted_tasks


def pairs(subsets):
    return {pair for subset in subsets for pair in combinations(subset, 2)}


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 20), count=st.integers(1, 80), size=st.integers(1, 6), seed=st.integers(0, 5))
def test_subsets_are_distinct_of_one_size_and_cover_every_pair(n, count, size, seed):
    subsets = sample_subsets(n, count, size, seed)
    expected = min(size, n - 1 if n > 2 else n)
    assert {len(subset) for subset in subsets} == {expected}
    assert len(set(subsets)) == len(subsets)
    assert all(list(subset) == sorted(set(subset)) and subset[-1] < n for subset in subsets)
    assert len(subsets) >= min(count, math.comb(n, expected))
    assert subsets == sample_subsets(n, count, size, seed)
    if expected >= 2:
        assert pairs(subsets) == set(combinations(range(n), 2))


def test_the_paper_setting_needs_no_more_than_it_asks_for():
    assert len(sample_subsets(10, 50, 3, 0)) == 50
    assert sample_subsets(10, 50, 3, 0) != sample_subsets(10, 50, 3, 1)
    # 17 is the least that can cover 45 pairs by threes; greedy comes near.
    assert 17 <= len(sample_subsets(10, 1, 3, 0)) <= 24


def test_fifty_tasks_are_covered_and_more_are_each_held_often():
    assert pairs(sample_subsets(50, 50, 3, 0)) == set(combinations(range(50), 2))
    held = np.bincount(np.concatenate(sample_subsets(80, 50, 3, 0)), minlength=80)
    assert held.mean() >= SUBSETS_PER_TASK
    assert held.min() >= SUBSETS_PER_TASK - 2


def some_similarity(n, seed):
    drawn = np.random.default_rng(seed).normal(size=(n, n))
    return drawn + drawn.T


@settings(max_examples=20, deadline=None)
@given(n=st.integers(51, 90), neighbours=st.integers(1, 6), size=st.integers(2, 5), seed=st.integers(0, 5))
def test_above_fifty_tasks_the_most_similar_pairs_are_covered_first(n, neighbours, size, seed):
    first = nearest_pairs(some_similarity(n, seed), neighbours)
    wanted = {pair for pair in combinations(range(n), 2) if first[pair]}
    subsets = sample_subsets(n, 10, size, seed, first)
    assert len(set(subsets)) == len(subsets) == max(10, math.ceil(SUBSETS_PER_TASK * n / size))
    assert {len(subset) for subset in subsets} == {size}
    done = 0
    while done < len(subsets) and wanted:  # greedy: as long as some are not covered, every subset covers one
        before = len(wanted)
        wanted -= pairs([subsets[done]])
        assert len(wanted) < before
        done += 1
    assert not wanted or done == len(subsets)
    assert subsets == sample_subsets(n, 10, size, seed, first)


@given(n=st.integers(2, 12), neighbours=st.integers(1, 12), seed=st.integers(0, 20))
def test_nearest_pairs_are_each_tasks_most_similar_others(n, neighbours, seed):
    similarity = some_similarity(n, seed)
    expected = np.zeros((n, n), dtype=bool)
    for task in range(n):
        order = sorted((j for j in range(n) if j != task), key=lambda j: -similarity[task, j])
        expected[task, order[:neighbours]] = expected[order[:neighbours], task] = True
    np.testing.assert_array_equal(nearest_pairs(similarity, neighbours), expected)


def test_gradient_similarity_is_the_cosine_of_mean_gradients():
    tasks, membership = planted_tasks(9, 3, train=200, validation=4, dim=20, signal=4.0, seed=2)
    tasks[3] = type(tasks[3])(**{**vars(tasks[3]), "train_features": tasks[3].train_features * 7})
    tasks[4] = type(tasks[4])(**{**vars(tasks[4]), "train_features": tasks[4].train_features * 0})
    found = gradient_similarity(tasks)
    for i, j in combinations([t for t in range(9) if t != 4], 2):
        a, b = (tasks[t].train_features.astype(float).mean(axis=0) for t in (i, j))
        assert found[i, j] == found[j, i] == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    assert np.all(found[4] == 0)
    together = np.equal.outer(membership, membership) & ~np.eye(9, dtype=bool)
    together[4] = together[:, 4] = False
    apart = ~np.equal.outer(membership, membership)
    apart[4] = apart[:, 4] = False
    assert found[together].min() > found[apart].max()


def test_a_job_of_few_tasks_draws_as_before_and_one_of_many_by_similarity():
    few, _ = planted_tasks(6, 2, train=5, validation=4, dim=5)
    assert job_subsets(few, EstimatorConfig(subsets=9)) == sample_subsets(6, 9, 3, 0)
    many, membership = planted_tasks(60, 4, train=60, validation=4, dim=12, signal=3.0)
    subsets = job_subsets(many, EstimatorConfig(neighbours=3))
    wanted = nearest_pairs(gradient_similarity(many), 3)
    assert {pair for pair in combinations(range(60), 2) if wanted[pair]} <= pairs(subsets)

    def mixed(drawn):
        return np.mean([membership[i] != membership[j] for subset in drawn for i, j in combinations(subset, 2)])

    assert mixed(subsets[:60]) < 0.5 * mixed(sample_subsets(60, 50, 3, 0)[:60])


def test_nothing_to_draw_is_refused():
    for arguments in ((0, 1, 1, 0), (3, 0, 2, 0), (3, 1, 0, 0)):
        with pytest.raises(ValueError, match="cannot draw"):
            sample_subsets(*arguments)


@pytest.fixture(scope="module")
def estimator():
    tasks, _ = planted_tasks(7, 2, train=80, validation=80, dim=30, seed=3)
    return Estimator(tasks, TrainingConfig(min_steps=0), 0.05)


@pytest.mark.parametrize("metric", ["loss", "accuracy"])
def test_values_are_means_over_the_subsets_that_hold_both(estimator, metric):
    subsets = sample_subsets(7, 20, 3, 0)
    found = affinity(estimator, subsets, metric)
    for i in range(7):
        for j in range(7):
            performances = []
            for subset in subsets:
                if i in subset and j in subset:
                    estimate = estimator.group(subset).search[subset.index(i)]
                    performances.append(-estimate.loss if metric == "loss" else estimate.accuracy)
            assert found.values[i, j] == pytest.approx(np.mean(performances))
            if len(performances) > 1:
                error = np.std(performances, ddof=1) / np.sqrt(len(performances))
                assert found.standard_errors[i, j] == pytest.approx(error, abs=1e-7)


def test_a_pair_never_sampled_is_neutral(estimator):
    found = affinity(estimator, [(0, 1, 2), (3, 4, 5), (0, 6, 1)])
    assert found.values[0, 4] == found.values[0, 0]
    assert np.isnan(found.standard_errors[0, 4])
    assert np.isnan(found.standard_errors[0, 2])  # seen once
    with pytest.raises(ValueError, match="at least one subset"):
        affinity(estimator, [])


def test_pairs_never_sampled_follow_gradient_similarity(estimator):
    """Where T is linear in the similarity within each row, what was not sampled is predicted exactly."""
    subsets = [(0, 1, 2), (3, 4, 5), (0, 6, 1), (2, 3, 6), (0, 4, 5)]
    bare = affinity(estimator, subsets)
    sampled = np.eye(7, dtype=bool)
    for subset in subsets:
        sampled[np.ix_(subset, subset)] = True
    known = sampled & ~np.eye(7, dtype=bool)
    # With the found values themselves as similarity the slope is 1 (where a row has one known pair it adds nothing).
    similarity = np.where(known, bare.values, 0.0)
    similarity[3, 1] = 5.0
    found = affinity(estimator, subsets, similarity=similarity)
    np.testing.assert_array_equal(found.values[sampled], bare.values[sampled])
    assert found.values[3, 1] == pytest.approx(5.0)
    against = affinity(estimator, subsets, similarity=-similarity)
    assert against.values[3, 1] == pytest.approx(bare.values[3, known[3]].mean())
    assert np.isnan(found.standard_errors[3, 1])


def test_symmetric_view_ignores_the_level_of_each_task(estimator):
    found = affinity(estimator, sample_subsets(7, 20, 3, 0))
    view = found.symmetric()
    np.testing.assert_allclose(view, view.T)
    assert np.all(view.diagonal() == 0)
    levels = np.random.default_rng(0).normal(size=(7, 1)) * 5
    shifted = type(found)(**{**vars(found), "values": found.values + levels})
    np.testing.assert_allclose(shifted.symmetric(), view, atol=1e-12)


def test_planted_partners_are_nearer_than_strangers():
    tasks, membership = planted_tasks(10, 3, train=80, validation=160, dim=40, seed=0)
    estimator = Estimator(tasks, TrainingConfig(min_steps=0), 0.05)
    view = affinity(estimator, sample_subsets(10, 50, 3, 0)).symmetric()
    together = np.equal.outer(membership, membership)
    away = ~np.eye(10, dtype=bool)
    assert view[together & away].min() > 0 > view[~together].mean()
    assert view[together & away].min() > np.quantile(view[~together], 0.9)


def test_a_task_with_labels_at_odds_is_nobodys_partner():
    """Poison: one task of a group learns the opposite."""
    tasks, _ = planted_tasks(6, 1, train=80, validation=160, dim=40, seed=0)
    poison = tasks[5]
    tasks[5] = type(poison)(**{**vars(poison), "train_features": -poison.train_features})
    estimator = Estimator(tasks, TrainingConfig(min_steps=0), 0.05)
    view = affinity(estimator, sample_subsets(6, 50, 3, 0)).symmetric()
    assert view[5, :5].max() < view[:5, :5][~np.eye(5, dtype=bool)].min()


def test_json_has_the_contract_keys_and_no_nan(estimator):
    found = affinity(estimator, [(0, 1, 2), (3, 4, 5), (0, 6, 1)], seed=9).to_json()
    assert found["tasks"] == [f"task-{index}" for index in range(7)]
    assert (found["subsets"], found["subset_size"], found["seed"]) == (3, 3, 9)
    np.testing.assert_array_equal(
        found["symmetric"], affinity(estimator, [(0, 1, 2), (3, 4, 5), (0, 6, 1)]).symmetric()
    )
    assert found["members"][1] == ["task-3", "task-4", "task-5"]
    json.dumps(found, allow_nan=False)
