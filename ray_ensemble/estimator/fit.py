"""The regularised logistic fit with the base margins as fixed offsets (Li et al. 2025; DESIGN section 2.3).

    β = argmin Σ_x w_x log(1 + Σ_k exp(−f_k(x) − φ_k(x)·β)) + λ‖β‖²,  Σw = 1

where k runs over the wrong labels of x, f_k = s_y − s_k and φ_k its projected gradient: −log softmax of the linearised scores.
With two labels, or with one margin f = s_y − logsumexp s_k an example, it is the papers' logistic regression. It is
solved by damped Newton steps in float64. Gradients are large (norms of a hundred), so the undamped step overshoots into
regions where the loss is linear and diverges; a backtracking line search on the objective cannot.

With fewer rows than dimensions the minimiser lies in the span of the features (β = Φᵀα, the representer theorem).
With Φᵀ = QR, Q of orthonormal columns, β = Qγ keeps the norm, so the same problem with features Rᵀ (M×M) gives γ; no
Gram matrix squares the condition number. One Newton step then costs M·k² + k³/3 multiplications, k = min(M, d), M rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve, cholesky, qr, solve_triangular
from scipy.special import expit

from ray_ensemble.estimator.features import FloatArray, IntArray

Vector = NDArray[np.float64]

TOLERANCE = 1e-9  # on half the squared Newton decrement, relative to the objective
ITERATIONS = 200
ARMIJO = 1e-4
HALVINGS = 60
BLOCK = 8192  # rows that are held in float64 at a time, so that a float32 store of many tasks is never copied whole


@dataclass(frozen=True, eq=False)
class Fit:
    """A fitted β: (d,) float64, with the objective in nats, Newton steps taken and floating-point operations spent.

    `left_out` (M,) are the margins that every example would have if it had been left out of the fit.
    """

    beta: Vector
    objective: float
    iterations: int
    converged: bool
    flops: int
    left_out: Vector


def softplus(values: FloatArray) -> Vector:
    """log(1 + eᵛ) for any v, without overflow and without loss of small values."""
    return np.logaddexp(0.0, values)


def fit_margins(
    features: FloatArray,
    margins: FloatArray,
    weights: FloatArray,
    regularization: float,
    start: Vector | None = None,
    *,
    starts: IntArray | None = None,
) -> Fit:
    """Minimise the objective above from `start` (zero by default).

    `features` (M, d) and `margins` (M,) of any float type, a row for each wrong label of each example; `starts` (N,) is the
    first row of every example (each row an example by default); `weights` (N,) non-negative with sum 1, `regularization` λ
    > 0. Anything else is a `ValueError`. The result is within about 1e-9 of the optimum, relative to the objective.
    """
    return next(fit_path(features, margins, weights, [regularization], start, starts=starts))


def fit_path(
    features: FloatArray,
    margins: FloatArray,
    weights: FloatArray,
    regularizations: Iterable[float],
    start: Vector | None = None,
    *,
    starts: IntArray | None = None,
    tolerance: float = TOLERANCE,
) -> Iterator[Fit]:
    """Yield the fit of each λ in turn, each started from the one before; the reduction to M×M is done once.

    Lazy, so that a caller can stop along the path. Going from large to small λ keeps every start close to its
    optimum. `tolerance` bounds the distance to the optimal objective, relative to it. Other arguments and errors as
    for `fit_margins`.
    """
    starts = np.arange(features.shape[0]) if starts is None else starts
    _check(features, margins, weights, starts)
    rows, basis, flops = _reduce(features)
    problem = _Problem(rows, starts, weights.astype(np.float64))
    offsets = margins.astype(np.float64)
    gamma = np.zeros(rows.shape[1]) if start is None else start.astype(np.float64)
    if start is not None and basis is not None:
        gamma = basis.T @ gamma
    for regularization in regularizations:
        if not (np.isfinite(regularization) and regularization > 0):
            raise ValueError(f"regularization must be positive and finite, not {regularization}")
        gamma, objective, iterations, converged = _newton(
            problem, offsets, gamma, regularization=regularization, tolerance=tolerance
        )
        left_out = problem.left_out(offsets + problem.times(gamma), regularization)
        flops += (iterations + 1) * _step_flops(*rows.shape)  # leaving out costs about as much as a step
        beta = gamma if basis is None else basis @ gamma
        yield Fit(beta, objective, iterations, converged, flops, left_out)
        flops = 0


def _check(features: FloatArray, margins: FloatArray, weights: FloatArray, starts: IntArray) -> None:
    if (
        features.ndim != 2
        or features.shape[0] == 0
        or margins.shape != features.shape[:1]
        or weights.shape != starts.shape
    ):
        raise ValueError(
            f"features {features.shape}, margins {margins.shape}, weights {weights.shape} and starts {starts.shape} do not fit"
        )
    if starts[0] != 0 or np.any(np.diff(starts) <= 0) or starts[-1] >= features.shape[0]:
        raise ValueError("starts must begin at row 0, rise, and fit the rows")
    if np.any(weights < 0) or not np.isclose(float(weights.sum()), 1.0, rtol=1e-6):
        raise ValueError("weights must be non-negative with sum 1")


def _reduce(features: FloatArray) -> tuple[FloatArray, Vector | None, int]:
    """Rows of the problem to solve, (M, min(M, d)), the basis (d, M) where it was reduced, and the operations spent."""
    count, dim = features.shape
    if count < dim:
        basis, upper = qr(features.T.astype(np.float64), mode="economic", check_finite=False)
        # Householder QR and forming Q: 4dM² − 4M³/3 (Golub and Van Loan, section 5.2)
        return np.ascontiguousarray(upper.T), basis, 4 * dim * count**2 - 4 * count**3 // 3
    return (features.astype(np.float64) if count <= BLOCK else features), None, 0


def _step_flops(count: int, dim: int) -> int:
    """Operations of one Newton step: symmetric product, Cholesky factor, three products with the rows."""
    return count * dim * (dim + 1) + dim**3 // 3 + 6 * count * dim


class _Problem:
    """The loss as a function of the fitted margins of all rows, (M,): its value, and its gradient and Hessian in β."""

    def __init__(self, rows: FloatArray, starts: IntArray, weights: Vector) -> None:
        self.rows, self.starts, self.weights = rows, starts, weights
        self._lengths = np.diff(starts, append=rows.shape[0])
        # Blocks of at most BLOCK rows that do not cut an example.
        self._cuts = [0]
        for first, last in zip(starts, starts + self._lengths, strict=True):
            if last - self._cuts[-1] > BLOCK and first > self._cuts[-1]:
                self._cuts.append(int(first))
        self._cuts.append(rows.shape[0])

    def times(self, vector: Vector) -> Vector:
        """Rows · vector, (M,) float64."""
        return np.concatenate([block @ vector for _, block in self._blocks()])

    def loss(self, fitted: Vector) -> float:
        """Σ_x w_x log(1 + Σ_k exp(−f_k))."""
        return float(self.weights @ softplus(np.logaddexp.reduceat(-fitted, self.starts)))

    def derivatives(self, fitted: Vector) -> tuple[Vector, Vector]:
        """Gradient (k,) and Hessian (k, k) of the loss.

        With p_k the share of wrong label k and φ̄ = Σ p_k φ_k, an example's gradient is −φ̄ and its Hessian Σ p_k φ_kφ_kᵀ − φ̄φ̄ᵀ,
        which for a single row is written p(1 − p)·φφᵀ.
        """
        total = np.logaddexp.reduceat(-fitted, self.starts)  # log of the wrong labels' odds
        share = np.exp(-fitted - np.repeat(softplus(total), self._lengths))
        weight = np.repeat(self.weights, self._lengths)
        lone = self._lengths == 1
        curvature = weight * share * np.repeat(np.where(lone, expit(-total), 1.0), self._lengths)
        dim = self.rows.shape[1]
        gradient, hessian = np.zeros(dim), np.zeros((dim, dim))
        for part, block in self._blocks():
            gradient -= (weight * share)[part] @ block
            scaled = block * np.sqrt(curvature)[part, None]
            hessian += scaled.T @ scaled  # numpy sees one matrix and calls the symmetric product: half the work
            examples = slice(*np.searchsorted(self.starts, [part.start, part.stop]))
            many = ~lone[examples]
            if many.any():
                mean = np.add.reduceat(block * share[part, None], self.starts[examples] - part.start, axis=0)[many]
                mean *= np.sqrt(self.weights[examples][many])[:, None]
                hessian -= mean.T @ mean
        return gradient, hessian

    def left_out(self, fitted: Vector, regularization: float) -> Vector:
        """Margins (M,) of each example under the fit without it, by one Newton step from the whole fit.

        With g and Λ the gradient and Hessian of an example's loss in its margins z, R its rows, H the Hessian of the objective
        and A = w·R H⁻¹ Rᵀ, they are z + (I − AΛ)⁻¹ A g, the approximate leave-one-out of Rad and Maleki (2020, arXiv
        1801.10243). It turns training examples into held-out ones at the price of one more step.
        """
        _, hessian = self.derivatives(fitted)
        hessian[np.diag_indices_from(hessian)] += 2.0 * regularization + 1e-14 * np.trace(hessian)
        factor = cholesky(hessian, lower=True, overwrite_a=True, check_finite=False)
        total = np.logaddexp.reduceat(-fitted, self.starts)
        share = np.exp(-fitted - np.repeat(softplus(total), self._lengths))
        found = fitted.copy()
        for part, block in self._blocks():
            half = solve_triangular(factor, block.T, lower=True, check_finite=False).T  # (M', k)
            examples = slice(*np.searchsorted(self.starts, [part.start, part.stop]))
            for length in np.unique(self._lengths[examples]):
                chosen = np.flatnonzero(self._lengths[examples] == length) + examples.start
                rows = self.starts[chosen][:, None] + np.arange(length)  # (n, K − 1)
                v = half[rows - part.start]
                a = self.weights[chosen, None, None] * (v @ v.transpose(0, 2, 1))  # (n, K−1, k) @ (n, k, K−1)
                p = share[rows]
                curvature = np.eye(length) * p[:, :, None] - p[:, :, None] * p[:, None, :]
                pushed = np.linalg.solve(np.eye(length) - a @ curvature, a @ -p[:, :, None])[:, :, 0]
                found[rows] += pushed
        return found

    def _blocks(self) -> Iterator[tuple[slice, Vector]]:
        for first, last in pairwise(self._cuts):
            yield slice(first, last), self.rows[first:last].astype(np.float64, copy=False)


def _newton(
    problem: _Problem, offsets: Vector, start: Vector, *, regularization: float, tolerance: float
) -> tuple[Vector, float, int, bool]:
    """Damped Newton from `start`: returns the minimiser, its objective, the steps taken and whether it converged."""
    beta, fitted = start.copy(), offsets + problem.times(start)
    value = float(problem.loss(fitted) + regularization * beta @ beta)
    for iteration in range(1, ITERATIONS + 1):
        gradient, hessian = problem.derivatives(fitted)
        gradient += 2.0 * regularization * beta
        # The trace only matters where λ is lost in rounding: any positive definite matrix gives a descent direction.
        hessian[np.diag_indices_from(hessian)] += 2.0 * regularization + 1e-14 * np.trace(hessian)
        direction = -cho_solve(cho_factor(hessian, overwrite_a=True, check_finite=False), gradient, check_finite=False)
        decrement = -float(gradient @ direction)
        converged = decrement <= 2.0 * tolerance * max(value, np.finfo(np.float64).tiny)
        along = problem.times(direction)
        penalty = regularization * np.array([beta @ beta, 2.0 * beta @ direction, direction @ direction])
        step, moved = _line_search(_line(problem, fitted, along, penalty), value, decrement)
        if step == 0.0:  # no decrease is left in float64
            return beta, value, iteration, converged
        beta, fitted, value = beta + step * direction, fitted + step * along, moved
        if converged:
            return beta, value, iteration, True
    return beta, value, ITERATIONS, False


def _line(problem: _Problem, fitted: Vector, along: Vector, penalty: Vector) -> Callable[[float], float]:
    """The objective as a function of the step; `penalty` holds the coefficients of its quadratic part."""

    def at(step: float) -> float:
        return problem.loss(fitted + step * along) + float(penalty @ np.array([1.0, step, step**2]))

    return at


def _line_search(objective: Callable[[float], float], value: float, decrement: float) -> tuple[float, float]:
    """Halve the step until it satisfies Armijo's rule, then on while that still lowers the objective.

    Returns the step and the objective there; a step of 0 where nothing lowers it. Each trial costs O(N), nothing beside
    a Newton step, and going on saves steps where the first acceptable one still overshoots.
    """
    step, best = 1.0, (0.0, value)
    for _ in range(HALVINGS):
        moved = objective(step)
        if best[0] > 0.0 and moved >= best[1]:
            break
        if moved <= value - ARMIJO * step * decrement:
            best = (step, moved)
        step /= 2.0
    return best
