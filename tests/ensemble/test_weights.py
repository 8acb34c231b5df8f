"""Ensemble weights: on the simplex, optimal by a slow search, and trusting the own group when data say nothing."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.special import log_softmax

from ray_ensemble.ensemble.weights import (
    PRIOR_EXAMPLES,
    best_step,
    booster_scores,
    combine,
    fit_step_size,
    fit_weights,
    label_losses,
)


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


def random_direction(seed, count=40, signal=0.3):
    generator = np.random.default_rng(seed)
    scores, labels = generator.normal(size=(count, 3)), generator.integers(0, 3, count)
    direction = generator.normal(size=(count, 3)) * 0.5
    direction[np.arange(count), labels] += signal
    return scores, direction, labels


@pytest.mark.parametrize("seed", range(4))
def test_a_step_is_the_lowest_of_a_grid_shrunk_by_its_standard_error(seed):
    scores, direction, labels = random_direction(seed, signal=0.6)
    grid = np.linspace(0, 8, 8001)
    lowest = grid[np.argmin([label_losses(scores + step * direction, labels).mean() for step in grid])]
    h = 1e-5
    slopes = (label_losses(scores + h * direction, labels) - label_losses(scores - h * direction, labels)) / (2 * h)
    z = slopes.mean() / (slopes.std(ddof=1) / np.sqrt(len(labels)))
    step = fit_step_size(scores, direction, labels)
    assert step == pytest.approx(max(0, 1 - 1 / z**2) * lowest, abs=2e-3)
    assert label_losses(scores + step * direction, labels).mean() <= label_losses(scores, labels).mean()


def test_what_a_step_adds_does_not_depend_on_the_direction_s_length():
    scores, direction, labels = random_direction(0, signal=1.0)
    step = fit_step_size(scores, direction, labels)
    assert step > 0
    assert fit_step_size(scores, direction * 4, labels) == pytest.approx(step / 4, rel=1e-6)


def test_a_step_is_no_longer_than_what_training_says():
    """A direction that rights every validation example would be followed for ever."""
    scores, _, labels = random_direction(0)
    direction = np.eye(3)[labels]
    assert fit_step_size(scores, direction, labels) > 10
    assert 0 < fit_step_size(scores, direction, labels, 1.5) <= 1.5
    grid = np.linspace(0, 5, 5001)
    scores, direction, labels = random_direction(1, signal=0.6)
    lowest = grid[np.argmin([label_losses(scores + step * direction, labels).mean() for step in grid])]
    assert best_step(scores, direction, labels) == pytest.approx(lowest, abs=1e-3)
    assert best_step(scores, -direction, labels) == 0


def test_noise_and_harm_get_no_step():
    scores, direction, labels = random_direction(1, signal=1.0)
    assert fit_step_size(scores, -direction, labels) == 0
    assert fit_step_size(scores, np.zeros_like(direction), labels) == 0
    assert fit_step_size(scores[:1], direction[:1], labels[:1]) == 0, "one example tells nothing of its spread"
    steps = [fit_step_size(*random_direction(seed, signal=0.0)) for seed in range(40)]
    assert np.mean([step == 0 for step in steps]) > 0.7


def test_boosters_count_by_their_difference_from_the_start():
    generator = np.random.default_rng(0)
    boosters, start = generator.normal(size=(2, 7, 3)), generator.normal(size=(7, 3))
    added = booster_scores(boosters, start)
    want = sum(log_softmax(b, axis=1) - log_softmax(start, axis=1) for b in boosters)
    np.testing.assert_allclose(added, want, atol=1e-12)
    shifted = booster_scores(boosters + generator.normal(size=(2, 7, 1)), start + 5.0)
    np.testing.assert_allclose(added, shifted, atol=1e-9, err_msg="the level of scores means nothing")
    assert not booster_scores(start[None], start).any()
