"""Generated tasks whose true grouping is known: what tests and benchmarks measure the estimator and the search on."""

from __future__ import annotations

import numpy as np
from scipy.special import logsumexp, softmax

from ray_ensemble.estimator.features import TaskFeatures


def planted_tasks(
    tasks: int,
    groups: int,
    *,
    train: int = 160,
    validation: int = 160,
    dim: int = 100,
    labels: int = 2,
    norm: float = 10.0,
    signal: float = 2.0,
    own: float = 0.1,
    seed: int = 0,
) -> tuple[list[TaskFeatures], list[int]]:
    """Tasks of one group share the change of the parameters that fits them best; two groups' changes are unrelated.

    Returns the tasks and, for each, the index of its group (tasks are dealt out in turn). Gradients of the score
    differences are Gaussian with a decaying spectrum and mean norm `norm`, as real ones have; the true change moves a
    difference by `signal` nats (root mean square), a part `own` of it the task's alone; labels are drawn from the
    softmax of the changed scores. Training margins and their gradients follow from the scores as DESIGN section 2.1
    defines them.
    """
    generator = np.random.default_rng(seed)
    spectrum = np.arange(1, dim + 1) ** -0.5
    spectrum *= norm / np.linalg.norm(spectrum)

    def direction() -> np.ndarray:
        drawn = generator.normal(size=dim)
        return np.asarray(signal * drawn / np.linalg.norm(drawn * spectrum))

    shared = [direction() for _ in range(groups)]
    membership = [task % groups for task in range(tasks)]
    made = []
    for task, group in enumerate(membership):
        change = np.sqrt(1 - own**2) * shared[group] + own * direction()

        def draw(count: int, change: np.ndarray = change) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            gradients = generator.normal(size=(count, labels, dim)) * spectrum
            gradients[:, 0] = 0.0
            scores = generator.normal(scale=0.5, size=(count, labels))
            chances = softmax(scores + gradients @ change, axis=1)
            drawn = (generator.random((count, 1)) > chances.cumsum(axis=1)[:, :-1]).sum(axis=1)
            return scores, gradients, drawn

        scores, gradients, right = draw(train)
        rows = np.arange(train)
        others = scores.copy()
        others[rows, right] = -np.inf
        margins = scores[rows, right] - logsumexp(others, axis=1)
        slopes = gradients[rows, right] - np.einsum("nk,nkd->nd", softmax(others, axis=1), gradients)
        held_scores, held_gradients, held_labels = draw(validation)
        made.append(
            TaskFeatures(
                name=f"task-{task}",
                train_features=slopes.astype(np.float32),
                train_margins=margins,
                validation_scores=held_scores,
                validation_features=held_gradients.astype(np.float32),
                validation_labels=held_labels.astype(np.int64),
            )
        )
    return made, membership
