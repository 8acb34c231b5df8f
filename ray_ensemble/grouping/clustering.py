"""First partitions from an affinity: semidefinite relaxation (Li et al. 2025, section 3.3) and spectral clustering.

All take a symmetric (n, n) matrix with zero diagonal, positive where tasks help each other (`Affinity.symmetric`). With m
given they return exactly m non-empty groups. `cluster_sdp_penalty` chooses m: the trace of the relaxation's X, which for a
partition is its number of groups, is penalised there instead of fixed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans, SpectralClustering

from ray_ensemble.errors import InputError, RunError
from ray_ensemble.grouping.partitions import Matrix, Partition, from_labels

INTERIOR_POINT_TASKS = 30  # the interior-point solver takes seconds above this; the first-order one stays fast
SDP_TASKS = 120  # above this the relaxation takes minutes, and the local search does the work anyway
RESTARTS = 10
PENALTIES = (0.0, 0.05, 0.1, 0.2, 0.4, 0.8)  # μ as parts of the penalty at which all tasks are in one group


def cluster_sdp(affinity: Matrix, m: int, seed: int, restarts: int = RESTARTS) -> Partition:
    """Maximise the average in-group density by its semidefinite relaxation, rounded by k-means on the rows of X.

    More groups than tasks is an `InputError`; a solver that fails a `RunError`; a matrix that is not square,
    symmetric and finite a `ValueError`. Deterministic in its arguments; the relaxation is solved once per (affinity,
    m) in a process.
    """
    trivial = _trivial(affinity, m)
    return trivial or _round(relaxation(affinity, m), m, seed, restarts)


def cluster_spectral(affinity: Matrix, m: int, seed: int, restarts: int = RESTARTS) -> Partition:
    """Spectral clustering on the graph of the affinities, shifted and scaled to [0, 1]. Errors as for `cluster_sdp`."""
    trivial = _trivial(affinity, m)
    if trivial:
        return trivial
    away = ~np.eye(len(affinity), dtype=bool)
    # Zero is the effect of an average partner: negative affinities are no edges rather than weak ones. A trace of the
    # shifted values keeps the graph connected and orders the pairs that hurt each other.
    low, high = affinity[away].min(), affinity[away].max()
    shifted = (affinity - low) / (high - low) if high > low else np.ones_like(affinity)
    positive = np.maximum(affinity, 0.0) / high if high > 0 else np.zeros_like(affinity)
    graph = np.where(away, 0.95 * positive + 0.05 * shifted, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model = SpectralClustering(m, affinity="precomputed", random_state=_sklearn_seed(seed), n_init=restarts)
        labels = model.fit_predict(graph)
    return _repair(labels, affinity, m)


def cluster_sdp_penalty(
    affinity: Matrix,
    counts: Collection[int],
    seed: int,
    objective: Callable[[Partition], float],
    restarts: int = RESTARTS,
) -> Partition:
    """The trace-penalised relaxation, which chooses the number of groups, at several penalties μ; the best by `objective`.

    With every task alone the density is zero, and it grows as long as groups are joined whose tasks help each other, so μ = 0
    is the neutral penalty. From μ = `largest_penalty` on the solution is one group of everything. μ goes through six values
    between; m is the trace of the solution rounded to the nearest of `counts` (the fewer of two), the partition is rounded as
    by `cluster_sdp`. Errors as for `cluster_sdp`; no counts are a `ValueError`.
    """
    if not counts:
        raise ValueError("no number of groups is allowed")
    for m in counts:
        _trivial(affinity, m)
    if len(affinity) == 1:
        return ((0,),)
    found: dict[Partition, None] = {}
    for part in PENALTIES:
        solution = penalised_relaxation(affinity, part * largest_penalty(affinity))
        m = _nearest(float(np.trace(solution)), counts)
        found[_trivial(affinity, m) or _round(solution, m, seed, restarts)] = None
    return min(found, key=lambda partition: (round(objective(partition), 9), partition))


def _nearest(trace: float, counts: Collection[int]) -> int:
    return min(counts, key=lambda count: (abs(count - trace), count))


def relaxation(affinity: Matrix, m: int) -> Matrix:
    """Solve max ⟨T, X⟩ over X ⪰ 0, X ≥ 0, Xe = e, trace X = m.

    A partition with indicators v_g is X = Σ_g v_g v_gᵀ/|g|. Returns X (n, n). A solver that fails is a `RunError`.
    """
    return _solve(np.ascontiguousarray(affinity, dtype=np.float64).tobytes(), len(affinity), groups=m)


def penalised_relaxation(affinity: Matrix, penalty: float) -> Matrix:
    """Solve max ⟨T, X⟩ − μ·trace X over X ⪰ 0, X ≥ 0, Xe = e; μ is `penalty`, in units of T.

    The trace, between 1 and n, is the number of groups where X is a partition. Returns and errors as for `relaxation`.
    """
    return _solve(np.ascontiguousarray(affinity, dtype=np.float64).tobytes(), len(affinity), penalty=penalty)


def largest_penalty(affinity: Matrix) -> float:
    """The μ from which on the penalised relaxation puts all tasks into one group; 0 or more.

    X = eeᵀ/n + Y with Y ⪰ 0 and Ye = 0, so that no Y pays as soon as μ is the largest eigenvalue of T on the complement of e.
    """
    n = len(affinity)
    centre = np.eye(n) - 1.0 / n
    return max(float(np.linalg.eigvalsh(centre @ affinity @ centre)[-1]), 0.0)


@lru_cache(maxsize=64)
def _solve(matrix: bytes, n: int, groups: int | None = None, penalty: float = 0.0) -> Matrix:
    import cvxpy

    values = np.frombuffer(matrix).reshape(n, n)
    variable = cvxpy.Variable((n, n), PSD=True)
    constraints = [variable >= 0, cvxpy.sum(variable, axis=1) == 1]
    if groups is not None:
        constraints.append(cvxpy.trace(variable) == groups)
    # Affinities are differences of losses, often of 1e-3: scaled, or the solver's absolute tolerances decide.
    scale = np.abs(values).max() or 1.0
    scaled = (values - penalty * np.eye(n)) / scale
    problem = cvxpy.Problem(cvxpy.Maximize(cvxpy.sum(cvxpy.multiply(scaled, variable))), constraints)
    first_order = (cvxpy.SCS, {"eps": 1e-4, "max_iters": 5000})
    solvers = [first_order] if n > INTERIOR_POINT_TASKS else [(cvxpy.CLARABEL, {}), first_order]
    outcomes = []
    for solver, options in solvers:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # "solution may be inaccurate": k-means rounds it anyway
                problem.solve(solver=solver, **options)
        except cvxpy.error.SolverError as error:
            outcomes.append(f"{solver}: {error}")
            continue
        if variable.value is not None and problem.status in (cvxpy.OPTIMAL, cvxpy.OPTIMAL_INACCURATE):
            solution = np.asarray(variable.value, dtype=np.float64)
            solution.flags.writeable = False
            return solution
        outcomes.append(f"{solver}: {problem.status}")
    which = "with penalised trace" if groups is None else f"for {groups} groups"
    raise RunError(f"the semidefinite relaxation {which} of {n} tasks was not solved ({'; '.join(outcomes)})")


def _trivial(affinity: Matrix, m: int) -> Partition | None:
    """Check the arguments; the only partition there is where m is 1 or n."""
    n = len(affinity)
    if affinity.shape != (n, n) or not np.isfinite(affinity).all() or not np.allclose(affinity, affinity.T):
        raise ValueError("an affinity to cluster must be square, finite and symmetric")
    if m > n:
        raise InputError(f"more groups than tasks: {m} groups of {n} tasks")
    if m < 1:
        raise ValueError(f"{m} groups")
    if m == 1:
        return (tuple(range(n)),)
    return tuple((task,) for task in range(n)) if m == n else None


def _round(solution: Matrix, m: int, seed: int, restarts: int) -> Partition:
    """k-means on the rows of X: tasks of one group have equal rows where the relaxation is tight."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # fewer distinct rows than groups: repaired below
        labels = KMeans(m, random_state=_sklearn_seed(seed), n_init=restarts).fit_predict(solution)
    return _repair(labels, solution, m)


def _repair(labels: NDArray[np.int_], similarity: Matrix, m: int) -> Partition:
    """Exactly m groups: while one is empty, the task least similar to the rest of its group leaves to fill it."""
    labels = np.asarray(labels).copy()
    for missing in sorted(set(range(m)) - set(labels.tolist())):
        ties = np.full(len(labels), np.inf)
        for task, label in enumerate(labels):
            others = np.flatnonzero(labels == label)
            others = others[others != task]
            if others.size:
                ties[task] = similarity[task, others].mean()
        labels[int(ties.argmin())] = missing
    return from_labels(labels)


def _sklearn_seed(seed: int) -> int:
    """Job seeds go to 2⁶³, sklearn's to 2³²."""
    return int(np.random.SeedSequence(seed).generate_state(1)[0])
