"""Similarities of tasks against sums written out example by example, and against autograd's own definition of the loss."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import softmax

from ray_ensemble.estimator import TaskFeatures, pairwise_margins
from ray_ensemble.estimator.planted import planted_tasks
from ray_ensemble.estimator.similarity import (
    centred_cosines,
    cosines,
    loss_gradient_similarity,
    mean_loss_gradients,
)


def cosine(a, b):
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def test_cosines_are_those_of_each_pair():
    vectors = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    found, centred = cosines(vectors), centred_cosines(vectors + 100.0)
    less = vectors.astype(np.float64) - vectors.astype(np.float64).mean(axis=0)
    for i in range(5):
        for j in range(5):
            assert found[i, j] == pytest.approx(cosine(vectors[i], vectors[j]), abs=1e-6)
            assert centred[i, j] == pytest.approx(cosine(less[i], less[j]), abs=1e-3)
    assert np.array_equal(found, found.T)
    assert np.array_equal(centred, centred.T)


def test_what_all_tasks_share_hides_them_from_plain_cosines_alone():
    shared = np.full(16, 50.0)
    own = np.random.default_rng(1).normal(size=(2, 16))
    vectors = shared + np.stack([own[0], own[0] * 1.1, own[1], own[1] * 1.1])
    assert cosines(vectors).min() > 0.99
    found = centred_cosines(vectors)
    assert min(found[0, 1], found[2, 3]) > 0.9
    assert found[:2, 2:].max() < 0


def test_zero_and_equal_vectors_are_like_nothing():
    assert np.array_equal(cosines(np.array([[0.0, 0.0], [3.0, 4.0]])), [[0.0, 0.0], [0.0, 1.0]])
    assert not centred_cosines(np.ones((3, 2))).any()
    with pytest.raises(ValueError, match="one finite vector a task"):
        cosines(np.array([[1.0, np.nan]]))
    with pytest.raises(ValueError, match="one finite vector a task"):
        centred_cosines(np.ones(3))


@pytest.mark.parametrize("labels", [2, 4])
def test_mean_loss_gradient_is_the_derivative_of_the_mean_loss(labels):
    """By central differences of the linearised loss −log softmax(s + Φβ)_y at β = 0."""
    generator = np.random.default_rng(labels)
    n, d = 9, 5
    scores, right = generator.normal(size=(n, labels)), generator.integers(labels, size=n)
    features = generator.normal(size=(n, labels, d)).astype(np.float32)
    features[:, 0] = 0.0
    rows, margins, starts = pairwise_margins(scores, features, right)
    task = TaskFeatures("task", rows, margins, scores, features, right, starts)

    def loss(beta):
        return float(-np.log(softmax(scores + features @ beta, axis=1)[np.arange(n), right]).mean())

    step = 1e-5
    want = [-(loss(step * unit) - loss(-step * unit)) / (2 * step) for unit in np.eye(d)]
    np.testing.assert_allclose(mean_loss_gradients([task])[0], want, rtol=1e-5, atol=1e-8)


def test_one_margin_counts_by_what_is_wrong_with_it():
    features, _ = planted_tasks(3, 2, train=20, validation=4, dim=6)
    found = mean_loss_gradients(features)
    for task, gradient in zip(features, found, strict=True):
        residual = 1.0 / (1.0 + np.exp(task.train_margins))
        np.testing.assert_allclose(gradient, (residual[:, None] * task.train_features).mean(axis=0), rtol=1e-6)
    similarity = loss_gradient_similarity(features)
    assert similarity[0, 2] == pytest.approx(cosine(found[0], found[2]))
    assert similarity[0, 2] > similarity[0, 1], "tasks 0 and 2 are planted in one group"
