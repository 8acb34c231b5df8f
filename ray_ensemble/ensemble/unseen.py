"""Weights of a dataset that no adapter was trained on: by a few labelled examples, or by similarity. No Ray here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax

from ray_ensemble.ensemble.shrinkage import Choice, choose
from ray_ensemble.ensemble.weights import LearnedWeights, combine, label_losses, learn_weights
from ray_ensemble.estimator.similarity import cosines

FloatArray = NDArray[np.floating[Any]]
IntArray = NDArray[np.integer[Any]]

# Temperatures of the shares that the run's datasets get by their cosines, which are at most 1; at infinity all get the same.
TEMPERATURES = (math.inf, 1.0, 0.3, 0.1, 0.03)


def weights_of_examples(scores: FloatArray, labels: IntArray, expected_scale: float = 1.0) -> LearnedWeights:
    """Weights of one dataset without a group of its own: the fit of `learn_weights` with uniform weights as its prior.

    Args:
        scores: (m, V, K) label scores of the m groups' adapters on V labelled examples.
        labels: (V,).
        expected_scale: the scale that the run's datasets share.
    """
    return learn_weights([scores], [labels], [np.full(len(scores), 1.0 / len(scores))], expected_scale)


@dataclass(frozen=True)
class SimilarWeights:
    """Weights (m,) times the scale, the share (n,) that each of the run's datasets has in them, its cosine (n,), and the chosen
    temperature.

    `choice.strength` is the temperature.
    """

    weights: NDArray[np.float64]
    shares: NDArray[np.float64]
    cosines: NDArray[np.float64]
    choice: Choice


def weights_of_similarity(
    state: FloatArray,
    states: FloatArray,
    weights: FloatArray,
    trained_on: Sequence[Sequence[int]],
    scores: Sequence[FloatArray],
    labels: Sequence[IntArray],
) -> SimilarWeights:
    """Weights of a dataset without labels: the mean of the run's datasets' weights, by similarity.

    A share is softmax(cosine / τ) over the run's datasets, the cosine being of mean hidden states less their mean over the run.
    τ is chosen on the run's own datasets, each in turn taken for one that is not known: it gets weights from the others, without
    the adapters that were trained on it, and its held-out examples tell how good they are. The largest τ within one standard
    error of the best is taken, infinity being plain averaging.

    Args:
        state: (H,) mean hidden state of the new dataset's prompts.
        states: (n, H) those of the run's datasets.
        weights: (n, m) of the run's datasets over the groups' adapters, times their scales.
        trained_on: of each dataset the adapters that were trained on it.
        scores: of each dataset (m, V, K), held out.
        labels: of each (V,).
    """
    losses: list[list[float]] = []
    for left, (found, right) in enumerate(zip(scores, labels, strict=True)):
        others = [i for i in range(len(states)) if i != left]
        if not others:
            break
        cosine = _cosines(states[left], states[others])
        guesses = [_shares(cosine, each) @ weights[others] for each in TEMPERATURES]  # (n − 1,) @ (n − 1, m)
        losses.append(
            [float(label_losses(combine(found, _without(w, trained_on[left])), right).mean()) for w in guesses]
        )
    # A dataset is one observation here: which others it is like is drawn once for all of its examples.
    choice = choose([np.array(losses).T] if losses else [], TEMPERATURES)
    cosine = _cosines(state, states)
    shares = _shares(cosine, choice.strength)
    return SimilarWeights(shares @ weights, shares, cosine, choice)


def _cosines(state: FloatArray, states: FloatArray) -> NDArray[np.float64]:
    """Cosines (n,) of `state` (H,) with `states` (n, H), all less the mean of `states`; 0 where one is that mean."""
    return cosines(np.vstack([state, states]) - states.mean(axis=0))[0, 1:]


def _shares(cosine: NDArray[np.float64], temperature: float) -> NDArray[np.float64]:
    found: NDArray[np.float64] = softmax(cosine / temperature)
    return found


def _without(weights: NDArray[np.float64], adapters: Sequence[int]) -> NDArray[np.float64]:
    """Weights (m,) without some adapters' shares, of the same sum; the others alike where these had all. If there are no others,
    as they are.
    """
    others = np.setdiff1d(np.arange(len(weights)), adapters)
    rest = np.zeros(len(weights))
    rest[others] = weights[others]
    if rest.sum() <= 1e-9 and len(others):
        rest[others] = 1.0
    return np.asarray(rest * (weights.sum() / rest.sum())) if len(others) else weights
