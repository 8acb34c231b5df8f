"""The regularised logistic fit with the base margin as a fixed offset (Li et al. 2025; DESIGN section 2.3).

    β = argmin Σ w_x log(1 + exp(−f₀(x) − φ(x)·β)) + λ‖β‖²,  Σw = 1

solved by damped Newton steps in float64. Gradients are large (norms of a hundred), so the undamped step overshoots into
regions where the loss is linear and diverges; a backtracking line search on the objective cannot.

With fewer examples than dimensions the minimiser lies in the span of the features (β = Φᵀα, the representer theorem).
With Φᵀ = QR, Q of orthonormal columns, β = Qγ keeps the norm, so the same problem with features Rᵀ (N×N) gives γ; no
Gram matrix squares the condition number. One Newton step then costs N·k² + k³/3 multiplications, k = min(N, d).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve, qr
from scipy.special import expit

from ray_ensemble.estimator.features import FloatArray

Vector = NDArray[np.float64]

TOLERANCE = 1e-9  # on half the squared Newton decrement, relative to the objective
ITERATIONS = 200
ARMIJO = 1e-4
HALVINGS = 60
BLOCK = 8192  # rows that are held in float64 at a time, so that a float32 store of many tasks is never copied whole


@dataclass(frozen=True, eq=False)
class Fit:
    """A fitted β: (d,) float64, with the objective in nats, Newton steps taken and floating-point operations spent."""

    beta: Vector
    objective: float
    iterations: int
    converged: bool
    flops: int


def softplus(values: FloatArray) -> Vector:
    """log(1 + eᵛ) for any v, without overflow and without loss of small values."""
    return np.logaddexp(0.0, values)


def fit_margins(
    features: FloatArray,
    margins: FloatArray,
    weights: FloatArray,
    regularization: float,
    start: Vector | None = None,
) -> Fit:
    """Minimise the objective above from `start` (zero by default).

    `features` (N, d) and `margins` (N,) of any float type, `weights` (N,) non-negative with sum 1, `regularization` λ
    > 0. Anything else is a `ValueError`. The result is within about 1e-9 of the optimum, relative to the objective.
    """
    return next(fit_path(features, margins, weights, [regularization], start))


def fit_path(
    features: FloatArray,
    margins: FloatArray,
    weights: FloatArray,
    regularizations: Iterable[float],
    start: Vector | None = None,
    *,
    tolerance: float = TOLERANCE,
) -> Iterator[Fit]:
    """Yield the fit of each λ in turn, each started from the one before; the reduction to N×N is done once.

    Lazy, so that a caller can stop along the path. Going from large to small λ keeps every start close to its
    optimum. `tolerance` bounds the distance to the optimal objective, relative to it. Other arguments and errors as
    for `fit_margins`.
    """
    _check(features, margins, weights)
    rows, basis, flops = _reduce(features)
    offsets = margins.astype(np.float64)
    shares = weights.astype(np.float64)
    gamma = np.zeros(rows.shape[1]) if start is None else start.astype(np.float64)
    if start is not None and basis is not None:
        gamma = basis.T @ gamma
    for regularization in regularizations:
        if not (np.isfinite(regularization) and regularization > 0):
            raise ValueError(f"regularization must be positive and finite, not {regularization}")
        gamma, objective, iterations, converged = _newton(
            rows, offsets, shares, gamma, regularization=regularization, tolerance=tolerance
        )
        flops += iterations * _step_flops(*rows.shape)
        beta = gamma if basis is None else basis @ gamma
        yield Fit(beta, objective, iterations, converged, flops)
        flops = 0


def _check(features: FloatArray, margins: FloatArray, weights: FloatArray) -> None:
    if features.ndim != 2 or features.shape[0] == 0 or not margins.shape == weights.shape == features.shape[:1]:
        raise ValueError(f"features {features.shape}, margins {margins.shape} and weights {weights.shape} do not fit")
    if np.any(weights < 0) or not np.isclose(float(weights.sum()), 1.0, rtol=1e-6):
        raise ValueError("weights must be non-negative with sum 1")


def _reduce(features: FloatArray) -> tuple[FloatArray, Vector | None, int]:
    """Rows of the problem to solve, (N, min(N, d)), the basis (d, N) where it was reduced, and the operations spent."""
    examples, dim = features.shape
    if examples < dim:
        basis, upper = qr(features.T.astype(np.float64), mode="economic", check_finite=False)
        # Householder QR and forming Q: 4dN² − 4N³/3 (Golub and Van Loan, section 5.2)
        return np.ascontiguousarray(upper.T), basis, 4 * dim * examples**2 - 4 * examples**3 // 3
    return (features.astype(np.float64) if examples <= BLOCK else features), None, 0


def _step_flops(examples: int, dim: int) -> int:
    """Operations of one Newton step: symmetric product, Cholesky factor, three products with the rows."""
    return examples * dim * (dim + 1) + dim**3 // 3 + 6 * examples * dim


def _blocks(rows: FloatArray) -> Iterator[tuple[slice, Vector]]:
    for first in range(0, rows.shape[0], BLOCK):
        part = slice(first, first + BLOCK)
        yield part, rows[part].astype(np.float64, copy=False)


def _times(rows: FloatArray, vector: Vector) -> Vector:
    """Rows · vector, (N,) float64."""
    return np.concatenate([block @ vector for _, block in _blocks(rows)])


def _derivatives(rows: FloatArray, fitted: Vector, shares: Vector) -> tuple[Vector, Vector]:
    """Gradient (k,) and Hessian (k, k) of the weighted loss, without the penalty's terms."""
    wrong = shares * expit(-fitted)
    root = np.sqrt(wrong * expit(fitted))
    dim = rows.shape[1]
    gradient, hessian = np.zeros(dim), np.zeros((dim, dim))
    for part, block in _blocks(rows):
        gradient -= wrong[part] @ block
        scaled = block * root[part, None]
        hessian += scaled.T @ scaled  # numpy sees one matrix and calls the symmetric product: half the work
    return gradient, hessian


def _newton(
    rows: FloatArray,
    offsets: Vector,
    shares: Vector,
    start: Vector,
    *,
    regularization: float,
    tolerance: float,
) -> tuple[Vector, float, int, bool]:
    """Damped Newton from `start`: returns the minimiser, its objective, the steps taken and whether it converged."""
    beta, fitted = start.copy(), offsets + _times(rows, start)
    value = float(shares @ softplus(-fitted) + regularization * beta @ beta)
    for iteration in range(1, ITERATIONS + 1):
        gradient, hessian = _derivatives(rows, fitted, shares)
        gradient += 2.0 * regularization * beta
        # The trace only matters where λ is lost in rounding: any positive definite matrix gives a descent direction.
        hessian[np.diag_indices_from(hessian)] += 2.0 * regularization + 1e-14 * np.trace(hessian)
        direction = -cho_solve(cho_factor(hessian, overwrite_a=True, check_finite=False), gradient, check_finite=False)
        decrement = -float(gradient @ direction)
        converged = decrement <= 2.0 * tolerance * max(value, np.finfo(np.float64).tiny)
        along = _times(rows, direction)
        penalty = regularization * np.array([beta @ beta, 2.0 * beta @ direction, direction @ direction])
        step, moved = _line_search(_line(fitted, along, shares, penalty), value, decrement)
        if step == 0.0:  # no decrease is left in float64
            return beta, value, iteration, converged
        beta, fitted, value = beta + step * direction, fitted + step * along, moved
        if converged:
            return beta, value, iteration, True
    return beta, value, ITERATIONS, False


def _line(fitted: Vector, along: Vector, shares: Vector, penalty: Vector) -> Callable[[float], float]:
    """The objective as a function of the step; `penalty` holds the coefficients of its quadratic part."""

    def at(step: float) -> float:
        loss = shares @ softplus(-(fitted + step * along))
        return float(loss + penalty @ np.array([1.0, step, step**2]))

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
