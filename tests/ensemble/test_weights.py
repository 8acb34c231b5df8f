"""Ensemble weights: on the simplex, optimal by a slow search, and trusting the own group when data say nothing."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.special import log_softmax

from ray_ensemble.ensemble.weights import PRIOR_EXAMPLES, combine, fit_weights


def loss(scores, labels, w, own):
    values = log_softmax(combine(scores, np.asarray(w)), axis=1)[np.arange(len(labels)), labels]
    return -values.mean() - PRIOR_EXAMPLES / len(labels) * np.log(max(w[own], 1e-12))


def random_scores(seed, adapters=3, count=40, classes=3):
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, count)
    scores = generator.normal(size=(adapters, count, classes)) * 2
    for g in range(adapters):
        scores[g, np.arange(count), labels] += g
    return scores, labels


@pytest.mark.parametrize("seed", range(4))
def test_no_point_of_a_grid_on_the_simplex_is_better(seed):
    scores, labels = random_scores(seed)
    w = fit_weights(scores, labels, own=0)
    assert w.min() >= 0
    assert w.sum() == pytest.approx(1)
    grid = [g for g in itertools.product(np.linspace(0, 1, 41), repeat=2) if sum(g) <= 1]
    best = min(loss(scores, labels, (*g, 1 - sum(g)), 0) for g in grid)
    assert loss(scores, labels, w, 0) <= best + 1e-4


def test_equal_adapters_leave_the_weight_with_the_own_group():
    scores, labels = random_scores(0, adapters=1)
    w = fit_weights(np.repeat(scores, 3, axis=0), labels, own=1)
    assert w[1] > 0.99


def test_a_better_stranger_wins_with_data_and_not_with_two_examples():
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, 400)
    good = np.zeros((400, 2))
    good[np.arange(400), labels] = 2.0
    flip = generator.random(400) < 0.25
    good[flip] = good[flip][:, ::-1]
    scores = np.stack([generator.normal(size=(400, 2)), good])
    assert fit_weights(scores, labels, own=0)[1] > 0.6
    assert fit_weights(scores[:, :2], labels[:2], own=0)[0] > 0.5


def test_combination_does_not_depend_on_the_scores_level():
    scores, labels = random_scores(1)
    shifted = scores + np.random.default_rng(0).normal(size=(3, 40, 1)) * 50
    w = np.array([0.2, 0.5, 0.3])
    np.testing.assert_allclose(combine(scores, w), combine(shifted, w), atol=1e-9)
    assert len(labels) == 40


def test_adapters_of_weight_zero_may_hold_anything():
    scores, _ = random_scores(2)
    broken = scores.copy()
    broken[1] = np.nan
    w = np.array([0.4, 0.0, 0.6])
    np.testing.assert_array_equal(combine(scores, w), combine(broken, w))
