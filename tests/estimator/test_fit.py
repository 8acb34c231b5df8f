"""The fit against scipy's optimum, where plain Newton diverges, and from either side of N = d."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import expit, log_softmax, softmax

from ray_ensemble.estimator import fit_margins, fit_path, pairwise_margins
from ray_ensemble.estimator.budget import GRID_DECADES
from ray_ensemble.estimator.fit import SAFE_MOVE, Model, _Solver, loss_model
from ray_ensemble.estimator.loss import MarginLoss, softplus


def problem(examples, dim, norm, seed=0, scale=1.0):
    generator = np.random.default_rng(seed)
    rows = generator.normal(size=(examples, dim)) * np.arange(1, dim + 1) ** -0.5
    rows *= norm / np.sqrt((rows**2).sum(axis=1).mean())
    weights = generator.random(examples)
    return rows, scale * generator.normal(size=examples), weights / weights.sum()


def value(beta, rows, margins, weights, regularization):
    return weights @ softplus(-(margins + rows @ beta)) + regularization * beta @ beta


def gradient(beta, rows, margins, weights, regularization):
    return -rows.T @ (weights * expit(-(margins + rows @ beta))) + 2 * regularization * beta


def scipy_optimum(rows, margins, weights, regularization):
    """The best of two solvers of another kind, both in float64 and run to the end."""

    def hessian_product(beta, vector):
        fitted = margins + rows @ beta
        curvature = weights * expit(fitted) * expit(-fitted)
        return rows.T @ (curvature * (rows @ vector)) + 2 * regularization * vector

    start = np.zeros(rows.shape[1])
    args = (rows, margins, weights, regularization)
    trust = minimize(
        value, start, args, "trust-ncg", gradient, hessp=lambda b, v, *_: hessian_product(b, v), options={"gtol": 1e-12}
    )
    quasi = minimize(value, trust.x, args, "L-BFGS-B", gradient, options={"ftol": 0, "gtol": 1e-13, "maxiter": 5000})
    return min(trust.fun, quasi.fun)


@pytest.mark.parametrize(("examples", "dim"), [(120, 40), (40, 120), (60, 60), (1, 5)])
@pytest.mark.parametrize("norm", [1.0, 100.0])
@pytest.mark.parametrize("regularization", [10.0, 1e-1, 1e-3])
def test_reaches_the_optimum_of_scipy(examples, dim, norm, regularization):
    rows, margins, weights = problem(examples, dim, norm)
    fit = fit_margins(rows.astype(np.float32), margins, weights, regularization)
    single = rows.astype(np.float32).astype(np.float64)
    best = scipy_optimum(single, margins, weights, regularization)
    assert fit.converged
    assert fit.objective <= best * (1 + 1e-6)
    assert fit.objective == pytest.approx(value(fit.beta, single, margins, weights, regularization), rel=1e-9)


def undamped_newton(rows, margins, weights, regularization, steps=30):
    beta = np.zeros(rows.shape[1])
    for _ in range(steps):
        fitted = margins + rows @ beta
        curvature = weights * expit(fitted) * expit(-fitted)
        hessian = (rows.T * curvature) @ rows + 2 * regularization * np.eye(len(beta))
        beta -= np.linalg.solve(hessian, gradient(beta, rows, margins, weights, regularization))
    return value(beta, rows, margins, weights, regularization)


def test_converges_where_undamped_newton_diverges():
    rows, margins, weights = problem(30, 20, norm=100.0, seed=3, scale=10.0)
    regularization = 1e-6
    fit = fit_margins(rows, margins, weights, regularization)
    assert fit.converged
    assert fit.objective < 1.0
    assert undamped_newton(rows, margins, weights, regularization) > 10 * fit.objective
    assert fit.objective <= scipy_optimum(rows, margins, weights, regularization) * (1 + 1e-6)


@settings(max_examples=30, deadline=None)
@given(
    examples=st.integers(1, 25),
    dim=st.integers(1, 25),
    exponent=st.floats(-7, 3),
    norm=st.sampled_from([1e-3, 1.0, 300.0]),
    scale=st.sampled_from([0.1, 30.0]),
    seed=st.integers(0, 100),
)
def test_gradient_vanishes_at_the_optimum(examples, dim, exponent, norm, scale, seed):
    rows, margins, weights = problem(examples, dim, norm, seed, scale)
    regularization = 10.0**exponent
    fit = fit_margins(rows, margins, weights, regularization)
    slope = np.linalg.norm(gradient(fit.beta, rows, margins, weights, regularization))
    assert fit.converged
    # By strong convexity the objective is within |gradient|²/4λ of the optimum.
    certificate = slope**2 / (4 * regularization)
    assert certificate <= 1e-6 * fit.objective or slope <= 1e-10 * norm


def test_fewer_examples_than_dimensions_gives_the_same_beta_as_more():
    """Repeating examples with split weights is the same problem, solved in d dimensions instead of N."""
    rows, margins, weights = problem(20, 80, norm=10.0)
    dual = fit_margins(rows, margins, weights, 0.1)
    primal = fit_margins(np.tile(rows, (3, 1)), np.tile(margins, 3), np.tile(weights, 3) / 3, 0.1)
    np.testing.assert_allclose(dual.beta, primal.beta, atol=1e-7)
    assert dual.flops < primal.flops


def test_blocks_of_rows_change_nothing(monkeypatch):
    rows, margins, weights = problem(90, 10, norm=5.0)
    rows = rows.astype(np.float32)
    whole = fit_margins(rows, margins, weights, 0.01)
    monkeypatch.setattr("ray_ensemble.estimator.loss.BLOCK", 16)
    np.testing.assert_allclose(fit_margins(rows, margins, weights, 0.01).beta, whole.beta, atol=1e-9)


def test_a_path_gives_the_fits_that_cold_starts_give():
    rows, margins, weights = problem(30, 60, norm=20.0)
    grid = [10.0, 1.0, 0.1, 0.01]
    for regularization, fit in zip(grid, fit_path(rows, margins, weights, grid), strict=True):
        cold = fit_margins(rows, margins, weights, regularization)
        assert fit.objective == pytest.approx(cold.objective, rel=1e-8)


def test_its_own_model_saves_work_and_changes_no_result():
    rows, margins, weights = problem(60, 60, norm=20.0)
    cold = fit_margins(rows, margins, weights, 0.01)
    model, _ = loss_model(rows, margins, weights, 0.01, np.arange(60))
    warm = fit_margins(rows, margins, weights, 0.01, model)
    assert warm.iterations <= 2
    assert cold.iterations > 4
    assert warm.flops < cold.flops
    assert warm.objective == pytest.approx(cold.objective, rel=1e-9)


@pytest.mark.parametrize("examples", [30, 200])
def test_a_wrong_model_changes_no_result(examples):
    """Of other data, of nothing at all, or pointing a long way off: the fit is the same."""
    rows, margins, weights = problem(examples, 60, norm=100.0)
    other, _ = loss_model(*problem(80, 60, norm=1.0, seed=8), 1e-3, np.arange(80))
    nothing = Model(np.zeros((60, 60), np.float32), np.zeros(60))
    mad = Model(np.eye(60, dtype=np.float32), np.full(60, 1e6))
    for regularization in (100.0, 1e-2, 1e-6):
        right = fit_margins(rows, margins, weights, regularization)
        for model in (other, nothing, mad):
            found = fit_margins(rows, margins, weights, regularization, model)
            assert found.converged
            assert found.objective == pytest.approx(right.objective, rel=1e-8)
            np.testing.assert_allclose(found.left_out, right.left_out, rtol=1e-3, atol=1e-3)


def test_recovers_planted_coefficients():
    generator = np.random.default_rng(0)
    truth = generator.normal(size=5)
    rows, offsets = generator.normal(size=(20000, 5)), generator.normal(size=20000)
    right = generator.random(20000) < expit(offsets + rows @ truth)
    sign = np.where(right, 1.0, -1.0)
    fit = fit_margins(sign[:, None] * rows, sign * offsets, np.full(20000, 1 / 20000), 1e-6)
    np.testing.assert_allclose(fit.beta, truth, atol=0.1)


def test_the_offset_is_not_fitted():
    """With margins that are already right beyond doubt there is nothing to gain, whatever their level."""
    rows, _, weights = problem(20, 5, norm=1.0)
    assert np.linalg.norm(fit_margins(rows, np.full(20, 40.0), weights, 1e-3).beta) < 1e-12


@pytest.mark.parametrize(
    ("margins", "weights", "regularization"),
    [
        (np.zeros(3), np.full(4, 0.25), 1.0),
        (np.zeros(4), np.full(4, 0.3), 1.0),
        (np.zeros(4), np.array([0.5, 0.5, 0.5, -0.5]), 1.0),
        (np.zeros(4), np.full(4, 0.25), 0.0),
        (np.zeros(4), np.full(4, 0.25), np.nan),
    ],
)
def test_refuses_what_is_no_problem(margins, weights, regularization):
    with pytest.raises(ValueError, match=r"fit|weights|regularization"):
        fit_margins(np.zeros((4, 2)), margins, weights, regularization)


def test_softplus_is_stable():
    np.testing.assert_allclose(softplus(np.array([-800.0, -40.0, 0.0, 800.0])), [0, np.exp(-40), np.log(2), 800])


def class_problem(dim, counts=((25, 2), (20, 4), (15, 3)), norm=5.0, seed=0):
    """Tasks with two, four and three labels in one fit: scores, features of s_k − s_0, labels."""
    generator = np.random.default_rng(seed)
    tasks = []
    for count, classes in counts:
        features = generator.normal(size=(count, classes, dim)) * norm / np.sqrt(dim)
        features[:, 0] = 0.0
        tasks.append((generator.normal(size=(count, classes)), features, generator.integers(0, classes, count)))
    return tasks


def softmax_value(beta, tasks, regularization):
    losses = [-log_softmax(s + c @ beta, axis=1)[np.arange(len(y)), y] for s, c, y in tasks]
    return np.concatenate(losses).mean() + regularization * beta @ beta


def softmax_gradient(beta, tasks, regularization):
    total = 2 * regularization * beta
    for s, c, y in tasks:
        residual = softmax(s + c @ beta, axis=1)
        residual[np.arange(len(y)), y] -= 1
        total = total + np.einsum("nk,nkd->d", residual, c) / sum(len(y) for _, _, y in tasks)
    return total


@pytest.mark.parametrize("dim", [6, 40, 300])
@pytest.mark.parametrize("regularization", [1.0, 1e-2, 1e-4])
def test_pairwise_margins_give_the_softmax_regression(dim, regularization, monkeypatch):
    monkeypatch.setattr("ray_ensemble.estimator.loss.BLOCK", 32)  # blocks must not cut examples
    tasks = class_problem(dim)
    parts = [pairwise_margins(*task) for task in tasks]
    before = np.cumsum([0] + [len(rows) for rows, _, _ in parts])
    rows, margins = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
    starts = np.concatenate([part[2] + first for part, first in zip(parts, before, strict=False)])
    weights = np.full(60, 1 / 60)
    fit = fit_margins(rows, margins, weights, regularization, starts=starts)
    # The same features in float32, as the store keeps them.
    single = [(s, c.astype(np.float32).astype(np.float64), y) for s, c, y in tasks]
    options = {"ftol": 0, "gtol": 1e-11, "maxiter": 5000}
    best = minimize(
        softmax_value, np.zeros(dim), (single, regularization), "L-BFGS-B", softmax_gradient, options=options
    )
    assert fit.converged
    assert fit.objective == pytest.approx(softmax_value(fit.beta, single, regularization), rel=1e-5)
    assert fit.objective <= best.fun * (1 + 1e-5)


def test_derivatives_are_those_of_the_loss():
    tasks = class_problem(5, norm=2.0, seed=4)
    parts = [pairwise_margins(*task) for task in tasks]
    before = np.cumsum([0] + [len(rows) for rows, _, _ in parts])
    rows, margins = (np.concatenate([part[i] for part in parts]).astype(np.float64) for i in (0, 1))
    starts = np.concatenate([part[2] + first for part, first in zip(parts, before, strict=False)])
    whole = MarginLoss(rows, starts, np.full(60, 1 / 60))
    beta = np.random.default_rng(1).normal(size=5)

    def loss(b):
        return whole.value(margins + rows @ b)

    def slope(b):
        return whole.gradient(whole.at(margins + rows @ b))

    point = whole.at(margins + rows @ beta)
    step = 1e-5 * np.eye(5)
    numeric = [(loss(beta + e) - loss(beta - e)) / 2e-5 for e in step]
    np.testing.assert_allclose(slope(beta), numeric, rtol=1e-6, atol=1e-9)
    numeric = np.array([slope(beta + e) - slope(beta - e) for e in step]) / 2e-5
    hessian = whole.hessian(point)
    np.testing.assert_allclose(hessian, numeric, rtol=1e-5, atol=1e-8)
    products = [whole.transposed(whole.curved(point, whole.times(e))) for e in np.eye(5)]
    np.testing.assert_allclose(products, hessian, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("starts", [[1, 2], [0, 0], [0, 4], [0, 3, 2]])
def test_refuses_starts_that_do_not_fit(starts):
    count = len(starts)
    with pytest.raises(ValueError, match="starts"):
        fit_margins(np.zeros((4, 2)), np.zeros(4), np.full(count, 1 / count), 1.0, starts=np.array(starts))


@pytest.mark.parametrize("dim", [8, 200])
@pytest.mark.parametrize("regularization", [0.3, 0.02])
def test_left_out_margins_are_close_to_those_of_fits_without_the_example(dim, regularization):
    tasks = class_problem(dim, norm=4.0, seed=2)
    parts = [pairwise_margins(*task) for task in tasks]
    before = np.cumsum([0] + [len(rows) for rows, _, _ in parts])
    rows, margins = (np.concatenate([part[i] for part in parts]).astype(np.float64) for i in (0, 1))
    starts = np.concatenate([part[2] + first for part, first in zip(parts, before, strict=False)])
    ends = np.append(starts[1:], len(rows))
    whole = fit_margins(rows, margins, np.full(60, 1 / 60), regularization, starts=starts)
    approximate, exact, fitted = [], [], []
    for x in range(0, 60, 3):
        mine = np.arange(starts[x], ends[x])
        kept = np.delete(np.arange(len(rows)), mine)
        lengths = np.delete(ends - starts, x)
        others = np.cumsum([0, *lengths[:-1]])
        # Without its example the sum of weights is 59/60; dividing by it keeps the balance with the penalty.
        without = fit_margins(
            rows[kept], margins[kept], np.full(59, 1 / 59), regularization * 60 / 59, starts=others
        ).beta
        approximate += list(whole.left_out[mine])
        exact += list(margins[mine] + rows[mine] @ without)
        fitted += list(margins[mine] + rows[mine] @ whole.beta)
    approximate, exact, fitted = map(np.array, (approximate, exact, fitted))
    optimism = np.sqrt(np.mean((fitted - exact) ** 2))
    assert np.sqrt(np.mean((approximate - exact) ** 2)) < 0.15 * optimism
    assert np.mean(fitted - exact) > 0, "a fit flatters its own examples"


def stacked(tasks):
    parts = [pairwise_margins(*task) for task in tasks]
    before = np.cumsum([0] + [len(rows) for rows, _, _ in parts])
    rows, margins = (np.concatenate([part[i] for part in parts]).astype(np.float64) for i in (0, 1))
    starts = np.concatenate([part[2] + first for part, first in zip(parts, before, strict=False)])
    return rows, margins, starts


def ill_conditioned(rows, seed):
    """Columns over twelve orders of magnitude, one of zeros, and every tenth row twice."""
    scale = 10.0 ** np.random.default_rng(seed).uniform(-10, 2, rows.shape[1])
    scale[0] = 0.0
    rows = rows * scale
    rows[::10] = rows[1::10][: len(rows[::10])]
    return rows * 100.0 / np.sqrt((rows**2).sum(axis=1).mean())


def margin_optimum(rows, margins, starts, regularization):
    """The optimum in float64 by L-BFGS in another basis: the rows' singular vectors, each scaled by its curvature."""
    lengths = np.diff(starts, append=len(rows))
    example = np.repeat(np.arange(len(starts)), lengths)
    u, singular, _ = np.linalg.svd(rows, full_matrices=False)
    scale = 1 / np.sqrt(singular**2 / len(starts) + 2 * regularization)
    moved = u * (singular * scale)

    def objective(gamma):
        fitted = margins + moved @ gamma
        loss = np.logaddexp(0, np.logaddexp.reduceat(-fitted, starts))
        share = np.exp(-fitted - loss[example]) / len(starts)
        penalty = regularization * scale**2 * gamma
        return loss.mean() + penalty @ gamma, -share @ moved + 2 * penalty

    options = {"ftol": 0, "gtol": 1e-12, "maxiter": 20000, "maxfun": 50000, "maxcor": 30}
    return minimize(objective, np.zeros(len(singular)), method="L-BFGS-B", jac=True, options=options).fun


@pytest.mark.parametrize("conditioned", ["well", "ill"])
@pytest.mark.parametrize("counts", [((70, 2),), ((30, 2), (20, 5), (20, 3))])
@pytest.mark.parametrize("dim", [12, 90, 600])
def test_every_lambda_of_the_grid_is_within_a_millionth_of_scipy(dim, counts, conditioned):
    rows, margins, starts = stacked(class_problem(dim, counts, norm=100.0, seed=dim))
    if conditioned == "ill":
        rows = ill_conditioned(rows, dim)
    scale = np.square(rows).sum(axis=1).mean()
    grid = scale * np.logspace(*GRID_DECADES, 8)
    fits = fit_path(rows, margins, np.full(70, 1 / 70), grid, starts=starts)
    for regularization, fit in zip(grid, fits, strict=True):
        best = margin_optimum(rows, margins, starts, regularization)
        loss = MarginLoss(rows, starts, np.full(70, 1 / 70))
        reached = loss.value(margins + rows @ fit.beta) + regularization * fit.beta @ fit.beta
        assert fit.converged
        assert fit.objective == pytest.approx(reached, rel=1e-9)
        assert fit.objective <= best * (1 + 1e-6)
        alone = fit_margins(rows, margins, np.full(70, 1 / 70), regularization, starts=starts)
        assert alone.converged
        assert alone.objective <= best * (1 + 1e-6)


class Recording(_Solver):
    """Keeps the objective after every step."""

    def _move(self, direction, along, decrement):
        moved = super()._move(direction, along, decrement)
        fitted = self.offsets + self.loss.rows @ self.beta
        self.values.append(self.loss.value(fitted) + self.regularization * self.beta @ self.beta)
        return moved


@settings(max_examples=25, deadline=None)
@given(
    dim=st.integers(1, 60),
    exponent=st.floats(-9, 3),
    norm=st.sampled_from([1.0, 300.0]),
    scale=st.sampled_from([0.1, 30.0]),
    seed=st.integers(0, 100),
)
def test_no_step_raises_the_objective(dim, exponent, norm, scale, seed):
    rows, margins, starts = stacked(class_problem(dim, norm=norm, seed=seed))
    solver = Recording(MarginLoss(rows, starts, np.full(60, 1 / 60)), scale * margins, 10.0**exponent)
    solver.values = [solver.value]
    solver.factorise(np.eye(dim) * 10.0 ** (seed % 9 - 4))  # whatever the preconditioner
    solver.run(1e-9)
    values = np.array(solver.values)
    assert np.all(np.diff(values) <= 1e-12 * values[:-1])


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), scale=st.sampled_from([0.1, 1.0, 20.0]))
def test_newton_steps_of_small_moves_lower_the_objective(seed, scale):
    """The bound that lets such steps go unsearched, at points where the loss is flat, curved, or almost linear."""
    rows, margins, starts = stacked(class_problem(4, ((3, 2), (2, 6)), norm=3.0, seed=seed))
    loss = MarginLoss(rows, starts, np.full(5, 1 / 5))
    fitted = scale * margins
    point = loss.at(fitted)
    gradient, hessian = loss.gradient(point), loss.hessian(point)
    direction = np.random.default_rng(seed).normal(size=4)
    if gradient @ direction > 0:
        direction = -direction
    # Along any line, the step that its curvature asks for; the penalty makes it as short as the bound needs.
    move = np.abs(rows @ direction).max()
    step = min(-(gradient @ direction) / (direction @ hessian @ direction), SAFE_MOVE / move)
    penalty = -(gradient @ direction) / step - direction @ hessian @ direction  # of the quadratic added to both
    before = loss.value(fitted)
    after = loss.value(fitted + step * rows @ direction) + penalty / 2 * step**2
    assert after < before


def test_a_fit_that_was_cut_short_says_so(monkeypatch):
    rows, margins, weights = problem(30, 20, norm=100.0, seed=3, scale=10.0)
    whole = fit_margins(rows, margins, weights, 1e-6)
    monkeypatch.setattr("ray_ensemble.estimator.fit.ITERATIONS", 2)
    cut = fit_margins(rows, margins, weights, 1e-6)
    assert whole.converged
    assert not cut.converged
    assert cut.objective > whole.objective * 1.01
    assert np.isfinite(cut.left_out).all()


def test_left_out_margins_are_one_newton_step_away():
    """Against the definition, with dense matrices and an inverse, on examples of one, two and three rows."""
    rows, margins, starts = stacked(class_problem(30, norm=20.0, seed=6))
    weights = np.random.default_rng(0).random(60)
    weights /= weights.sum()
    regularization = 0.05
    fit = fit_margins(rows, margins, weights, regularization, starts=starts)
    fitted = margins + rows @ fit.beta
    hessian = 2 * regularization * np.eye(30)
    pieces = []
    for weight, first, last in zip(weights, starts, [*starts[1:], len(rows)], strict=True):
        share = np.exp(-fitted[first:last]) / (1 + np.exp(-fitted[first:last]).sum())
        curvature = np.diag(share) - np.outer(share, share)
        pieces.append((weight, rows[first:last], -share, curvature))
        hessian += weight * rows[first:last].T @ curvature @ rows[first:last]
    expected = []
    for (weight, r, g, curvature), first in zip(pieces, starts, strict=True):
        a = weight * r @ np.linalg.inv(hessian) @ r.T
        expected += list(fitted[first : first + len(g)] + np.linalg.inv(np.eye(len(g)) - a @ curvature) @ a @ g)
    np.testing.assert_allclose(fit.left_out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("conditioned", ["well", "ill"])
def test_features_in_float32_give_what_the_same_in_float64_give(conditioned):
    """At every λ of the grid and far below it, where float32 would not do for what it is trusted with."""
    rows, margins, starts = stacked(class_problem(80, ((40, 2), (40, 4)), norm=100.0, seed=9))
    if conditioned == "ill":
        rows = ill_conditioned(rows, 9)
    single = rows.astype(np.float32)
    weights = np.full(80, 1 / 80)
    grid = 1e4 * np.logspace(1, -13, 15)
    wide = fit_path(single.astype(np.float64), margins, weights, grid, starts=starts)
    for one, two in zip(fit_path(single, margins, weights, grid, starts=starts), wide, strict=True):
        assert one.converged
        assert one.objective == pytest.approx(two.objective, rel=1e-8)
        change = np.abs(two.left_out - margins)
        np.testing.assert_array_less(np.abs(one.left_out - two.left_out), 1e-3 * change + 1e-3)


def test_float32_is_left_where_its_rounding_would_tell():
    rows, margins, starts = stacked(class_problem(30, norm=100.0, seed=1))
    weights = np.full(60, 1 / 60)
    loss = MarginLoss(rows.astype(np.float32), starts, weights)
    point = loss.at(margins)
    trace = np.trace(loss.hessian(point))
    assert loss.precision(point, trace) is np.float32
    assert loss.precision(point, 1e-6 * trace) is np.float64
    assert MarginLoss(rows, starts, weights).precision(point, trace) is np.float64
    rounding = loss.hessian(point, np.float32) - loss.hessian(point)
    assert 0 < np.linalg.norm(rounding, 2) < 1e-7 * trace


@pytest.mark.parametrize(("size", "dim"), [(40, 200), (90, 60)])
def test_operations_are_counted(size, dim):
    """The least that a fit needs, from the sizes alone; and a fit of many times the rows costs many times as much."""
    rows, margins, weights = problem(size, dim, norm=20.0)
    fit = fit_margins(rows, margins, weights, 0.1)
    least = min(size, dim)
    factors = 2 * (least**3 // 3)
    assert fit.flops > 2 * size * least**2 + factors + 4 * size * least * fit.iterations
    times = 20
    more = fit_margins(np.tile(rows, (times, 1)), np.tile(margins, times), np.tile(weights, times) / times, 0.1)
    if size > dim:
        assert 0.5 * times * (fit.flops - factors) < more.flops < 1.5 * times * fit.flops
