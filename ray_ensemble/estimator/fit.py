"""The regularised logistic fit with the base margins as fixed offsets (Li et al. 2025; DESIGN section 2.3).

    β = argmin F(β),  F(β) = Σ_x w_x log(1 + Σ_k exp(−f_k(x) − φ_k(x)·β)) + λ‖β‖²,  Σw = 1

where k runs over the wrong labels of x, f_k = s_y − s_k and φ_k its projected gradient: −log softmax of the linearised scores.
With two labels, or with one margin f = s_y − logsumexp s_k an example, it is the papers' logistic regression.

It is solved by Newton steps whose equations are solved by conjugate gradients, two passes over the features each, under a
preconditioner that stands for the Hessian: that of a quadratic `Model` of the loss which the caller knows already, since models
add over tasks (`models`) and change little along λ; else the Hessian at β = 0. The minimum of the model is where the fit
starts. Where gradients are too many for the preconditioner (`pass_limit`), it is replaced by the Hessian at that point, so
that at worst the solver is a damped Newton method. At the end the Hessian is formed once for one more, exact, step: it says
whether the fit has converged, and gives the margins of examples left out and the model for the next λ.

No step can raise the objective. A step s that moves no fitted margin by more than `SAFE_MOVE` lowers it: the third derivative
of log-sum-exp along s is at most r times its second, r = 2·max|Δf| the range of the moved scores, so with sᵀ∇²F s = −∇F·s,
which conjugate gradients from zero keep at every iterate, F changes by at most −(1 − (eʳ − r − 1)/r²) sᵀ∇²F s (Bach 2010,
lemma 1; arXiv 0910.4627). That is negative up to r = 1.7; r = 1 leaves room for rounding. Longer steps are searched by halving:
gradients are large (norms of a hundred), and a full step can land where the loss is linear.

With far fewer rows than dimensions the minimiser lies in the span of the features (β = Φᵀα, the representer theorem).
With Φᵀ = QR, Q of orthonormal columns, β = Qγ keeps the norm, so the same problem with features Rᵀ (M×M) gives γ; no
Gram matrix squares the condition number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.linalg import cho_solve, cholesky, qr

from ray_ensemble.estimator.features import FloatArray, IntArray
from ray_ensemble.estimator.loss import MarginLoss, Point, Precision, Vector

TOLERANCE = 1e-9  # on half the squared Newton decrement, relative to the objective
ITERATIONS = 200
FORCING = 0.25  # relative residual of the Newton equations far from the optimum; near it, it falls with the decrement
ROWS_PER_DIM = 3  # a problem of fewer than d/3 rows is solved in as many dimensions as it has rows
RIDGE = 1e-7  # of a float32 model's trace: above its rounding, which may have made it indefinite
SAFE_MOVE = 0.5  # nats
ARMIJO = 1e-4
HALVINGS = 60


@dataclass(frozen=True, eq=False)
class Model:
    """A loss to second order, ½βᵀCβ − s·β up to a constant: `hessian` C (d, d), positive semidefinite, of any float type, and
    `slope` s (d,) float64.

    Only where the solver starts and how fast it gets on depends on a model, so those that are kept are float32.
    """

    hessian: FloatArray
    slope: Vector


@dataclass(frozen=True, eq=False)
class Fit:
    """A fitted β: (d,) float64, with the objective in nats, Newton steps taken and floating-point operations spent.

    `converged` says that the exact Hessian at the end put the optimum within the tolerance. `left_out` (M,) are the margins
    that every example would have if it had been left out of the fit.
    """

    beta: Vector
    objective: float
    iterations: int
    converged: bool
    flops: int
    left_out: Vector


def fit_margins(
    features: FloatArray,
    margins: FloatArray,
    weights: FloatArray,
    regularization: float,
    model: Model | None = None,
    *,
    starts: IntArray | None = None,
) -> Fit:
    """Minimise the objective above.

    `features` (M, d) and `margins` (M,) of any float type, a row for each wrong label of each example; `starts` (N,) is the
    first row of every example (each row an example by default); `weights` (N,) non-negative with sum 1, `regularization` λ
    > 0; a `model` of the loss saves work. Anything else is a `ValueError`. The result is within about 1e-9 of the optimum,
    relative to the objective.
    """
    return next(fit_path(features, margins, weights, [regularization], model, starts=starts))


def fit_path(
    features: FloatArray,
    margins: FloatArray,
    weights: FloatArray,
    regularizations: Iterable[float],
    model: Model | None = None,
    *,
    starts: IntArray | None = None,
    tolerance: float = TOLERANCE,
) -> Iterator[Fit]:
    """Yield the fit of each λ in turn, each from the model of the loss at the one before; the reduction to M×M is done once.

    Lazy, so that a caller can stop along the path. Going from large to small λ keeps every start close to its
    optimum. `tolerance` bounds the distance to the optimal objective, relative to it. Other arguments and errors as
    for `fit_margins`.
    """
    starts = np.arange(features.shape[0]) if starts is None else starts
    _check(features, margins, weights, starts)
    rows, basis, flops = _reduce(features)
    if model is not None and basis is not None:
        model = Model(basis.T @ model.hessian @ basis, basis.T @ model.slope)
    for regularization in regularizations:
        # Made anew at every λ: between two of them only the features as they came are held.
        loss = MarginLoss(rows, starts, weights.astype(np.float64))
        end = minimise(loss, margins.astype(np.float64), regularization, model, tolerance)
        left_out = loss.left_out(end.fitted, end.factor, end.precision)
        beta = end.beta if basis is None else basis @ end.beta
        model = end.model(regularization)
        yield Fit(beta, end.objective, end.iterations, end.converged, flops + loss.flops + end.flops, left_out)
        flops = 0


def loss_model(
    features: FloatArray, margins: FloatArray, weights: FloatArray, regularization: float, starts: IntArray
) -> tuple[Model, int]:
    """The loss to second order about its own fit, and the operations spent. Arguments and errors as for `fit_margins`."""
    _check(features, margins, weights, starts)
    rows, basis, flops = _reduce(features)
    loss = MarginLoss(rows, starts, weights.astype(np.float64))
    end = minimise(loss, margins.astype(np.float64), regularization, None, TOLERANCE)
    model = end.model(regularization)
    flops += loss.flops + end.flops
    if basis is None:
        return model, flops
    dim, rank = basis.shape
    half = basis.astype(np.float32) @ model.hessian  # (d, M) @ (M, M)
    return Model(half @ basis.T.astype(np.float32), basis @ model.slope), flops + 2 * dim * rank * (rank + dim)


def is_reduced(rows: int, dim: int) -> bool:
    """Whether a problem of that many rows is solved in their span, where it has no use for a model."""
    return ROWS_PER_DIM * rows < dim


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
    """Rows of the problem to solve, the basis (d, M) where it was reduced to (M, M), and the operations spent."""
    count, dim = features.shape
    if is_reduced(count, dim):
        basis, upper = qr(features.T.astype(np.float64), mode="economic", check_finite=False)
        # Householder QR and forming Q: 4dM² − 4M³/3 (Golub and Van Loan, section 5.2)
        return np.ascontiguousarray(upper.T), basis, 4 * dim * count**2 - 4 * count**3 // 3
    return features, None, 0


class _End(NamedTuple):
    """Where the solver ended: β, fitted margins (M,), objective, steps, whether it converged, operations of its own, the loss's
    Hessian there with the lower Cholesky factor of the objective's, and what its products were made in."""

    beta: Vector
    fitted: Vector
    objective: float
    iterations: int
    converged: bool
    flops: int
    hessian: Vector
    factor: Vector
    precision: Precision

    def model(self, regularization: float) -> Model:
        """The loss to second order about β, whose gradient at the optimum is −2λβ."""
        raised = self.hessian.copy()
        raised[np.diag_indices_from(raised)] += RIDGE * np.trace(raised)
        hessian = raised.astype(np.float32)
        return Model(hessian, hessian @ self.beta + 2.0 * regularization * self.beta)


def pass_limit(dim: int) -> int:
    """Conjugate gradient iterations after which a new Hessian costs less than as many again."""
    # M·d² operations at the speed of a matrix product against 4·M·d at that of memory.
    return max(2, dim // 20)


def minimise(loss: MarginLoss, offsets: Vector, regularization: float, model: Model | None, tolerance: float) -> _End:
    """Minimise loss + λ‖β‖² as the module says. A λ that is not positive and finite is a `ValueError`."""
    if not (np.isfinite(regularization) and regularization > 0):
        raise ValueError(f"regularization must be positive and finite, not {regularization}")
    solver = _Solver(loss, offsets, regularization)
    if model is None:
        point = loss.at(offsets)
        solver.factorise(loss.hessian(point, loss.precision(point, regularization)))
        solver.start(-loss.gradient(point))
    else:
        solver.factorise(model.hessian.astype(np.float64))
        solver.start(model.slope)
    return solver.run(tolerance)


class _Solver:
    """The state of one minimisation: β, its fitted margins and objective, and the preconditioner."""

    def __init__(self, loss: MarginLoss, offsets: Vector, regularization: float) -> None:
        self.loss, self.offsets, self.regularization = loss, offsets, regularization
        self.beta = np.zeros(loss.rows.shape[1])
        self.fitted = offsets
        self.value = loss.value(offsets)
        self.iterations = 0
        self.flops = 0
        self.hessian = self.factor = np.zeros((0, 0))
        self.precision: Precision = np.float64

    def factorise(self, hessian: Vector) -> None:
        """Precondition with `hessian` of the loss from here on."""
        whole = hessian.copy()
        # The trace only matters where λ is lost in rounding: any positive definite matrix gives a descent direction.
        whole[np.diag_indices_from(whole)] += 2.0 * self.regularization + 1e-14 * np.trace(hessian)
        self.hessian, self.factor = hessian, cholesky(whole, lower=True, overwrite_a=True, check_finite=False)
        self.flops += len(whole) ** 3 // 3

    def precondition(self, vector: Vector) -> Vector:
        """The vector times the inverse of the preconditioner, (k,)."""
        self.flops += 2 * len(vector) ** 2
        found: Vector = cho_solve((self.factor, True), vector, check_finite=False)
        return found

    def start(self, slope: Vector) -> None:
        """Begin at the minimum of the model whose Hessian was factorised, unless zero is better."""
        beta = self.precondition(slope)
        fitted = self.offsets + self.loss.times(beta)
        value = self.loss.value(fitted) + self.regularization * float(beta @ beta)
        if value < self.value:
            self.beta, self.fitted, self.value = beta, fitted, value

    def run(self, tolerance: float) -> _End:
        """Step until the exact Hessian says that the optimum is near enough, or nothing lowers the objective."""
        exact = False  # whether the preconditioner is the Hessian at this very point
        while True:
            point = self.loss.at(self.fitted)
            gradient = self.loss.gradient(point) + 2.0 * self.regularization * self.beta
            direction, solved = self._newton_direction(point, gradient, exact)
            along = self.loss.times(direction)
            decrement = -float(gradient @ direction)
            near = decrement <= 2.0 * tolerance * max(self.value, np.finfo(np.float64).tiny)
            moved = self._move(direction, along, decrement)
            self.iterations += 1
            ended = near or not moved
            if exact and (ended or self.iterations >= ITERATIONS):
                return self._end(converged=near)
            exact = ended or not solved or self.iterations >= ITERATIONS - 1
            if exact:
                point = self.loss.at(self.fitted)
                self.precision = self.loss.precision(point, self.regularization)
                self.factorise(self.loss.hessian(point, self.precision))

    def _end(self, converged: bool) -> _End:
        return _End(
            self.beta,
            self.fitted,
            self.value,
            self.iterations,
            converged,
            self.flops,
            self.hessian,
            self.factor,
            self.precision,
        )

    def _newton_direction(self, point: Point, gradient: Vector, exact: bool) -> tuple[Vector, bool]:
        """Solve the Newton equations: the direction (k,), and whether few passes were enough.

        With the exact Hessian by its factor; else as well as it is worth while, by conjugate gradients from zero.
        """
        if exact:
            direction = -self.precondition(gradient)
            return direction, True
        direction = np.zeros_like(gradient)
        residual = -gradient
        towards = self.precondition(residual)
        square = float(residual @ towards)
        forcing = min(FORCING**2, square / max(self.value, np.finfo(np.float64).tiny))
        wanted = forcing * square
        search = towards
        precision = self.loss.precision(point, self.regularization)
        for _ in range(pass_limit(len(gradient))):
            seen = self.loss.times(search, precision)
            pushed = self.loss.transposed(self.loss.curved(point, seen), precision)
            pushed += 2.0 * self.regularization * search
            curvature = float(search @ pushed)
            if not curvature > 0.0:  # a gradient of zero, or one lost in rounding
                return direction, True
            length = square / curvature
            direction += length * search
            residual -= length * pushed
            towards = self.precondition(residual)
            before, square = square, float(residual @ towards)
            if square <= wanted:
                return direction, True
            search = towards + square / before * search
        return direction, False

    def _move(self, direction: Vector, along: FloatArray, decrement: float) -> bool:
        """Go along the direction, as far as the module says; False where nothing lowers the objective in float64."""
        penalty = self.regularization * np.array(
            [self.beta @ self.beta, 2.0 * self.beta @ direction, direction @ direction]
        )

        def objective(step: float) -> float:
            return self.loss.value(self.fitted + step * along) + float(penalty @ np.array([1.0, step, step**2]))

        if np.abs(along).max() <= SAFE_MOVE:
            step, value = 1.0, objective(1.0)
        else:
            step, value = _line_search(objective, self.value, decrement)
        if step == 0.0:
            return False
        self.beta, self.fitted, self.value = self.beta + step * direction, self.fitted + step * along, value
        return True


def _line_search(objective: Callable[[float], float], value: float, decrement: float) -> tuple[float, float]:
    """Halve the step until it satisfies Armijo's rule, then on while that still lowers the objective.

    Returns the step and the objective there; a step of 0 where nothing lowers it. Each trial costs O(M), nothing beside
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
