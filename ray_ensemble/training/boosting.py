"""A boosting step as mathematics: which group, the ensemble's residual, and its ridge regression on the gradients. No Ray here.

The ensemble's loss on a training example falls fastest when its margins f_k = s_y − s_k against the wrong labels rise in
proportion to the residual r_k = −∂loss/∂f_k = softmax(s)_k. A booster is the step of the adapter at θ₀ whose first-order margins
φ_k·β come nearest to it (Friedman 2001, "Greedy function approximation: a gradient boosting machine"; Li et al. 2025,
arXiv 2505.21930; DESIGN section 2.6):

    β = argmin Σ_x w_x Σ_k (r_k(x) − φ_k(x)·β)² + λ‖β‖²

At the optimum λβ = Σ_x w_x Σ_k (r_k − φ_k·β) φ_k, so the same sum over the unprojected gradients lifts β to an adapter:
w_x (r_k − φ_k·β) / λ are the shares of the examples' wrong labels in it. How far to go in that direction is the step size η,
which is fitted per dataset on validation data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax

from ray_ensemble.config import Sampling
from ray_ensemble.estimator import TaskFeatures
from ray_ensemble.estimator.budget import first_rows, regularization_grid, stack_group
from ray_ensemble.estimator.features import FloatArray, IntArray
from ray_ensemble.estimator.loss import Vector


@dataclass(frozen=True, eq=False)
class ResidualFit:
    """A ridge fit of a group's residual: β (d,) float64, its λ, the loss that the judge gave it, for each member the shares
    (N, R) of its training rows with which gradients add up to the step, and the operations spent.
    """

    beta: Vector
    regularization: float
    judged: float
    shares: tuple[NDArray[np.float64], ...]
    flops: int


def worst_group(
    losses: Mapping[str, FloatArray], examples: Mapping[str, int], groups: Sequence[Sequence[str]], sampling: Sampling
) -> int:
    """The group of highest mean training loss; of equal ones the first.

    Args:
        losses: of some training examples (n,) of each task, in nats.
        examples: how many training examples each task has in all.
        groups: names of the members of each group.
        sampling: what the mean is over: examples of the group, or its tasks (`training.sampling`).
    """
    return int(np.argmax([group_loss(losses, examples, group, sampling) for group in groups]))


def group_loss(
    losses: Mapping[str, FloatArray], examples: Mapping[str, int], group: Sequence[str], sampling: Sampling
) -> float:
    """Mean training loss of a group in nats, weighted as training draws its tasks; arguments as for `worst_group`."""
    weights = [float(examples[task]) if sampling == "examples" else 1.0 for task in group]
    return float(np.average([losses[task].mean() for task in group], weights=weights))


def residuals(scores: FloatArray, labels: IntArray, rows: int) -> NDArray[np.float64]:
    """Residuals r (N, R) of label scores (N, K): softmax(s)_k of each wrong label in its order, or their sum where R = 1."""
    share = softmax(scores.astype(np.float64), axis=1)
    wrong = np.arange(scores.shape[1])[None, :] != labels[:, None]
    found: NDArray[np.float64] = share[wrong].reshape(len(labels), -1)
    return found if rows > 1 else np.sum(found, axis=1, keepdims=True)


def fit_residual(
    features: Sequence[TaskFeatures],
    residual: Sequence[NDArray[np.float64]],
    sampling: Sampling,
    judge: Callable[[Vector], float],
    regularization: float | None = None,
) -> ResidualFit:
    """Ridge regression of a group's residual on its projected gradients.

    Args:
        features: of the group's members; M training rows in all, R an example.
        residual: (N, R) of each member's training examples.
        sampling: gives the examples' weights (`training.sampling`).
        judge: the loss that a β promises, such as that of validation data to first order.
        regularization: λ > 0; by default that of a logarithmic grid about the mean squared norm of the gradients with the least
            loss, the larger one of equals.

    Returns:
        The fit.
    """
    members = range(len(features))
    rows, _, weights, starts = stack_group(features, members, sampling)
    each = np.diff([*starts, len(rows)])
    root = np.sqrt(np.repeat(weights, each))
    target = root * np.concatenate([r.ravel() for r in residual])
    # One decomposition serves every λ: rows = U·diag(σ)·Vᵀ, (M, q)·(q, q)·(q, d)
    left, sigma, right = np.linalg.svd(root[:, None] * rows.astype(np.float64), full_matrices=False)
    along = left.T @ target
    fits = [
        (value, (sigma / (sigma**2 + value) * along) @ right)
        for value in ([regularization] if regularization is not None else regularization_grid(features))
    ]
    judged = [judge(beta) for _, beta in fits]
    best = int(np.argmin(judged))
    chosen, beta = fits[best]
    # (w r − w φβ)/λ: the root of the weight is in both terms once already
    shares = root * (target - root * (rows @ beta)) / chosen
    firsts = [*first_rows(features, members), len(rows)]
    split = tuple(
        shares[first:end].reshape(task.examples, -1)
        for task, first, end in zip(features, firsts, firsts[1:], strict=False)
    )
    count, dim = rows.shape
    # A thin singular value decomposition: 6Md² + 20d³ at M ≥ d (Golub and Van Loan, section 8.6), and the products
    few, many = sorted((count, dim))
    flops = 6 * many * few**2 + 20 * few**3 + 2 * (len(fits) * few * dim + count * (few + dim))
    return ResidualFit(beta, chosen, judged[best], split, flops)
