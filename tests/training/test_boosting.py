"""The boosting step against slow references: residuals by autograd, ridge by least squares, step sizes by a grid."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ray_ensemble.estimator import TaskFeatures, pairwise_margins
from ray_ensemble.training.boosting import fit_residual, group_loss, residuals, worst_group

DIM = 12


def flat(beta: np.ndarray) -> float:
    return 1.0


def task(seed: int, count: int, classes: int) -> TaskFeatures:
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, count)
    slopes = generator.normal(size=(count, classes, DIM))
    slopes -= slopes[:, :1]
    rows, margins, starts = pairwise_margins(generator.normal(size=(count, classes)), slopes, labels)
    return TaskFeatures(
        f"task-{seed}", rows, margins, np.zeros((4, classes)), np.zeros((4, classes, DIM)), np.zeros(4, int), starts
    )


@pytest.mark.parametrize("classes", [2, 4])
def test_residuals_are_minus_the_slopes_of_the_loss_in_the_margins(classes):
    generator = np.random.default_rng(0)
    scores, labels = generator.normal(size=(9, classes)), generator.integers(0, classes, 9)
    wrong = np.arange(classes)[None] != labels[:, None]
    margins = torch.tensor((scores[np.arange(9), labels][:, None] - scores)[wrong].reshape(9, -1), requires_grad=True)
    torch.log1p(torch.exp(-margins).sum(1)).sum().backward()
    np.testing.assert_allclose(residuals(scores, labels, classes - 1), -margins.grad.numpy(), atol=1e-12)
    # Of the one margin against all wrong labels, f = s_y − logsumexp s_k, the slope is the sum.
    np.testing.assert_allclose(residuals(scores, labels, 1)[:, 0], -margins.grad.sum(1).numpy(), atol=1e-12)


@pytest.mark.parametrize("sampling", ["examples", "tasks"])
@pytest.mark.parametrize("counts", [(30, 20), (2, 3)], ids=["many", "few"])
def test_ridge_is_least_squares_with_the_penalty_as_rows(sampling, counts):
    features = [task(1, counts[0], 2), task(2, counts[1], 3)]
    generator = np.random.default_rng(3)
    residual = [generator.random((f.examples, len(f.train_features) // f.examples)) for f in features]
    found = fit_residual(features, residual, sampling, flat, 0.7)
    rows = np.concatenate([f.train_features for f in features]).astype(float)
    share = [1 / sum(counts)] * 2 if sampling == "examples" else [0.5 / count for count in counts]
    root = np.sqrt(np.concatenate([np.full(r.size, w) for r, w in zip(residual, share, strict=True)]))
    target = np.concatenate([r.ravel() for r in residual])
    stacked = np.concatenate([root[:, None] * rows, np.sqrt(0.7) * np.eye(DIM)])
    want = np.linalg.lstsq(stacked, np.concatenate([root * target, np.zeros(DIM)]), rcond=None)[0]
    np.testing.assert_allclose(found.beta, want, atol=1e-9)
    assert [s.shape for s in found.shares] == [r.shape for r in residual]
    lifted = sum(s.ravel() @ f.train_features for s, f in zip(found.shares, features, strict=True))
    np.testing.assert_allclose(lifted, want, atol=1e-7, err_msg="the shares add the gradients up to the fit")


def test_the_judge_chooses_along_a_grid():
    features = [task(1, 40, 2)]
    residual = [np.random.default_rng(0).random((40, 1))]
    wanted = fit_residual(features, residual, "examples", flat, 2.5).beta
    found = fit_residual(features, residual, "examples", lambda beta: float(np.square(beta - wanted).sum()))
    others = [fit_residual(features, residual, "examples", flat, found.regularization * f) for f in (0.1, 10)]
    assert all(np.square(found.beta - wanted).sum() < np.square(o.beta - wanted).sum() for o in others)
    cautious = fit_residual(features, residual, "examples", flat)
    assert np.linalg.norm(cautious.beta) < min(np.linalg.norm(o.beta) for o in others), "of equals the most cautious"


def test_the_worst_group_is_that_of_highest_mean_loss():
    losses = {"a": np.array([3.0]), "b": np.array([0.0, 0.0]), "c": np.array([1.0, 1.2])}
    counts = {"a": 10, "b": 90, "c": 50}
    groups = [["a", "b"], ["c"]]
    assert group_loss(losses, counts, groups[0], "examples") == pytest.approx(0.3)
    assert group_loss(losses, counts, groups[0], "tasks") == pytest.approx(1.5)
    assert worst_group(losses, counts, groups, "examples") == 1
    assert worst_group(losses, counts, groups, "tasks") == 0
    assert worst_group({"a": np.ones(2), "b": np.ones(2)}, {"a": 2, "b": 2}, [["a"], ["b"]], "tasks") == 0
