"""Tasks that no training in their group is estimated to teach: labels that are noise, or more than the base can learn."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax

from ray_ensemble.estimator.estimator import Estimator
from ray_ensemble.estimator.features import IntArray
from ray_ensemble.estimator.predict import linear_scores
from ray_ensemble.grouping.partitions import Partition

ERRORS = 2.0  # standard errors up to which a mean gain may be noise


@dataclass(frozen=True)
class Unlearnt:
    """A task, and what its group's training is estimated to gain over guessing: mean and standard error over its validation
    examples, in nats."""

    task: str
    gain: float
    standard_error: float


def unlearnt(estimator: Estimator, partition: Partition) -> tuple[Unlearnt, ...]:
    """The tasks whose labels their group's fit does not predict better than their frequencies do; the least gain first.

    A task is named where the mean over its validation examples of (loss of guessing − estimated loss under its group) is at
    most two standard errors. Guessing gives every label its share of the other validation examples. A task whose labels were
    shuffled is always such a one; one that is too hard for the base, or too small to tell, may be. Costs a fit a group.
    """
    found = []
    for group in partition:
        fit, _ = estimator.fit(group)
        for task in group:
            features = estimator.features[task]
            labels = features.validation_labels
            rows = np.arange(len(labels))
            scores = linear_scores(fit.beta, features, rows)
            gains = guessing_losses(labels, scores.shape[1]) + log_softmax(scores, axis=1)[rows, labels]
            gain, error = float(gains.mean()), float(gains.std(ddof=1) / np.sqrt(gains.size))
            if gain <= ERRORS * error:
                found.append(Unlearnt(features.name, gain, error))
    return tuple(sorted(found, key=lambda each: each.gain))


def guessing_losses(labels: IntArray, classes: int) -> NDArray[np.float64]:
    """Loss (V,) in nats of guessing each label by its share among the other examples, one added to every count (Laplace)."""
    counts = np.bincount(labels, minlength=classes)
    losses: NDArray[np.float64] = -np.log(counts[labels] / (len(labels) - 1 + classes))
    return losses
