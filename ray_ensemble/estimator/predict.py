"""From β to the loss and accuracy of a task: no forward pass of the model, only its linearised label scores."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ray_ensemble.estimator.features import IntArray, TaskFeatures
from ray_ensemble.estimator.fit import Fit
from ray_ensemble.estimator.loss import Vector, softplus


@dataclass(frozen=True)
class Estimate:
    """Estimated mean loss (nats) and accuracy (0 to 1) over some validation examples of a task."""

    loss: float
    accuracy: float


def linear_scores(beta: Vector, task: TaskFeatures, indices: IntArray) -> Vector:
    """Linearised scores ŝ_k = s_k + β·∇(s_k − s_0), (len(indices), K) float64, in nats up to a constant per example."""
    return task.validation_scores[indices] + task.validation_features[indices] @ beta


def estimate_task(beta: Vector, task: TaskFeatures, indices: IntArray) -> Estimate:
    """Estimate the task after fine-tuning that moved θ by the lifted β, on the validation examples `indices`.

    Loss = mean of −log softmax(ŝ)_y, accuracy = share of examples whose argmax ŝ is y (ties go to the first label, as
    in the model's own evaluation). An empty `indices` is a `ValueError`. Source: Li et al. 2025, DESIGN section 2.3.
    """
    if indices.size == 0:
        raise ValueError(f"task '{task.name}': no validation examples to estimate on")
    scores = linear_scores(beta, task, indices)
    labels = task.validation_labels[indices]
    losses = np.logaddexp.reduce(scores, axis=1) - scores[np.arange(labels.size), labels]
    return Estimate(float(losses.mean()), float(np.mean(scores.argmax(axis=1) == labels)))


def estimate_held_out(fit: Fit, first: int, task: TaskFeatures, indices: IntArray) -> Estimate:
    """Estimate the task on validation examples `indices` and on its own training examples, each left out of the fit.

    Training examples are several times as many as half of a validation set, and what a search picks among hundreds of groups is
    only as good as the number of examples that it looks at. `first` is the task's first row in the fit. One margin against
    several wrong labels (`gradients.targets: margin`) does not tell which score is largest; accuracy is then the validation's.
    """
    held_out = estimate_task(fit.beta, task, indices)
    margins = fit.left_out[first : first + len(task.train_features)]
    losses = softplus(np.logaddexp.reduceat(-margins, task.starts))
    count, extra = indices.size, losses.size
    loss = float((count * held_out.loss + losses.sum()) / (count + extra))
    if len(margins) < extra * (task.validation_scores.shape[1] - 1):
        return Estimate(loss, held_out.accuracy)
    hits = np.minimum.reduceat(margins, task.starts) > 0
    return Estimate(loss, float((count * held_out.accuracy + hits.sum()) / (count + extra)))
