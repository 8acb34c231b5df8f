"""What the estimator knows about a task: projected gradients, margins and class scores at θ₀.

Notation of Li et al. 2025 (ACL 2025, arXiv 2505.21930) and of GradEx (arXiv 2409.19458), DESIGN section 2: φ(x) =
Pᵀ∇f(x) in ℝᵈ, f the margin of the right label, s_k the score of label k.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_ensemble.errors import RunError

FloatArray = NDArray[np.floating[Any]]
IntArray = NDArray[np.signedinteger[Any]]


@dataclass(frozen=True, eq=False)
class TaskFeatures:
    """One task as its gradients: N training examples, V validation examples, K labels, d projected dimensions.

    - `train_features` (M, d) float32 and `train_margins` (M,): φ and f₀ (nats, at θ₀) of the margins s_y − s_k against
      each wrong label, K − 1 rows an example; or of the one margin against all of them;
    - `train_starts` (N,): the first row of each example; by default each row is an example;
    - `trained`: how many examples a training on this task has, where these N are a part of them; by default N;
    - `validation_scores` (V, K): raw label scores s_k(x) at θ₀, in nats;
    - `validation_features` (V, K, d): projected gradients of s_k − s_0, so `[:, 0]` is zero;
    - `validation_labels` (V,) integers in [0, K).

    Shapes that do not fit, or labels out of range, are a `ValueError`; values that are not finite are a `RunError` that
    names the task, since they come from a gradient pass that went wrong.
    """

    name: str
    train_features: FloatArray
    train_margins: FloatArray
    validation_scores: FloatArray
    validation_features: FloatArray
    validation_labels: IntArray
    train_starts: IntArray | None = None
    trained: int | None = None

    def __post_init__(self) -> None:
        expected = (*self.validation_scores.shape, self.dim)
        rows = self.train_features.shape[0]
        if self.train_margins.shape != (rows,) or rows == 0:
            raise ValueError(f"task '{self.name}': {self.train_margins.shape} margins for {rows} rows of features")
        if self.validation_features.shape != expected or len(expected) != 3 or expected[1] < 2:
            raise ValueError(
                f"task '{self.name}': validation features {self.validation_features.shape}, expected {expected}"
            )
        if self.validation_labels.shape != expected[:1]:
            raise ValueError(f"task '{self.name}': {self.validation_labels.shape} labels, expected {expected[:1]}")
        if np.any((self.validation_labels < 0) | (self.validation_labels >= expected[1])):
            raise ValueError(f"task '{self.name}': a validation label is outside 0..{expected[1] - 1}")
        for field in ("train_features", "train_margins", "validation_scores", "validation_features"):
            if not np.isfinite(getattr(self, field)).all():
                raise RunError(f"task '{self.name}': {field} of the gradient store holds values that are not finite")

    @property
    def examples(self) -> int:
        """Number N of training examples."""
        return int(self.train_features.shape[0] if self.train_starts is None else len(self.train_starts))

    @property
    def training_examples(self) -> int:
        """How many examples a training on this task draws from: N, or those that `trained` tells."""
        return self.examples if self.trained is None else self.trained

    @property
    def starts(self) -> IntArray:
        """The first row (N,) of each training example."""
        return np.arange(self.examples) if self.train_starts is None else self.train_starts

    @property
    def dim(self) -> int:
        """Projected dimension d."""
        return int(self.train_features.shape[1])


def validation_halves(count: int) -> tuple[IntArray, IntArray]:
    """Split `count` validation examples in two: even indices for search and λ, odd ones for weights and report.

    Returns int64 index arrays of lengths ⌈count/2⌉ and ⌊count/2⌋. Fewer than two examples are a `ValueError`, since a
    half would be empty. Tasks are loaded in an order that does not tell labels (`tasks.split.without_order`), so parity is
    as good as a draw and needs no seed.
    """
    if count < 2:
        raise ValueError(f"a validation set of {count} cannot be split in two halves")
    return np.arange(0, count, 2, dtype=np.int64), np.arange(1, count, 2, dtype=np.int64)


def pairwise_margins(
    scores: FloatArray, features: FloatArray, labels: IntArray
) -> tuple[FloatArray, FloatArray, IntArray]:
    """Training rows of examples with K labels: margins against each wrong label.

    Args:
        scores: (N, K) label scores s_k at θ₀.
        features: (N, K, d) projected gradients of s_k − s_0.
        labels: (N,) right labels y.

    Returns:
        features (N·(K−1), d) float32 of s_y − s_k, margins (N·(K−1),), and the first row (N,) of each example.
    """
    count, classes = scores.shape
    rows = np.arange(count)
    wrong = np.arange(classes)[None, :] != labels[:, None]  # (N, K)
    margins = (scores[rows, labels][:, None] - scores)[wrong]
    slopes = (features[rows, labels][:, None, :] - features)[wrong]  # (N·(K−1), d)
    return slopes.astype(np.float32), margins, rows * (classes - 1)
