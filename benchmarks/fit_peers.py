"""What `benchmarks/fits.py` compares with: damped Newton, scipy's L-BFGS, and one read of the features an iteration."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve, cholesky, solve_triangular
from scipy.optimize import minimize
from scipy.special import expit

Vector = NDArray[np.float64]

NEWTON_TOLERANCE = 1e-9  # on half the squared Newton decrement, relative to the objective
NEWTON_ITERATIONS = 200
HALVINGS = 60
SCIPY_GRADIENT = 1e-10
READ_BYTES = 2**28


class Problem(NamedTuple):
    """A group's fit: features (M, d) float32, a row an example; margins and weights (M,); λ."""

    features: NDArray[np.float32]
    margins: Vector
    weights: Vector
    regularization: float


class Solved(NamedTuple):
    """β (d,), its objective in nats, and iterations."""

    beta: Vector
    objective: float
    iterations: int


def objective(problem: Problem, beta: Vector) -> float:
    """The objective in float64, from the definition."""
    fitted = problem.margins + problem.features.astype(np.float64) @ beta
    return float(problem.weights @ np.logaddexp(0.0, -fitted) + problem.regularization * beta @ beta)


def newton(problem: Problem) -> Solved:
    """Damped Newton from zero in float64, halving the step until the objective falls; then the examples left out.

    A Hessian (M·d² multiplications) and its Cholesky factor every step, and one of each more to leave examples out.
    """
    rows, weights, penalty = problem.features.astype(np.float64), problem.weights, problem.regularization
    beta = np.zeros(rows.shape[1])
    fitted = problem.margins.copy()
    value = float(weights @ np.logaddexp(0.0, -fitted))

    def hessian() -> Vector:
        scaled = rows * np.sqrt(weights * expit(-fitted) * expit(fitted))[:, None]
        found: Vector = scaled.T @ scaled
        found[np.diag_indices_from(found)] += 2.0 * penalty
        return found

    iteration = 0
    while iteration < NEWTON_ITERATIONS:
        iteration += 1
        gradient = -(weights * expit(-fitted)) @ rows + 2.0 * penalty * beta
        direction = -cho_solve(cho_factor(hessian(), overwrite_a=True, check_finite=False), gradient)
        along, decrement, step = rows @ direction, -float(gradient @ direction), 1.0
        for _ in range(HALVINGS):
            moved = beta + step * direction
            reached = float(weights @ np.logaddexp(0.0, -(fitted + step * along)) + penalty * moved @ moved)
            if reached <= value - 1e-4 * step * decrement:
                beta, fitted, value = moved, fitted + step * along, reached
                break
            step /= 2.0
        if decrement <= 2.0 * NEWTON_TOLERANCE * value:
            break
    half = solve_triangular(cholesky(hessian(), lower=True), rows.T, lower=True, check_finite=False)
    share = expit(-fitted)
    leverage = weights * np.einsum("km,km->m", half, half)
    _ = fitted - leverage * share / (1.0 - leverage * share * (1.0 - share))
    return Solved(beta, value, iteration)


def lbfgs(problem: Problem) -> Solved:
    """scipy's L-BFGS-B in float64 until its gradient is no longer than rounding lets it be; nothing left out."""
    rows, weights, penalty = problem.features.astype(np.float64), problem.weights, problem.regularization

    def both(beta: Vector) -> tuple[float, Vector]:
        fitted = problem.margins + rows @ beta
        value = float(weights @ np.logaddexp(0.0, -fitted) + penalty * beta @ beta)
        return value, -(weights * expit(-fitted)) @ rows + 2.0 * penalty * beta

    options = {"ftol": 0.0, "gtol": SCIPY_GRADIENT, "maxiter": 20000, "maxfun": 40000}
    found = minimize(both, np.zeros(rows.shape[1]), method="L-BFGS-B", jac=True, options=options)
    return Solved(found.x, float(found.fun), int(found.nit))


def read_seconds(features: int, clock: Callable[[], float]) -> float:
    """Seconds to read so many bytes of features once, from a measured rate: the best of a few sums of a large array."""
    large = np.ones(READ_BYTES // 4, np.float32)
    taken = []
    for _ in range(5):
        started = clock()
        large.sum()
        taken.append(clock() - started)
    return features * min(taken) / READ_BYTES
