"""Fits of many groups at once against scipy and the fits one by one, and that no group sees its neighbours."""

from __future__ import annotations

import pickle
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import expit

from ray_ensemble.config import TrainingConfig
from ray_ensemble.estimator import (
    Estimator,
    TaskFeatures,
    batch_loss,
    batched,
    fit_margins,
    pairwise_margins,
    sample_subsets,
)
from ray_ensemble.estimator.batched import BatchedFits
from ray_ensemble.estimator.budget import stack_group
from ray_ensemble.estimator.loss import MarginLoss
from ray_ensemble.estimator.planted import planted_tasks

GROUPS = [(0, 1, 2, 3), (1,), (0, 2), (3,), (1, 3), (0, 1, 2)]


def make_task(rows, margins, starts=None, name="task"):
    nothing = np.zeros((2, 2, rows.shape[1]))
    return TaskFeatures(name, rows, margins, np.zeros((2, 2)), nothing, np.zeros(2, dtype=np.int64), starts)


def make_tasks(dim, norm=10.0, scale=1.0, seed=0, dtype=np.float32):
    """Tasks of two and of four labels, one whose examples have one to three rows, and one of few examples."""
    generator = np.random.default_rng(seed)
    tasks = []
    for count, labels in ((40, 2), (25, 4), (9, 2)):
        features = generator.normal(size=(count, labels, dim)) * norm / np.sqrt(dim)
        features[:, 0] = 0.0
        scores, right = scale * generator.normal(size=(count, labels)), generator.integers(0, labels, count)
        rows, margins, starts = pairwise_margins(scores, features, right)
        tasks.append(make_task(rows.astype(dtype), margins, None if labels == 2 else starts))
    lengths = generator.integers(1, 4, 20)
    rows = generator.normal(size=(lengths.sum(), dim)) * norm / np.sqrt(dim)
    starts = np.cumsum(lengths) - lengths
    tasks.insert(2, make_task(rows.astype(dtype), scale * generator.normal(size=lengths.sum()), starts))
    return tasks


def fits(tasks, groups, regularization, **options):
    """The fits of groups in their order."""
    found = dict(BatchedFits(tasks, lambda group: regularization, **options).fit(groups))
    assert sorted(found) == list(range(len(groups)))
    return [found[place] for place in range(len(groups))]


def objective(tasks, group, regularization, beta):
    rows, margins, weights, starts = stack_group(tasks, group)
    rows = rows.astype(np.float64)
    return MarginLoss(rows, starts, weights).value(margins + rows @ beta) + regularization * beta @ beta


def scipy_optimum(tasks, group, regularization):
    """By L-BFGS in float64, in the basis of the rows' singular vectors, each scaled by its curvature."""
    rows, margins, weights, starts = stack_group(tasks, group)
    example = np.repeat(np.arange(len(starts)), np.diff(starts, append=len(rows)))
    u, singular, _ = np.linalg.svd(rows.astype(np.float64), full_matrices=False)
    scale = 1 / np.sqrt(singular**2 / len(starts) + 2 * regularization)
    moved = u * (singular * scale)

    def both(gamma):
        fitted = margins + moved @ gamma
        loss = np.logaddexp(0, np.logaddexp.reduceat(-fitted, starts))
        share = weights[example] * np.exp(-fitted - loss[example])
        penalty = regularization * scale**2 * gamma
        return weights @ loss + penalty @ gamma, -share @ moved + 2 * penalty

    options = {"ftol": 0, "gtol": 1e-12, "maxiter": 20000, "maxfun": 50000, "maxcor": 30}
    return minimize(both, np.zeros(len(singular)), method="L-BFGS-B", jac=True, options=options).fun


def assert_same(some, others, tolerance=1e-8):
    for one, other in zip(some, others, strict=True):
        assert one.converged
        assert one.objective == pytest.approx(other.objective, rel=1e-10)
        np.testing.assert_allclose(one.beta, other.beta, rtol=0, atol=tolerance * np.abs(other.beta).max())
        np.testing.assert_allclose(one.left_out, other.left_out, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dim", [5, 60, 300])
@pytest.mark.parametrize(("norm", "scale"), [(1.0, 1.0), (100.0, 1.0), (300.0, 30.0)])
@pytest.mark.parametrize("regularization", [1e-1, 1e-7])
def test_every_group_is_within_a_millionth_of_scipy(dim, norm, scale, regularization):
    tasks = make_tasks(dim, norm, scale, seed=dim)
    for group, fit in zip(GROUPS, fits(tasks, GROUPS, regularization), strict=True):
        best = scipy_optimum(tasks, group, regularization)
        assert fit.converged
        assert fit.objective <= best * (1 + 1e-6)
        assert fit.objective == pytest.approx(objective(tasks, group, regularization, fit.beta), rel=1e-9)


@settings(max_examples=12, deadline=None)
@given(
    dim=st.integers(1, 40),
    exponent=st.floats(-8, 3),
    norm=st.sampled_from([1e-3, 1.0, 300.0, 1e4]),
    scale=st.sampled_from([0.1, 30.0]),
    seed=st.integers(0, 100),
)
def test_fits_are_those_of_numpy(dim, exponent, norm, scale, seed):
    """And their gradients vanish: by strong convexity an objective is within |gradient|²/4λ of its optimum."""
    regularization = 10.0**exponent
    tasks = make_tasks(dim, norm, scale, seed, np.float64)
    for group, fit in zip(GROUPS, fits(tasks, GROUPS, regularization), strict=True):
        rows, margins, weights, starts = stack_group(tasks, group)
        one = fit_margins(rows, margins, weights, regularization, starts=starts)
        assert fit.converged
        assert fit.objective <= one.objective * (1 + 1e-8)
        loss = MarginLoss(rows, starts, weights)
        slope = loss.gradient(loss.at(margins + rows @ fit.beta)) + 2 * regularization * fit.beta
        assert slope @ slope / (4 * regularization) <= 1e-6 * fit.objective or np.linalg.norm(slope) <= 1e-10 * norm


@pytest.mark.parametrize("dim", [5, 140])
def test_margins_of_examples_left_out_are_one_newton_step_away(dim):
    """Against the definition, with dense matrices and an inverse."""
    tasks = make_tasks(dim, norm=20.0, dtype=np.float64)
    for group, fit in zip(GROUPS, fits(tasks, GROUPS, 0.02), strict=True):
        rows, margins, weights, starts = stack_group(tasks, group)
        fitted, hessian, pieces = margins + rows @ fit.beta, 0.04 * np.eye(dim), []
        for weight, first, last in zip(weights, starts, [*starts[1:], len(rows)], strict=True):
            share = np.exp(-fitted[first:last]) / (1 + np.exp(-fitted[first:last]).sum())
            curvature = np.diag(share) - np.outer(share, share)
            pieces.append((weight, rows[first:last], share, curvature))
            hessian += weight * rows[first:last].T @ curvature @ rows[first:last]
        expected = []
        for (weight, mine, share, curvature), first in zip(pieces, starts, strict=True):
            a = weight * mine @ np.linalg.inv(hessian) @ mine.T
            step = np.linalg.solve(np.eye(len(share)) - a @ curvature, a @ share)
            expected += list(fitted[first : first + len(share)] - step)
        np.testing.assert_allclose(fit.left_out, expected, rtol=1e-7, atol=1e-7)


def test_converges_where_undamped_newton_diverges():
    generator = np.random.default_rng(3)
    rows = generator.normal(size=(30, 20)) * np.arange(1, 21) ** -0.5
    rows *= 100.0 / np.sqrt((rows**2).sum(axis=1).mean())
    margins, regularization = 10.0 * generator.normal(size=30), 1e-6
    task = make_task(rows, margins)
    fit = fits([task], [(0,)], regularization)[0]
    beta = np.zeros(20)
    for _ in range(30):
        fitted = margins + rows @ beta
        hessian = (rows.T * expit(fitted) * expit(-fitted)) @ rows / 30 + 2 * regularization * np.eye(20)
        beta -= np.linalg.solve(hessian, -rows.T @ expit(-fitted) / 30 + 2 * regularization * beta)
    assert objective([task], (0,), regularization, beta) > 10 * fit.objective
    assert fit.objective <= scipy_optimum([task], (0,), regularization) * (1 + 1e-6)


@pytest.mark.parametrize("regularization", [1e-2, 1e-10])
def test_separable_tasks(regularization):
    """The right side of every example is known, so that without a penalty β would have no end."""
    generator = np.random.default_rng(0)
    truth = generator.normal(size=30)
    tasks = []
    for _ in range(3):
        rows = generator.normal(size=(50, 30))
        tasks.append(make_task(rows * np.sign(rows @ truth)[:, None], np.zeros(50)))
    groups = [(0, 1, 2), (0,), (1, 2)]
    for group, fit in zip(groups, fits(tasks, groups, regularization), strict=True):
        assert fit.converged
        assert fit.objective <= scipy_optimum(tasks, group, regularization) * (1 + 1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("dim", "regularization"), [(30, 0.5), (200, 0.05), (30, 1e-6)])
def test_a_fit_does_not_depend_on_who_else_is_in_the_batch(dtype, dim, regularization):
    tasks = make_tasks(dim, norm=30.0, dtype=dtype)
    together = fits(tasks, GROUPS, regularization)
    assert_same(together, [fits(tasks, [group], regularization)[0] for group in GROUPS])
    assert_same(together, fits(tasks, GROUPS[::-1], regularization)[::-1])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_batches_by_memory_and_pieces_of_tasks_change_nothing(dtype, monkeypatch):
    tasks = make_tasks(140, norm=30.0, dtype=dtype)
    whole = fits(tasks, GROUPS, 0.05)
    assert_same(fits(tasks, GROUPS, 0.05, memory=1), whole)
    monkeypatch.setattr(batch_loss, "PIECE_ROWS", 7)
    monkeypatch.setattr(batch_loss, "BLOCK_BYTES", {"cpu": 2**18})
    # Other pieces make sums in other orders, which tells in float32.
    assert_same(fits(tasks, GROUPS, 0.05), whole, 1e-8 if dtype is np.float64 else 1e-5)


def wide(tasks):
    return [replace(task, train_features=task.train_features.astype(np.float64)) for task in tasks]


def test_memory_bounds_a_batch(monkeypatch):
    tasks = make_tasks(100)
    sizes = []
    solve = BatchedFits._solve

    def counted(self, groups, alone):
        sizes.append(len(groups))
        return solve(self, groups, alone)

    monkeypatch.setattr(BatchedFits, "_solve", counted)
    monkeypatch.setattr(batched, "BLOCK_BYTES", {"cpu": 0})
    monkeypatch.setattr(batched, "PIECE_ROWS", 0)
    one = batched.MATRICES * 8 * 100**2 + 8 * batched.VECTORS * (4 * 25 + 40 + 60 + 9 + 100)
    fits(tasks, GROUPS, 1e-4, memory=2 * one)
    assert max(sizes) <= 3
    assert sum(sizes) == 8  # the four tasks alone, and the groups of several
    assert len(sizes) < 8


def test_float32_where_it_may_be_trusted():
    tasks = make_tasks(40, norm=10.0)
    solver = BatchedFits(tasks, lambda group: {1: 1e-9}.get(group[0], 0.1))
    assert [str(solver._work(group)) for group in ((0, 2), (1, 2))] == ["torch.float32", "torch.float64"]
    for one, two in zip(fits(tasks, GROUPS, 0.1), fits(wide(tasks), GROUPS, 0.1), strict=True):
        assert one.objective == pytest.approx(two.objective, rel=1e-10)
        np.testing.assert_allclose(one.beta, two.beta, atol=1e-8 * np.abs(two.beta).max())
        np.testing.assert_allclose(one.left_out, two.left_out, rtol=1e-4, atol=1e-4)


def test_refuses_devices_and_penalties_that_are_none():
    tasks = make_tasks(5)
    for device in ("abacus", "meta"):
        with pytest.raises(ValueError, match=device):
            BatchedFits(tasks, lambda group: 1.0, device)
    for regularization in (0.0, np.nan):
        with pytest.raises(ValueError, match="regularization"):
            fits(tasks, GROUPS, regularization)


def test_features_of_zero_can_be_fitted():
    task = make_task(np.zeros((4, 3), np.float32), np.ones(4))
    fit = fits([task, task], [(0, 1)], 1.0)[0]
    assert fit.converged
    np.testing.assert_array_equal(fit.beta, 0.0)
    np.testing.assert_allclose(fit.left_out, 1.0)


def assert_estimates_agree(some, others, tolerance):
    for one, other in zip(some, others, strict=True):
        assert (one.members, one.regularization) == (other.members, other.regularization)
        for half in ("search", "report"):
            for a, b in zip(one.half(half), other.half(half), strict=True):
                assert a.loss == pytest.approx(b.loss, abs=tolerance)
                assert a.accuracy == pytest.approx(b.accuracy, abs=0.01)


@pytest.mark.parametrize("labels", [2, 3])
def test_estimates_are_those_of_numpy(labels):
    tasks, _ = planted_tasks(6, 2, train=60, validation=41, dim=50, labels=labels, norm=30.0, seed=1)
    groups = [*sample_subsets(6, 12, 3, 0), (4,), range(6), (4,)]
    make = partial(Estimator, tasks, TrainingConfig(min_steps=0), 0.1)
    estimator = make(device="cpu")
    found = estimator.groups(groups)
    assert_estimates_agree(found, make().groups(groups), 1e-6)
    assert_estimates_agree(found, [make(device="cpu").group(group) for group in groups], 1e-9)
    assert estimator.fits == len(groups) - 1
    assert estimator.flops == sum({estimate.members: estimate.flops for estimate in found}.values())
    assert estimator.groups(groups) == found
    assert pickle.loads(pickle.dumps(estimator)).groups(groups) == found


def test_operations_are_counted_as_in_numpy():
    tasks, _ = planted_tasks(4, 2, train=80, validation=20, dim=40, norm=30.0)
    group = (0, 1, 3)
    numpy, torch = (Estimator(tasks, TrainingConfig(), 0.5, device=device) for device in (None, "cpu"))
    assert 0.5 * numpy.group(group).flops < torch.group(group).flops < 2.0 * numpy.group(group).flops


@pytest.mark.gpu
def test_a_gpu_gives_what_a_cpu_gives():
    tasks = make_tasks(200, norm=30.0)
    assert_same(fits(tasks, GROUPS, 0.05, device="cuda"), fits(wide(tasks), GROUPS, 0.05))
    assert_same(fits(tasks, GROUPS, 0.05, device="cuda"), fits(tasks, GROUPS, 0.05, device="cuda", memory=1))
    planted, _ = planted_tasks(6, 2, train=60, validation=41, dim=50, norm=30.0, seed=1)
    subsets = sample_subsets(6, 12, 3, 0)
    found = (Estimator(planted, TrainingConfig(), 0.1, device=device).groups(subsets) for device in ("cuda", None))
    assert_estimates_agree(*found, 1e-6)


def test_batches_weigh_examples_as_the_sampler_draws_them():
    tasks = planted_tasks(4, 2, train=30, validation=20, dim=12, labels=3, seed=2)[0]
    small = planted_tasks(4, 2, train=12, validation=20, dim=12, labels=3, seed=3)[0]
    tasks = [*tasks[:2], *small[:2]]
    groups = [(0, 2), (0, 1, 3), (2, 3)]
    found = {}
    for sampling in ("examples", "tasks"):
        training = TrainingConfig(min_steps=0, sampling=sampling)
        alone, batched = (Estimator(tasks, training, 0.1, device=device).groups(groups) for device in (None, "cpu"))
        for one, other in zip(alone, batched, strict=True):
            for a, b in zip(one.search, other.search, strict=True):
                assert b.loss == pytest.approx(a.loss, rel=1e-6)
        found[sampling] = [each.search[0].loss for each in batched]
    assert abs(found["tasks"][0] - found["examples"][0]) > 1e-4  # groups of unequal tasks differ
    assert found["tasks"][2] == pytest.approx(found["examples"][2], rel=1e-9)  # equal ones do not
