"""Combining adapters: weighted label scores and boosters; weights and step size of a dataset by its validation. No Ray here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq, minimize
from scipy.special import log_softmax, softmax

FloatArray = NDArray[np.floating[Any]]

PRIOR_EXAMPLES = 2.0  # validation examples that the trust in a dataset's own group is worth
LONGEST_STEP = 100.0  # η where validation sets no bound; boosters are short steps
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


def booster_scores(boosters: FloatArray, start: FloatArray) -> NDArray[np.float64]:
    """What boosters add to the ensemble at step size 1: Σ_b (s_b − s_θ₀) of renormalised log-probabilities (DESIGN section 2.7).

    Args:
        boosters: (b, V, K) raw label scores of the boosters.
        start: (V, K) those of θ₀, where the boosters start: the base itself at a fresh start.

    Returns:
        (V, K).
    """
    added: NDArray[np.float64] = log_softmax(boosters.astype(np.float64), axis=2).sum(axis=0)
    added -= len(boosters) * log_softmax(start.astype(np.float64), axis=1)
    return added


def boosters_of(boosting: Mapping[str, Any], task: str) -> tuple[list[str], float]:
    """The boosters that a task uses and its step size η, from the `boosting` of `ensemble.json`; none and 0 if it skips them."""
    return list(boosting.get("boosters", {}).get(task, [])), float(boosting.get("step_sizes", {}).get(task, 0.0))


def label_losses(scores: FloatArray, labels: NDArray[np.integer[Any]]) -> NDArray[np.float64]:
    """Losses −log softmax(s)_y (V,) of scores (V, K), in nats."""
    losses: NDArray[np.float64] = -log_softmax(scores, axis=1)[np.arange(len(labels)), labels]
    return losses


def best_step(scores: FloatArray, direction: FloatArray, labels: NDArray[np.integer[Any]]) -> float:
    """Step size η in [0, `LONGEST_STEP`] of least loss −log softmax(s(x) + η d(x))_y, which is convex in η.

    Args:
        scores: (V, K) scores of the ensemble.
        direction: (V, K) what is added at η = 1.
        labels: (V,).
    """

    def slope(step: float) -> float:
        return float(_slopes(scores, direction, labels, step).mean())

    if slope(0.0) >= 0:
        return 0.0
    return LONGEST_STEP if slope(LONGEST_STEP) <= 0 else float(brentq(slope, 0.0, LONGEST_STEP))


def fit_step_size(
    scores: FloatArray, direction: FloatArray, labels: NDArray[np.integer[Any]], longest: float = LONGEST_STEP
) -> float:
    """Step size η ≥ 0 of one dataset: the best on its validation examples, shrunk by what chance could have made of it.

    η = (1 − 1/z²)₊ · min(argmin of the validation loss, `longest`), z the loss's slope at η = 0 in standard errors. So η is zero
    where the loss falls by no more than chance would let it, and hardly less than the minimum where it falls plainly (the
    non-negative garrote of Breiman 1995, Technometrics 37). η·d does not depend on the length of d.

    Args:
        scores: (V, K) scores of the ensemble.
        direction: (V, K) what is added at η = 1.
        labels: (V,).
        longest: the best η on training examples, of which there are more: a few validation examples that are all right under
            some direction would have η grow for ever.

    Returns:
        η; 0 where there are fewer than two examples.
    """
    first = _slopes(scores, direction, labels, 0.0)
    if len(first) < 2 or first.mean() >= 0:
        return 0.0
    chance = float(first.var(ddof=1) / len(first) / first.mean() ** 2)  # 1/z²
    return max(0.0, 1.0 - chance) * min(longest, best_step(scores, direction, labels))


def _slopes(
    scores: FloatArray, direction: FloatArray, labels: NDArray[np.integer[Any]], step: float
) -> NDArray[np.float64]:
    """Slopes (V,) of the examples' losses in η at η = `step`."""
    share = softmax(scores + step * direction, axis=1)
    found: NDArray[np.float64] = (share * direction).sum(axis=1) - direction[np.arange(len(labels)), labels]
    return found
