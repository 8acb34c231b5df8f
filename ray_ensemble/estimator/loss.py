"""The loss of a group as a function of its fitted margins: value, gradient, curvature, and margins of examples left out.

An example with K labels has K − 1 rows, its margins against each wrong label, and its loss is log(1 + Σ_k exp(−f_k)): −log
softmax of the right label. With p_k the softmax share of wrong label k and φ̄ = Σ p_k φ_k, an example's gradient is −φ̄ and its
Hessian Σ p_k φ_kφ_kᵀ − φ̄φ̄ᵀ; for a single row that is p(1 − p)·φφᵀ.

Margins and gradients are float64. Rows that are stored in less are widened block by block on every pass, so that the store of
many tasks is never copied whole; few enough rows are widened once. Products that need not be exact are made in float32 where the
rows are stored so and λ keeps the rounding far below what they are for: the Hessian and its products, which only guide the
steps, and the solves for examples left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve_triangular
from scipy.special import expit

from ray_ensemble.estimator.features import FloatArray, IntArray

Vector = NDArray[np.float64]
Precision = type[np.float32] | type[np.float64]

BLOCK = 8192  # rows that are held in float64 at a time
ROUNDING = 1e-7  # of a positive semidefinite matrix made in float32, relative to its trace, in the spectral norm
TRUSTED = 1e-3  # rounding up to which float32 will do, relative to 2λ, the least eigenvalue of the objective's Hessian


def softplus(values: FloatArray) -> Vector:
    """log(1 + eᵛ) for any v, without overflow and without loss of small values."""
    return np.logaddexp(0.0, values)


class Point(NamedTuple):
    """What value and derivatives share at given margins, all (M,): `weight` w of a row's example, `share` p, and
    `curvature`, the row's own diagonal entry: w·p(1 − p) of an example's only row, w·p of one of several."""

    weight: Vector
    share: Vector
    curvature: Vector


class MarginLoss:
    """Σ_x w_x log(1 + Σ_k exp(−f_k)) for rows (M, k), the first row (N,) of each example and weights (N,).

    `flops` counts the operations of all products with the rows so far; the functions of margins alone are O(M) and left out.
    """

    def __init__(self, rows: FloatArray, starts: IntArray, weights: Vector) -> None:
        self.stored = rows
        self.rows = rows.astype(np.float64, copy=False) if len(rows) <= BLOCK else rows
        self.starts, self.weights = starts, weights
        self.flops = 0
        self._lengths = np.diff(starts, append=len(rows))
        self._several = self._lengths > 1
        self._single = not self._several.any()
        self._row_weights = weights if self._single else np.repeat(weights, self._lengths)
        # Blocks of at most BLOCK rows that do not cut an example.
        self._cuts = [0]
        if len(rows) > BLOCK:
            for first, last in zip(starts, starts + self._lengths, strict=True):
                if last - self._cuts[-1] > BLOCK and first > self._cuts[-1]:
                    self._cuts.append(int(first))
        self._cuts.append(len(rows))

    def times(self, vector: Vector, precision: Precision = np.float64) -> FloatArray:
        """Rows · vector, (M,), in `precision`."""
        self.flops += 2 * self.rows.size
        narrow = vector.astype(precision, copy=False)
        return np.concatenate([block @ narrow for _, block in self._blocks(precision)])

    def transposed(self, margins: Vector, precision: Precision = np.float64) -> Vector:
        """Rowsᵀ · margins, (k,) float64, the products made in `precision` block by block."""
        self.flops += 2 * self.rows.size
        narrow = margins.astype(precision, copy=False)
        total = np.zeros(self.rows.shape[1])
        for part, block in self._blocks(precision):
            total += narrow[part] @ block
        return total

    def value(self, fitted: Vector) -> float:
        """The loss at the fitted margins (M,)."""
        odds = -fitted if self._single else np.logaddexp.reduceat(-fitted, self.starts)
        return float(self.weights @ softplus(odds))

    def at(self, fitted: Vector) -> Point:
        """What the derivatives at the fitted margins (M,) need."""
        if self._single:
            share = expit(-fitted)
            return Point(self.weights, share, self.weights * share * expit(fitted))
        odds = np.logaddexp.reduceat(-fitted, self.starts)  # log of the wrong labels' odds
        share = np.exp(-fitted - np.repeat(softplus(odds), self._lengths))
        # 1 − p of an only row is written so that nothing cancels.
        own = np.repeat(np.where(self._several, 1.0, expit(-odds)), self._lengths)
        return Point(self._row_weights, share, self._row_weights * share * own)

    def gradient(self, point: Point) -> Vector:
        """Gradient of the loss in β, (k,)."""
        return -self.transposed(point.weight * point.share)

    def curved(self, point: Point, along: FloatArray) -> Vector:
        """Hessian of the loss in the margins, times `along`, (M,)."""
        pushed = point.curvature * along
        if not self._single:
            inner = np.add.reduceat(point.share * along, self.starts)
            inner[~self._several] = 0.0
            pushed -= point.weight * point.share * np.repeat(inner, self._lengths)
        return pushed

    def precision(self, point: Point, regularization: float) -> Precision:
        """What products that need not be exact may be made in at this point."""
        if self.stored.dtype != np.float32:
            return np.float64
        trace = float(point.curvature @ self._squares)  # of the Hessian at most
        return np.float32 if ROUNDING * trace <= TRUSTED * 2.0 * regularization else np.float64

    @cached_property
    def _squares(self) -> Vector:
        """Squared norms of the rows, (M,)."""
        return np.concatenate([np.einsum("ij,ij->i", block, block) for _, block in self._blocks(np.float32)])

    def hessian(self, point: Point, precision: Precision = np.float64) -> Vector:
        """Hessian of the loss in β, (k, k), its products made in `precision` block by block."""
        dim = self.rows.shape[1]
        self.flops += len(self.rows) * dim * (dim + 1)
        total = np.zeros((dim, dim))
        root = np.sqrt(point.curvature).astype(precision)
        for part, block in self._blocks(precision):
            scaled = block * root[part, None]
            total += scaled.T @ scaled  # numpy sees one matrix and calls the symmetric product: half the work
            for length, chosen in self._by_length(part):
                if length == 1:
                    continue
                rows = self.starts[chosen][:, None] + np.arange(length)  # (n, K − 1)
                share = (np.sqrt(self.weights[chosen])[:, None] * point.share[rows]).astype(precision)
                mean = np.einsum("nk,nkd->nd", share, block[rows - part.start])  # φ̄, times the root of the weight
                total -= mean.T @ mean
                self.flops += len(mean) * dim * (dim + 1)
        return total

    def left_out(self, fitted: Vector, factor: Vector, precision: Precision = np.float64) -> Vector:
        """Margins (M,) of each example under the fit without it, by one Newton step from the whole fit.

        `factor` (k, k) is the lower Cholesky factor of the objective's Hessian. With g and Λ the gradient and Hessian of an
        example's loss in its margins z, R its rows and A = w·R H⁻¹ Rᵀ, they are z + (I − AΛ)⁻¹ A g, the approximate
        leave-one-out of Rad and Maleki (2020, arXiv 1801.10243). It turns training examples into held-out ones at the price
        of one more step.
        """
        self.flops += self.rows.size * self.rows.shape[1]
        share = self.at(fitted).share
        found = fitted.copy()
        factor = factor.astype(precision)
        for part, block in self._blocks(precision):
            half = solve_triangular(factor, block.T, lower=True, check_finite=False).T  # (M', k)
            for length, chosen in self._by_length(part):
                rows = self.starts[chosen][:, None] + np.arange(length)  # (n, K − 1)
                p = share[rows]
                if length == 1:
                    v = half if self._single else half[rows[:, 0] - part.start]
                    a = self.weights[chosen] * np.einsum("ij,ij->i", v, v)
                    found[rows[:, 0]] -= a * p[:, 0] / (1.0 - a * p[:, 0] * expit(fitted[rows[:, 0]]))
                    continue
                v = half[rows - part.start]
                a = self.weights[chosen, None, None] * (v @ v.transpose(0, 2, 1))  # (n, K−1, k) @ (n, k, K−1)
                curvature = np.eye(length) * p[:, :, None] - p[:, :, None] * p[:, None, :]
                found[rows] += np.linalg.solve(np.eye(length) - a @ curvature, a @ -p[:, :, None])[:, :, 0]
        return found

    def _by_length(self, part: slice) -> Iterator[tuple[int, IntArray]]:
        """The examples of a block of rows, gathered by their number of rows."""
        first, last = np.searchsorted(self.starts, [part.start, part.stop])
        for length in np.unique(self._lengths[first:last]):
            yield int(length), np.flatnonzero(self._lengths[first:last] == length) + first

    def _blocks(self, precision: Precision = np.float64) -> Iterator[tuple[slice, Any]]:
        rows = self.rows if precision is np.float64 else self.stored
        for first, last in pairwise(self._cuts):
            yield slice(first, last), rows[first:last].astype(precision, copy=False)
