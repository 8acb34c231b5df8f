"""Combining adapters: weighted label scores, and the weights of one dataset fitted on its validation scores. No Ray here."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax

FloatArray = NDArray[np.floating[Any]]

PRIOR_EXAMPLES = 2.0  # validation examples that the trust in a dataset's own group is worth
_NEGLIGIBLE = 1e-2  # a smaller weight is set to zero, which saves its adapter's forward pass


def combine(scores: FloatArray, weights: FloatArray) -> NDArray[np.float64]:
    """Ensemble scores Σ_g w_g s_g of renormalised log-probabilities (DESIGN section 2.7).

    Args:
        scores: (m, V, K) raw label scores of m adapters; −inf for labels that a task lacks.
        weights: (m,) on the simplex. Adapters of weight zero may hold anything.

    Returns:
        (V, K) scores; their softmax is the ensemble's prediction.
    """
    used = np.flatnonzero(weights)
    renormalised = log_softmax(scores[used].astype(np.float64), axis=2)
    combined: NDArray[np.float64] = np.tensordot(weights[used].astype(np.float64), renormalised, axes=1)
    return combined


def fit_weights(scores: FloatArray, labels: NDArray[np.integer[Any]], own: int) -> NDArray[np.float64]:
    """Weights of one dataset on the simplex: the convex minimum of its validation loss with a prior on its own group.

    minimise (1/V) Σ_x −log softmax(Σ_g w_g s_g(x))_y − (c/V) log w_own. The second term counts as c validation examples that
    favour the dataset's own group, so that a small validation set does not move weight on noise.

    Args:
        scores: (m, V, K) label scores of the m adapters on V validation examples.
        labels: (V,).
        own: the dataset's own group.

    Returns:
        (m,) float64, non-negative, of sum 1; weights under 1% are zero.
    """
    adapters, count, _ = scores.shape
    if adapters == 1:
        return np.ones(1)
    values = log_softmax(scores.astype(np.float64), axis=2)  # (m, V, K)
    rows = np.arange(count)

    def objective(w: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        combined = np.tensordot(w, values, axes=1)  # (V, K)
        loss = -log_softmax(combined, axis=1)[rows, labels].mean()
        residual = softmax(combined, axis=1)
        residual[rows, labels] -= 1.0
        gradient = np.einsum("vk,mvk->m", residual, values) / count  # (V, K) · (m, V, K)
        trust = PRIOR_EXAMPLES / count
        gradient[own] -= trust / max(w[own], 1e-12)
        return float(loss - trust * np.log(max(w[own], 1e-12))), gradient

    start = np.full(adapters, 0.5 / adapters)
    start[own] += 0.5
    found = minimize(
        objective, start, jac=True, method="SLSQP", bounds=[(0.0, 1.0)] * adapters,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1.0, "jac": np.ones_like},
        options={"maxiter": 500, "ftol": 1e-12},
    )  # fmt: skip
    weights: NDArray[np.float64] = np.clip(found.x, 0.0, 1.0)
    weights[weights < _NEGLIGIBLE] = 0.0
    weights /= weights.sum()
    return weights
