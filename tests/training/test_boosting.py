"""The boosting step against slow references: residuals by autograd, ridge by least squares, step sizes by a grid."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ray_ensemble.estimator import TaskFeatures, pairwise_margins
from ray_ensemble.estimator.budget import regularization_grid
from ray_ensemble.training.boosting import fit_residual, group_loss, residuals, worst_group

DIM = 12


def flat(beta: np.ndarray) -> list[np.ndarray]:
    return [np.zeros(2)]


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


def test_the_judge_chooses_the_smallest_penalty_within_its_standard_error():
    features = [task(1, 40, 2), task(2, 30, 2)]
    residual = [np.random.default_rng(0).random((f.examples, 1)) for f in features]
    grid = regularization_grid(features)
    norms = [np.linalg.norm(fit_residual(features, residual, "examples", flat, value).beta) for value in grid]

    def judge(best: int, spread: float, gain: float = 9.0):
        """Losses (2, 50) that rise by 0.01 a grid point on either side of `best`, with a spread, below those of no step."""
        noise = np.random.default_rng(1).normal(size=(2, 50))
        noise -= noise.mean(axis=1, keepdims=True)
        noise /= noise.std(axis=1, keepdims=True)

        def losses(beta):
            if not beta.any():
                return [np.full(50, 1.0 + gain)] * 2
            place = int(np.argmin(np.abs(norms - np.linalg.norm(beta))))
            return list(1.0 + 0.01 * abs(place - best) + spread * place * noise)

        return losses

    sharp = fit_residual(features, residual, "examples", judge(5, 0.0))
    assert sharp.regularization == grid[5]
    assert sharp.judged == pytest.approx(1.0)
    # The difference over n points has a standard error of spread·n/√(50·2).
    blurred = fit_residual(features, residual, "examples", judge(5, 0.11))
    assert blurred.regularization == grid[-1], "0.011 n is more than 0.01 n everywhere"
    assert fit_residual(features, residual, "examples", judge(5, 0.09)).regularization == grid[5]
    # Half of the gain has to be kept.
    assert fit_residual(features, residual, "examples", judge(5, 0.11, gain=0.065)).regularization == grid[8]


def test_the_worst_group_is_that_of_highest_mean_loss():
    losses = {"a": np.array([3.0]), "b": np.array([0.0, 0.0]), "c": np.array([1.0, 1.2])}
    counts = {"a": 10, "b": 90, "c": 50}
    groups = [["a", "b"], ["c"]]
    assert group_loss(losses, counts, groups[0], "examples") == pytest.approx(0.3)
    assert group_loss(losses, counts, groups[0], "tasks") == pytest.approx(1.5)
    assert worst_group(losses, counts, groups, "examples") == 1
    assert worst_group(losses, counts, groups, "tasks") == 0
    assert worst_group({"a": np.ones(2), "b": np.ones(2)}, {"a": 2, "b": 2}, [["a"], ["b"]], "tasks") == 0
