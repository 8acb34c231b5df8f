"""Combining adapters: weighted label scores and boosters; weights, scale and step size by validation. No Ray here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq, minimize
from scipy.special import log_softmax, softmax

from ray_ensemble.ensemble.shrinkage import Choice, choose, cross_fitted

FloatArray = NDArray[np.floating[Any]]

# Strengths of the weights' pull. 0 is none of them: without any pull the scale of a few examples that are all right has no end.
STRENGTHS = (math.inf, 64.0, 16.0, 4.0, 1.0)
LONGEST_STEP = 100.0  # η where validation sets no bound; boosters are short steps
_NEGLIGIBLE = 1e-2  # a smaller weight is set to zero, which saves its adapter's forward pass


def combine(scores: FloatArray, weights: FloatArray) -> NDArray[np.float64]:
    """Ensemble scores Σ_g w_g s_g of renormalised log-probabilities (DESIGN section 2.7).

    Args:
        scores: (m, V, K) raw label scores of m adapters; −inf for labels that a task lacks.
        weights: (m,), times the scale. Adapters of weight zero may hold anything.

    Returns:
        (V, K) scores; their softmax is the ensemble's prediction.
    """
    used = np.flatnonzero(weights)
    renormalised = log_softmax(scores[used].astype(np.float64), axis=2)
    combined: NDArray[np.float64] = np.tensordot(weights[used].astype(np.float64), renormalised, axes=1)
    return combined


def fit_scale(
    scores: Sequence[FloatArray],
    labels: Sequence[NDArray[np.integer[Any]]],
    priors: Sequence[FloatArray],
    expected: float = 1.0,
) -> float:
    """One scale β₀ for the scores of several datasets under their priors: an inverse temperature (Guo et al. 2017, section 4.2).

    minimise the mean over datasets of (1/V) Σ_x −log softmax(β₀ Σ_g p_g s_g(x))_y, plus (1/N)(β₀/b − log(β₀/b)), N being
    the examples of all datasets: what is expected, b, counts as much as one of them. Convex in β₀.

    Args:
        scores: of each dataset (m, V, K).
        labels: of each (V,).
        priors: of each p (m,) on the simplex.
        expected: b > 0, which is returned where there are no examples.
    """
    known = [(combine(s, p), y) for s, y, p in zip(scores, labels, priors, strict=True) if len(y)]
    if not known:
        return expected
    pull = 1.0 / sum(len(y) for _, y in known)

    def slope(scale: float) -> float:
        of_losses = [_slopes(np.zeros_like(s), s, y, scale).mean() for s, y in known]
        return float(np.mean(of_losses)) + pull * (1.0 / expected - 1.0 / scale)

    low = high = expected
    while slope(low) > 0:
        low /= 2
    while slope(high) < 0:
        high *= 2
    return low if low == high else float(brentq(slope, low, high))


def fit_weights(
    scores: FloatArray,
    labels: NDArray[np.integer[Any]],
    prior: FloatArray,
    strength: float,
    scale: float = 1.0,
) -> NDArray[np.float64]:
    """Weights of one dataset, times its scale: the convex minimum of its validation loss and its distance from a prior.

    minimise (1/V) Σ_x −log softmax(β₀ Σ_g u_g s_g(x))_y + (c/V) Σ_g (p_g log(p_g / u_g) − p_g + u_g) over u ≥ 0. The second
    term is the divergence of u from the prior p, which counts as much as c validation examples; u need not sum to 1, so that the
    dataset has a scale of its own. With all of p on one adapter its slope stays finite, so that small gains leave all weight
    there.

    Args:
        scores: (m, V, K) label scores of the m adapters on V validation examples.
        labels: (V,).
        prior: p (m,) on the simplex: the dataset's own group alone, or all adapters alike.
        strength: c > 0; at infinity β₀ p is returned.
        scale: β₀, by `fit_scale`.

    Returns:
        β₀ u (m,) float64, non-negative. Its sum is the dataset's scale; what is under 1% of that is zero.
    """
    adapters, count, _ = scores.shape
    if math.isinf(strength):
        return scale * np.array(prior, dtype=np.float64)
    values = scale * log_softmax(scores.astype(np.float64), axis=2)  # (m, V, K)
    rows, trusted = np.arange(count), prior > 0
    pull = strength / count * prior[trusted]

    def objective(u: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        combined = np.tensordot(u, values, axes=1)  # (V, K)
        loss = -log_softmax(combined, axis=1)[rows, labels].mean()
        residual = softmax(combined, axis=1)
        residual[rows, labels] -= 1.0
        gradient = np.tensordot(values, residual, axes=2) / count + strength / count  # (m, V, K) · (V, K)
        held = np.maximum(u[trusted], 1e-12)
        gradient[trusted] -= pull / held
        return float(loss - pull @ np.log(held) + strength / count * u.sum()), gradient

    found = minimize(
        objective, 0.5 / adapters + 0.5 * prior, jac=True, method="L-BFGS-B", bounds=[(0.0, None)] * adapters,
        options={"maxiter": 500, "ftol": 1e-12, "gtol": 1e-7},
    )  # fmt: skip
    return _without_crumbs(scale * found.x)


@dataclass(frozen=True)
class LearnedWeights:
    """Weights (m,) on the simplex and the scale of each dataset, and what held-out examples say of them.

    - `shared_scale`: of all datasets together, which their own are pulled towards;
    - `choice`: of the strengths;
    - `losses`: for each dataset the held-out losses in nats of `learned` (cross-fitted), `prior` and `uniform` weights, the two
      latter at the shared scale; None for fewer than two examples.
    """

    weights: list[NDArray[np.float64]]
    scales: list[float]
    shared_scale: float
    choice: Choice
    losses: list[dict[str, float] | None]

    @property
    def scaled(self) -> list[NDArray[np.float64]]:
        """Of each dataset weights (m,) times scale, as `combine` takes them."""
        return [scale * weights for scale, weights in zip(self.scales, self.weights, strict=True)]


def learn_weights(
    scores: Sequence[FloatArray],
    labels: Sequence[NDArray[np.integer[Any]]],
    priors: Sequence[FloatArray],
    expected_scale: float = 1.0,
) -> LearnedWeights:
    """Weights of every dataset: the mean of its `fit_weights` at all strengths, each counted as held-out examples speak for it.

    What speaks for a strength are the held-out examples of all datasets together (`choose`). The loss is convex in the weights,
    so that of their mean is at most the mean of their losses; a single strength, chosen on a few dozen examples of losses
    with a long tail, does worse. Datasets of fewer than two examples keep their prior.

    Args:
        scores: of each dataset (m, V, K).
        labels: of each (V,).
        priors: of each (m,).
        expected_scale: as for `fit_scale`.
    """
    shared = fit_scale(scores, labels, priors, expected_scale)
    held_out = [
        cross_fitted(len(y), partial(_weighted, s, y, prior, shared), STRENGTHS) if len(y) > 1 else None
        for s, y, prior in zip(scores, labels, priors, strict=True)
    ]
    judged = [_losses(found, y) for found, y in zip(held_out, labels, strict=True) if found is not None]
    choice = choose(judged, STRENGTHS)
    shares = np.array(choice.shares)
    weights: list[NDArray[np.float64]] = []
    scales: list[float] = []
    losses: list[dict[str, float] | None] = []
    for s, y, prior, found in zip(scores, labels, priors, held_out, strict=True):
        if found is None:
            weights.append(prior.astype(np.float64))
            scales.append(shared)
            losses.append(None)
            continue
        fits = [fit_weights(s, y, prior, strength, shared) for strength in choice.ladder]
        scaled = _without_crumbs(shares @ fits)
        weights.append(scaled / scaled.sum())
        scales.append(float(scaled.sum()))
        # Scores are linear in the weights, so those of the mean weights are the mean of the scores.
        compared = {"learned": np.tensordot(shares, found, axes=1), "prior": combine(s, shared * prior)}
        compared["uniform"] = combine(s, np.full(len(s), shared / len(s)))
        losses.append({kind: float(label_losses(each, y).mean()) for kind, each in compared.items()})
    return LearnedWeights(weights, scales, shared, choice, losses)


def _weighted(
    scores: FloatArray, labels: NDArray[np.integer[Any]], prior: FloatArray, scale: float,
    fitted: NDArray[np.int64], judged: NDArray[np.int64], strength: float,
) -> NDArray[np.float64]:  # fmt: skip
    return combine(scores[:, judged], fit_weights(scores[:, fitted], labels[fitted], prior, strength, scale))


def _without_crumbs(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    kept = np.where(weights < _NEGLIGIBLE * weights.sum(), 0.0, weights)
    return np.asarray(kept * (weights.sum() / kept.sum()))


def _losses(scores: FloatArray, labels: NDArray[np.integer[Any]]) -> NDArray[np.float64]:
    """(S, V) of scores (S, V, K)."""
    return np.stack([label_losses(each, labels) for each in scores])


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


def scale_of(ensemble: Mapping[str, Any], task: str) -> float:
    """What the weighted scores of a task are multiplied by, from the `scales` of `ensemble.json`; 1 where it has none."""
    return float(ensemble.get("scales", {}).get(task, 1.0))


def coefficients(ensemble: Mapping[str, Any], task: str) -> dict[str, float]:
    """What a task's score takes of each adapter's: name -> coefficient, zeros left out; `start` stands for θ₀.

    β Σ_g w_g s_g + η Σ_b (s_b − s_θ₀) as one sum over adapters; where θ₀ was trained it is one of the g too.

    Args:
        ensemble: the content of `ensemble.json`.
        task: one of its datasets.
    """
    scale = scale_of(ensemble, task)
    found = {name: scale * w for name, w in zip(ensemble["adapters"], ensemble["weights"][task], strict=True)}
    boosters, step = boosters_of(ensemble["boosting"], task)
    found |= dict.fromkeys(boosters, step)
    found["start"] = found.get("start", 0.0) - step * len(boosters)
    return {name: float(value) for name, value in found.items() if value}


def add_up(scores: Mapping[str, FloatArray], parts: Mapping[str, float]) -> NDArray[np.float64]:
    """Scores (V, K) of the sum Σ c_a s_a over adapters, `parts` from `coefficients`; `scores[a]` (V, K) raw label scores."""
    return combine(np.stack([scores[name] for name in parts]), np.array(list(parts.values())))


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

    return _lowest(scores, direction, labels, 0.0, LONGEST_STEP)


def fit_step_size(
    scores: FloatArray,
    direction: FloatArray,
    labels: NDArray[np.integer[Any]],
    strength: float,
    longest: float = LONGEST_STEP,
) -> float:
    """Step size η ≥ 0 of one dataset on its validation examples, pulled towards 0.

    minimise (1/V) Σ_x −log softmax(s(x) + η d(x))_y + (c/V) r η, convex in η, r the root mean square of the examples' slopes at
    η = 0. So c counts as that many validation examples that speak against the direction as loudly as one does on average,
    and η·d does not depend on the length of d.

    Args:
        scores: (V, K) scores of the ensemble.
        direction: (V, K) what is added at η = 1.
        labels: (V,).
        strength: c ≥ 0; at infinity η is 0.
        longest: the best η on training examples, of which there are more: a few validation examples that are all right under
            some direction would have η grow for ever.
    """
    if math.isinf(strength) or longest <= 0:
        return 0.0
    first = _slopes(scores, direction, labels, 0.0)
    pull = strength / len(first) * float(np.sqrt((first**2).mean()))
    return _lowest(scores, direction, labels, pull, longest)


@dataclass(frozen=True)
class LearnedSteps:
    """Step sizes of several datasets, the strength that they share, and mean held-out loss of each in nats."""

    steps: list[float]
    choice: Choice
    losses: list[float]


def learn_step_sizes(
    scores: Sequence[FloatArray],
    directions: Sequence[FloatArray],
    labels: Sequence[NDArray[np.integer[Any]]],
    longest: Sequence[float],
) -> LearnedSteps:
    """Step sizes by `fit_step_size`, pulled towards 0 as strongly as held-out examples of all these datasets ask for.

    They are all 0 where no strength lowers the held-out loss by more than its standard error, and so is that of a dataset whose
    own held-out examples are no better off.

    Args:
        scores: of each dataset (V, K).
        directions: of each (V, K).
        labels: of each (V,).
        longest: of each, as for `fit_step_size`.
    """
    held_out = [
        _losses(cross_fitted(len(y), partial(_stepped, s, d, y, most)), y) if len(y) > 1 else None
        for s, d, y, most in zip(scores, directions, labels, longest, strict=True)
    ]
    choice = choose([found for found in held_out if found is not None])
    place = choice.ladder.index(choice.strength)
    steps, losses = [], []
    for s, d, y, most, found in zip(scores, directions, labels, longest, held_out, strict=True):
        still = float(label_losses(s, y).mean())
        reached = still if found is None else float(found[place].mean())
        steps.append(fit_step_size(s, d, y, choice.strength, most) if reached < still else 0.0)
        losses.append(reached if steps[-1] > 0 else still)
    return LearnedSteps(steps, choice, losses)


def _stepped(
    scores: FloatArray, direction: FloatArray, labels: NDArray[np.integer[Any]], longest: float,
    fitted: NDArray[np.int64], judged: NDArray[np.int64], strength: float,
) -> NDArray[np.float64]:  # fmt: skip
    step = fit_step_size(scores[fitted], direction[fitted], labels[fitted], strength, longest)
    return np.asarray(scores[judged] + step * direction[judged])


def _slopes(
    scores: FloatArray, direction: FloatArray, labels: NDArray[np.integer[Any]], step: float
) -> NDArray[np.float64]:
    """Slopes (V,) of the examples' losses in η at η = `step`."""
    share = softmax(scores + step * direction, axis=1)
    found: NDArray[np.float64] = (share * direction).sum(axis=1) - direction[np.arange(len(labels)), labels]
    return found


def _lowest(
    scores: FloatArray, direction: FloatArray, labels: NDArray[np.integer[Any]], pull: float, longest: float
) -> float:
    """η in [0, `longest`] of least mean loss + pull · η."""

    def slope(step: float) -> float:
        return float(_slopes(scores, direction, labels, step).mean()) + pull

    if slope(0.0) >= 0:
        return 0.0
    return longest if slope(longest) <= 0 else float(brentq(slope, 0.0, longest))
