"""How alike tasks are by one vector each: what groupings that estimate nothing go by (numpy only)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ray_ensemble.estimator.features import FloatArray, TaskFeatures
from ray_ensemble.estimator.lifting import lifting_shares

Matrix = NDArray[np.float64]


def cosines(vectors: FloatArray) -> Matrix:
    """Cosines between the rows of (n, k) vectors: (n, n) float64, symmetric; 0 with a row that is zero.

    Vectors that are not two-dimensional or not finite are a `ValueError`.
    """
    rows = np.asarray(vectors, dtype=np.float64)
    if rows.ndim != 2 or not np.isfinite(rows).all():
        raise ValueError(f"one finite vector a task is needed, not an array {rows.shape} with NaN or infinities")
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    units = np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)
    found = units @ units.T
    return np.asarray((found + found.T) / 2.0)


def centred_cosines(vectors: FloatArray) -> Matrix:
    """Cosines between (n, k) vectors less their mean over tasks: (n, n) float64, symmetric; errors as for `cosines`.

    Representations of language models share one large direction, so that plain cosines are all near one (Mu and Viswanath
    2018, arXiv 1702.01417, of word vectors). Without it zero is about the similarity of an average pair, which is what
    clustering takes zero for.
    """
    rows = np.asarray(vectors, dtype=np.float64)
    return cosines(rows - rows.mean(axis=0, keepdims=True) if rows.ndim == 2 else rows)


def mean_loss_gradients(features: Sequence[TaskFeatures]) -> Matrix:
    """Each task's mean projected step against the gradient of its training loss (nats) at θ₀: (n, d) float64.

    Of an example it is −∇loss = Σ_k p_k φ_k over its margins against the wrong labels, p_k their shares at θ₀ (`loss`), or
    σ(−f₀)·φ of its one margin: what the model has right already counts little. That is the lifted fit at β = 0 (`lifting`).
    """
    found = []
    for task in features:
        mean = np.full(task.examples, 1.0 / task.examples)
        (shares,) = lifting_shares([task], [0], np.zeros(task.dim), mean)
        found.append(shares.ravel() @ task.train_features.astype(np.float64))  # (M,) @ (M, d)
    return np.stack(found)


def loss_gradient_similarity(features: Sequence[TaskFeatures]) -> Matrix:
    """Cosines between the tasks' mean loss gradients at θ₀: (n, n), symmetric. No mean is taken off: zero is no common step."""
    return cosines(mean_loss_gradients(features))
