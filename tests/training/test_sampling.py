"""Samplers without favourites, and an estimate that weighs examples as they draw them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_ensemble.config import TrainingConfig
from ray_ensemble.estimator import TaskFeatures
from ray_ensemble.estimator.budget import group_regularization, sampler_weights, stack_group
from ray_ensemble.estimator.estimator import Estimator
from ray_ensemble.estimator.models import sampler_shares
from ray_ensemble.training import draw, sample_batch

SIZES = st.lists(st.integers(1, 7), min_size=1, max_size=5)


def counts(sizes, batch_size, steps, seed, sampling):
    drawn = Counter(int(i) for step in range(steps) for i in draw(step, sizes, batch_size, seed, sampling))
    return np.array([drawn[i] for i in range(sum(sizes))])


@settings(max_examples=40, deadline=None)
@given(sizes=SIZES, batch_size=st.integers(1, 6), steps=st.integers(1, 30), seed=st.integers(0, 2**63 - 1))
def test_tasks_are_drawn_equally_often_and_so_are_the_examples_of_a_task(sizes, batch_size, steps, seed):
    found = np.split(counts(sizes, batch_size, steps, seed, "tasks"), np.cumsum(sizes)[:-1])
    by_task = [int(each.sum()) for each in found]
    assert sum(by_task) == batch_size * steps
    assert max(by_task) - min(by_task) <= 1
    assert all(each.max() - each.min() <= 1 for each in found)


@settings(max_examples=40, deadline=None)
@given(sizes=SIZES, batch_size=st.integers(1, 6), steps=st.integers(1, 30), seed=st.integers(0, 2**63 - 1))
def test_examples_are_drawn_equally_often(sizes, batch_size, steps, seed):
    found = counts(sizes, batch_size, steps, seed, "examples")
    assert found.sum() == batch_size * steps
    assert found.max() - found.min() <= 1


@pytest.mark.parametrize("sampling", ["examples", "tasks"])
def test_a_step_is_a_function_of_seed_and_step(sampling):
    sizes = [9, 4, 30]
    forward = [draw(step, sizes, 8, 5, sampling).tolist() for step in range(6)]
    backward = [draw(step, sizes, 8, 5, sampling).tolist() for step in reversed(range(6))]
    assert forward == backward[::-1]
    assert forward != [draw(step, sizes, 8, 6, sampling).tolist() for step in range(6)]


def test_epochs_have_orders_of_their_own():
    epoch = [int(i) for step in range(5) for i in sample_batch(step, 10, 4, seed=1)]
    assert sorted(epoch[:10]) == sorted(epoch[10:]) == list(range(10))
    assert epoch[:10] != epoch[10:]
    assert not np.array_equal(sample_batch(0, 100, 8, seed=1), sample_batch(0, 100, 8, seed=2))
    tasks = [int(i) for step in range(12) for i in draw(step, [3, 3], 1, 1, "tasks")]
    assert sorted(tasks[:6]) == sorted(tasks[6:]) == list(range(6))


def features(sizes, dim=6, seed=0) -> list[TaskFeatures]:
    generator = np.random.default_rng(seed)
    made = []
    for number, size in enumerate(sizes):
        slopes = generator.normal(size=(8, 1, dim)).astype(np.float32)
        made.append(
            TaskFeatures(
                f"task-{number}",
                generator.normal(size=(size, dim)).astype(np.float32),
                generator.normal(size=size),
                generator.normal(size=(8, 2)),
                np.concatenate([np.zeros_like(slopes), slopes], axis=1),
                generator.integers(0, 2, 8),
            )
        )
    return made


@pytest.mark.parametrize("sampling", ["examples", "tasks"])
@pytest.mark.parametrize("members", [(0,), (0, 1), (2, 0, 1)])
def test_the_estimate_weighs_examples_as_the_sampler_draws_them(sampling, members):
    sizes = [12, 3, 8]
    made = features(sizes)
    weights = sampler_weights(made, members, sampling)
    group = [sizes[i] for i in members]
    assert weights.sum() == pytest.approx(1.0)
    steps = len(members) * 12 * 3 * 8  # whole rounds, and whole epochs of every task
    drawn = counts(group, sum(group), steps, 4, sampling)
    assert np.allclose(drawn / drawn.sum(), weights, atol=1e-12)
    assert np.array_equal(stack_group(made, members, sampling)[2], weights)
    shares = sampler_shares(made, members, sampling)
    assert np.allclose(shares, [part.sum() for part in np.split(drawn / drawn.sum(), np.cumsum(group)[:-1])])


@pytest.mark.parametrize("sampling", ["examples", "tasks"])
def test_gradients_of_a_part_stand_for_all_that_is_trained_on(sampling):
    """With `gradients.max_examples` the fit still weighs tasks, and takes steps, as the training on all examples does."""
    part = [replace(made, trained=trained) for made, trained in zip(features([5, 3, 5]), (20, 3, 40), strict=True)]
    whole = features([20, 3, 40])
    for members in [(0,), (0, 1), (2, 0, 1)]:
        shares = sampler_shares(whole, members, sampling)
        np.testing.assert_allclose(sampler_shares(part, members, sampling), shares)
        weights = sampler_weights(part, members, sampling)
        assert weights.sum() == pytest.approx(1.0)
        expected = np.concatenate(
            [np.full(part[m].examples, s / part[m].examples) for m, s in zip(members, shares, strict=True)]
        )
        np.testing.assert_allclose(weights, expected)
        training = TrainingConfig(epochs=3, min_steps=0)
        assert group_regularization(1.0, training, part, members) == group_regularization(1.0, training, whole, members)


def test_the_estimator_follows_the_choice():
    """Task-balanced sampling of a group is that of examples, once the small task's examples stand there four times."""
    big, small = features([12, 3])
    repeated = TaskFeatures(
        small.name,
        np.tile(small.train_features, (4, 1)),
        np.tile(small.train_margins, 4),
        small.validation_scores,
        small.validation_features,
        small.validation_labels,
    )
    training = TrainingConfig(min_steps=300)  # the same steps, hence the same λ, for any number of examples
    balanced = Estimator([big, small], training.model_copy(update={"sampling": "tasks"}), 0.05)
    plain = Estimator([big, small], training, 0.05)
    found, want = balanced.fit((0, 1))[0].beta, Estimator([big, repeated], training, 0.05).fit((0, 1))[0].beta
    assert np.allclose(found, want, atol=1e-6)
    assert not np.allclose(found, plain.fit((0, 1))[0].beta, atol=1e-3)
