"""Sampled subsets and the affinity."""

from __future__ import annotations

import json
import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_ensemble.config import TrainingConfig
from ray_ensemble.estimator import Estimator, sample_subsets
from ray_ensemble.estimator.affinity import SUBSETS_PER_TASK, affinity
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
    assert found["members"][1] == ["task-3", "task-4", "task-5"]
    json.dumps(found, allow_nan=False)
