"""Predictions, the training budget and cached group estimates."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest

from ray_ensemble.config import TrainingConfig
from ray_ensemble.errors import InputError, RunError
from ray_ensemble.estimator import (
    Estimator,
    choose_regularization,
    estimate_task,
    fit_margins,
    group_regularization,
    sample_subsets,
    validation_halves,
)
from ray_ensemble.estimator.budget import stack_group
from ray_ensemble.estimator.models import sampler_shares, sum_models, task_model
from ray_ensemble.estimator.planted import planted_tasks
from ray_ensemble.estimator.predict import estimate_held_out

TRAINING = TrainingConfig(min_steps=0)


@pytest.fixture(scope="module")
def tasks():
    return planted_tasks(6, 2, train=60, validation=61, dim=30, labels=3, seed=1)[0]


def test_halves_share_nothing_and_miss_nothing():
    for count in (2, 3, 10, 81):
        search, report = validation_halves(count)
        assert sorted([*search, *report]) == list(range(count))
        assert set(search % 2) == {0}
        assert set(report % 2) == {1}
    with pytest.raises(ValueError, match="two halves"):
        validation_halves(1)


def test_estimate_is_the_softmax_of_the_linearised_scores(tasks):
    task = tasks[0]
    beta = np.random.default_rng(0).normal(size=30)
    losses, right = [], []
    for index in (0, 4, 9):
        scores = [task.validation_scores[index, k] + task.validation_features[index, k] @ beta for k in range(3)]
        label = task.validation_labels[index]
        losses.append(np.log(np.exp(scores).sum()) - scores[label])
        right.append(int(np.argmax(scores)) == label)
    estimate = estimate_task(beta, task, np.array([0, 4, 9]))
    assert estimate.loss == pytest.approx(np.mean(losses), rel=1e-12)
    assert estimate.accuracy == np.mean(right)


def test_training_margins_and_validation_scores_are_one_model(tasks):
    """log(1 + e^−f) of the linearised margin is, to first order, the loss of the linearised scores."""
    task = tasks[0]
    step = 1e-4 * np.random.default_rng(0).normal(size=30)
    scores, labels = task.validation_scores, task.validation_labels
    rows = np.arange(len(labels))
    others = np.where(np.arange(3) == labels[:, None], -np.inf, scores)
    margins = scores[rows, labels] - np.log(np.exp(others).sum(axis=1))
    chances = np.exp(others) / np.exp(others).sum(axis=1, keepdims=True)
    slopes = task.validation_features[rows, labels] - np.einsum("nk,nkd->nd", chances, task.validation_features)
    expected = np.logaddexp(0, -(margins + slopes @ step)).mean()
    assert estimate_task(step, task, rows).loss == pytest.approx(expected, abs=1e-6)


def test_a_planted_change_is_estimated_as_well_as_it_is_true():
    """With enough examples the estimate for a group of like tasks comes near the loss of the change that made them."""
    tasks, _ = planted_tasks(4, 1, train=2000, validation=2000, dim=10, own=0.0, seed=2)
    estimator = Estimator(tasks, TRAINING, 1e-6)
    estimates = estimator.group(range(4))
    rows, margins, weights, _ = stack_group(tasks, range(4))
    fit = fit_margins(rows, margins, weights, 1e-9)
    for task, estimate in zip(tasks, estimates.search, strict=True):
        untouched = estimate_task(np.zeros(10), task, np.arange(2000))
        assert estimate.loss < untouched.loss - 0.1
        assert estimate.loss == pytest.approx(estimate_task(fit.beta, task, np.arange(2000)).loss, abs=0.03)


def test_regularisation_is_inverse_to_the_steps_a_group_gets(tasks):
    training = TrainingConfig(epochs=2, batch_size=8, min_steps=40)
    assert group_regularization(3.0, training, tasks, range(6)) == 3.0
    # 360 examples give 90 steps; 120 give 30, lifted to the floor of 40, as one task's 15 are.
    assert group_regularization(3.0, training, tasks, (0, 1)) == pytest.approx(3.0 * 90 / 40)
    assert group_regularization(3.0, training, tasks, (5,)) == pytest.approx(3.0 * 90 / 40)
    assert group_regularization(3.0, training, tasks, (0, 1, 2)) == pytest.approx(3.0 * 90 / 45)


def test_fewer_steps_promise_less(tasks):
    few, many = (Estimator(tasks, TrainingConfig(epochs=1, min_steps=steps), 0.05) for steps in (0, 200))
    assert many.fit((0,))[1] == 0.05
    assert few.fit((0,))[1] == pytest.approx(0.05 * 45 / 8)
    assert np.linalg.norm(few.fit((0,))[0].beta) < np.linalg.norm(many.fit((0,))[0].beta)


def test_weights_of_a_group_are_those_of_the_sampler(tasks):
    shorter = replace(tasks[1], train_features=tasks[1].train_features[:20], train_margins=tasks[1].train_margins[:20])
    rows, margins, weights, _ = stack_group([tasks[0], shorter], (0, 1))
    assert rows.shape == (80, 30)
    assert margins.shape == (80,)
    np.testing.assert_allclose(weights, 1 / 80)


def test_lambda_is_chosen_inside_the_grid_and_without_the_odd_half(tasks):
    subsets = sample_subsets(6, 10, 3, 0)
    choice = choose_regularization(tasks, TRAINING, subsets)
    assert choice.losses[choice.grid.index(choice.value)] == min(choice.losses)
    assert choice.value not in (choice.grid[0], choice.grid[-1])
    assert choice.flops > 0
    disturbed = []
    for task in tasks:
        labels, scores = task.validation_labels.copy(), task.validation_scores.copy()
        labels[1::2] = 0
        scores[1::2] += 7.0 * np.random.default_rng(0).normal(size=scores[1::2].shape)
        disturbed.append(replace(task, validation_labels=labels, validation_scores=scores))
    assert choose_regularization(disturbed, TRAINING, subsets) == choice


def test_chosen_lambda_follows_the_scale_of_the_features(tasks):
    scaled = [
        replace(task, train_features=10 * task.train_features, validation_features=10 * task.validation_features)
        for task in tasks
    ]
    subsets = sample_subsets(6, 10, 3, 0)
    first, second = (choose_regularization(made, TRAINING, subsets) for made in (tasks, scaled))
    assert second.value == pytest.approx(100 * first.value, rel=1e-5)


def test_features_of_zero_can_be_estimated(tasks):
    """A model without a gradient is told as one that training does not change."""
    still = [
        replace(task, train_features=0 * task.train_features, validation_features=0 * task.validation_features)
        for task in tasks
    ]
    choice = choose_regularization(still, TRAINING, [(0, 1, 2)])
    found = Estimator(still, TRAINING, choice.value).group((0, 1))
    search, report = (estimate_task(np.zeros(30), still[0], half) for half in validation_halves(61))
    assert found.report[0] == report
    untrained = np.log1p(np.exp(-still[0].train_margins))
    assert found.search[0].loss == pytest.approx((31 * search.loss + untrained.sum()) / (31 + len(untrained)))


def test_training_examples_count_as_held_out_ones():
    """On pairwise margins too: what the search looks at is near what fresh data say, where the fit's own rows flatter."""
    (task,), _ = planted_tasks(1, 1, train=150, validation=4000, labels=2, dim=60, seed=5)
    estimator = Estimator([task], TRAINING, 0.02)
    fit, _ = estimator.fit((0,))
    fresh = estimate_task(fit.beta, task, np.arange(4000)).loss
    flattering = np.log1p(np.exp(-(task.train_margins + task.train_features @ fit.beta))).mean()
    held_out = estimate_held_out(fit, 0, task, np.arange(1)).loss
    assert abs(held_out - fresh) < 0.3 * (fresh - flattering)


def test_groups_are_cached_by_members_and_counted_once(tasks):
    cache = {}
    estimator = Estimator(tasks, TRAINING, 0.1, cache)
    first = estimator.group(frozenset({2, 0}))
    assert estimator.group((0, 2)) is first
    assert (estimator.fits, estimator.flops) == (1, first.flops)
    assert list(cache) == [(0, 2)]
    other = Estimator(tasks, TRAINING, 0.1, pickle.loads(pickle.dumps(cache)))
    assert other.group((0, 2)) == first
    assert other.fits == 0
    assert pickle.loads(pickle.dumps(estimator)).group((0, 2)) == first


def test_an_estimate_does_not_depend_on_what_was_asked_before(tasks):
    busy = Estimator(tasks, TRAINING, 0.1)
    for members in ((0,), (0, 1), (0, 1, 2), range(6)):
        busy.group(members)
    assert busy.group((1, 2)) == Estimator(tasks, TRAINING, 0.1).group((1, 2))


@pytest.mark.parametrize("labels", [2, 3])
def test_a_group_in_a_batch_is_a_group_alone_to_the_last_bit(labels):
    tasks, _ = planted_tasks(8, 2, train=70, validation=20, dim=90, labels=labels, norm=100.0, seed=4)
    groups = [*sample_subsets(8, 30, 3, 0), (0,), (5,), range(8), (1, 2)]
    batch = Estimator(tasks, TRAINING, 1.0).groups(groups)
    shuffled = Estimator(tasks, TRAINING, 1.0).groups(groups[::-1])[::-1]
    assert batch == shuffled
    assert batch == [Estimator(tasks, TRAINING, 1.0).group(group) for group in groups]


def test_groups_answers_in_order_and_fits_each_once(tasks):
    estimator = Estimator(tasks, TRAINING, 0.1)
    found = estimator.groups([(1, 0), (2,), (0, 1)])
    assert [estimate.members for estimate in found] == [(0, 1), (2,), (0, 1)]
    assert estimator.fits == 2
    assert estimator.groups([]) == []
    with pytest.raises(IndexError):
        estimator.groups([(0,), (6,)])


def test_models_of_tasks_do_not_travel(tasks):
    estimator = Estimator(tasks, TRAINING, 0.1)
    before = len(pickle.dumps(estimator))
    estimator.fit((0, 1, 2))
    assert len(pickle.dumps(estimator)) == before


def test_two_copies_of_a_task_start_at_their_optimum(tasks):
    """The models of tasks add up to the model of their group, with the sampler's shares."""
    double = replace(tasks[0], name="copy")
    longer = replace(
        tasks[0],
        name="four times",
        train_features=np.tile(tasks[0].train_features, (4, 1)),
        train_margins=np.tile(tasks[0].train_margins, 4),
    )
    model = task_model(tasks, 0, 0.1)[0]
    for group, shares in (([tasks[0], double], [0.5, 0.5]), ([tasks[0], longer], [0.2, 0.8])):
        np.testing.assert_allclose(sampler_shares(group, (0, 1)), shares)
        summed = sum_models([task_model(group, task, 0.1)[0] for task in (0, 1)], shares)
        np.testing.assert_allclose(summed.slope, model.slope, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(summed.hessian, model.hessian, rtol=1e-4, atol=1e-6)
        rows, margins, weights, starts = stack_group(group, (0, 1))
        assert fit_margins(rows, margins, weights, 0.1, summed, starts=starts).iterations <= 2
    with pytest.raises(ValueError, match="no models"):
        sum_models([], [])


def test_objective_is_the_mean_over_tasks_under_their_own_groups(tasks):
    estimator = Estimator(tasks, TRAINING, 0.1)
    partition = [frozenset({0, 2, 4}), frozenset({1, 3, 5})]
    for half in ("search", "report"):
        losses = [e.loss for group in partition for e in estimator.group(group).half(half)]
        accuracies = [e.accuracy for group in partition for e in estimator.group(group).half(half)]
        assert estimator.objective(partition, "loss", half) == pytest.approx(np.mean(losses))
        missed = 1 - np.mean(accuracies)
        assert missed < estimator.objective(partition, "accuracy", half) < missed + 1 / (6 * 61)


@pytest.mark.parametrize("partition", [[(0, 1), (1, 2, 3, 4, 5)], [(0, 1)], [(0, 1, 2, 3, 4)], []])
def test_objective_refuses_what_is_no_partition(tasks, partition):
    with pytest.raises(ValueError, match="partition"):
        Estimator(tasks, TRAINING, 0.1).objective(partition)


def test_group_members_must_exist(tasks):
    for members in ((), (6,), (-1,)):
        with pytest.raises(IndexError):
            Estimator(tasks, TRAINING, 0.1).group(members)


def test_features_are_checked(tasks):
    task = tasks[0]
    broken = task.train_features.copy()
    broken[3, 2] = np.nan
    with pytest.raises(RunError, match=r"task-0.*train_features.*not finite"):
        replace(task, train_features=broken)
    with pytest.raises(ValueError, match="margins"):
        replace(task, train_margins=task.train_margins[1:])
    with pytest.raises(ValueError, match="validation features"):
        replace(task, validation_features=task.validation_features[:, :2])
    with pytest.raises(ValueError, match="outside"):
        replace(task, validation_labels=task.validation_labels + 1)
    with pytest.raises(InputError, match="dimension"):
        Estimator([task, planted_tasks(1, 1, dim=20, labels=3)[0][0]], TRAINING, 0.1)
