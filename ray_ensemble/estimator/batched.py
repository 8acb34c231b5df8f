"""The fits of many groups at once, in torch, on a CPU or a GPU: what `fit.fit_margins` does for one group in numpy.

The objective, the models that a fit starts from and the safeguards are those of `fit`: Newton steps whose equations are solved
by conjugate gradients under a preconditioner, no step unsearched that moves a margin by more than `SAFE_MOVE`, an exact
Hessian at the end for examples left out. Every group of a batch has its own β, preconditioner, step length and end; one that
has ended leaves the batch.

A group's fit must not tell who else was in the batch, though products round otherwise in another company. So a fit goes on to
where rounding stops it (`FINE`), past the tolerance of `fit`; the exact Hessian is that of this point, and what is made of it in
float32 is made for one group at a time.

Preconditioners are explicit inverses of Cholesky factors: a product with each is all that an iteration costs, where solves
with one right-hand side are slow in batches on either device. On a CPU what need not be exact is made in float32 where λ allows,
as in `fit`; on a GPU, where a batch's size chooses the order of summation, all is float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from ray_ensemble.config import Sampling
from ray_ensemble.estimator.batch_loss import BLOCK_BYTES, PIECE_ROWS, BatchLoss, Margins, Point, TaskRows, task_rows
from ray_ensemble.estimator.budget import sampler_weights
from ray_ensemble.estimator.estimator import Group
from ray_ensemble.estimator.features import TaskFeatures
from ray_ensemble.estimator.fit import (
    ARMIJO,
    FORCING,
    HALVINGS,
    ITERATIONS,
    RIDGE,
    SAFE_MOVE,
    TOLERANCE,
    Fit,
    pass_limit,
)
from ray_ensemble.estimator.loss import ROUNDING, TRUSTED
from ray_ensemble.estimator.models import sampler_shares

FINE = 1e-12  # on half the squared decrement, relative to the objective: the step from there ends in rounding
FINEST_FORCING = 1e-8  # of the squared residual: float32 products reach no further
STALLED = 0.25  # of the decrement before: a near optimum that gets nearer more slowly is as near as rounding lets it be
LEAF = 64  # rows of a triangle that is inverted by substitution
MEMORY = 2**29  # bytes on a CPU
GPU_SHARE = 0.5  # of the free memory
MATRICES = 8  # of d × d held for a group at once, in the type of the work
VECTORS = 24  # of float64 held for every row of a group at once
TINY = float(np.finfo(np.float64).tiny)


@dataclass(frozen=True, eq=False)
class _Model:
    """A task's loss to second order (`fit.Model`) as tensors: `hessian` (d, d) float32 and `slope` (d,) float64."""

    hessian: Tensor
    slope: Tensor


class BatchedFits:
    """Fits groups of `features` on a `device`, "cpu" or "cuda", many at once.

    `regularization` gives the λ of a group of sorted task indices. `memory` bounds the bytes used beside the tasks' rows and
    models; by default 512 MiB on a CPU and half of what is free on a GPU; one group at a time is fitted whatever it needs. A
    task's model is made when a group of it is first fitted, and kept. Rows and models are on the device if that leaves half of
    the memory, else on the host. A device that is not there is a `ValueError`.
    """

    def __init__(
        self,
        features: Sequence[TaskFeatures],
        regularization: Callable[[Group], float],
        device: str = "cpu",
        memory: int | None = None,
        sampling: Sampling = "examples",
    ) -> None:
        kind = device.partition(":")[0]
        if kind not in BLOCK_BYTES or (kind == "cuda" and not torch.cuda.is_available()):
            raise ValueError(f"no device '{device}' to fit on; devices are cpu, and cuda where torch finds one")
        self._device = torch.device(device)
        self._features, self._regularization = tuple(features), regularization
        self._dim = self._features[0].dim
        self._memory = memory
        self._sampling = sampling
        self._rows: dict[int, list[TaskRows]] = {}
        self._models: dict[int, _Model] = {}
        self._alone: dict[int, Fit] = {}
        self._traces: dict[int, float] = {}
        kept = sum(task.train_features.nbytes + 4 * self._dim**2 for task in self._features)
        self._store = self._device if 2 * kept <= self._budget() else torch.device("cpu")

    def fit(self, groups: Sequence[Group]) -> Iterator[tuple[int, Fit]]:
        """Yield the place in `groups` and the fit of every group, as batches of them end.

        Groups are tuples of sorted task indices. A fit depends on the group alone, up to about 1e-9; the operations of a
        task's own fit hold those of its model. A λ that is not positive and finite is a `ValueError`.
        """
        unknown = {task for group in groups for task in group} - set(self._alone)
        for _, chosen in self._batches([(task,) for task in sorted(unknown)]):
            self._fit_alone([group[0] for group in chosen])
        several = [place for place, group in enumerate(groups) if len(group) > 1]
        for place, group in enumerate(groups):
            if len(group) == 1:
                yield place, self._alone[group[0]]
        for batch, chosen in self._batches([groups[place] for place in several]):
            fits, _ = self._solve(chosen, alone=False)
            yield from ((several[index], fit) for index, fit in zip(batch, fits, strict=True))

    def _fit_alone(self, tasks: Sequence[int]) -> None:
        """Fit tasks by themselves and keep their fits and models."""
        fits, hessians = self._solve([(task,) for task in tasks], alone=True)
        assert hessians is not None
        for task, fit, lower in zip(tasks, fits, hessians, strict=True):
            hessian = lower.tril() + lower.tril(-1).mT
            hessian.diagonal().add_(RIDGE * hessian.trace())
            beta = torch.tensor(fit.beta, device=self._device)
            slope = hessian.double() @ beta + 2.0 * self._regularization((task,)) * beta
            self._models[task] = _Model(hessian.float().to(self._store), slope)
            self._alone[task] = fit

    def _solve(self, groups: Sequence[Group], alone: bool) -> tuple[list[Fit], Tensor | None]:
        """The fits of a batch, and of tasks alone the Hessians of their losses there (lower triangles of (G, d, d))."""
        penalties = [self._regularization(group) for group in groups]
        if not all(np.isfinite(value) and value > 0 for value in penalties):
            raise ValueError(f"regularization must be positive and finite, not {penalties}")
        weights = [sampler_weights(self._features, group, self._sampling) for group in groups]
        tasks = {task for group in groups for task in group}
        rows = {task: self._task_rows(task) for task in tasks}
        loss = BatchLoss.of(rows, groups, weights, self._dim, self._device, self._work(groups[0]))
        penalty = torch.tensor(penalties, dtype=torch.float64, device=self._device)
        if alone:
            points = loss.at(loss.offsets())
            hessian, slope = loss.hessian(points), -loss.gradient(points)
        else:
            hessian, slope = self._summed(groups, loss.work)
        fits = _Solver(loss, penalty, hessian, slope).run()
        if not alone:
            return fits, None
        betas = torch.tensor(np.stack([fit.beta for fit in fits]), device=self._device)
        return fits, loss.hessian(loss.at(_plus(loss.offsets(), loss.times(betas))))

    def _summed(self, groups: Sequence[Group], work: torch.dtype) -> tuple[Tensor, Tensor]:
        """The models of groups, sums of their tasks': Hessians (G, d, d) of type `work` and slopes (G, d)."""
        dim = self._dim
        hessian = torch.zeros(len(groups), dim, dim, dtype=work, device=self._device)
        slope = torch.zeros(len(groups), dim, dtype=torch.float64, device=self._device)
        for place, group in enumerate(groups):
            for task, share in zip(group, sampler_shares(self._features, group, self._sampling), strict=True):
                model = self._models[task]
                hessian[place].add_(model.hessian.to(self._device, work), alpha=float(share))
                slope[place].add_(model.slope, alpha=float(share))
        return hessian, slope

    def _task_rows(self, task: int) -> list[TaskRows]:
        if task not in self._rows:
            self._rows[task] = task_rows(self._features[task], self._store)
        return self._rows[task]

    def _batches(self, groups: Sequence[Group]) -> Iterator[tuple[list[int], list[Group]]]:
        """Groups, and their places in the list, in batches of one type of work that fit the memory; in order within a type."""
        kinds: dict[torch.dtype, list[int]] = {}
        for place, group in enumerate(groups):
            kinds.setdefault(self._work(group), []).append(place)
        for work, places in kinds.items():
            budget = self._budget() - 3 * BLOCK_BYTES[self._device.type] - 24 * PIECE_ROWS * self._dim
            batch: list[int] = []
            held = 0
            for place in places:
                padded = sum(self._padded(task) for task in groups[place])
                need = MATRICES * work.itemsize * self._dim**2 + 8 * VECTORS * (padded + self._dim)
                if batch and held + need > budget:
                    yield batch, [groups[p] for p in batch]
                    batch, held = [], 0
                batch.append(place)
                held += need
            yield batch, [groups[p] for p in batch]

    def _padded(self, task: int) -> int:
        """Rows of a task when each example has as many as the longest."""
        return sum(piece.margins.numel() for piece in self._task_rows(task))

    def _budget(self) -> int:
        if self._memory is not None:
            return self._memory
        if self._device.type == "cpu":
            return MEMORY
        free, _ = torch.cuda.mem_get_info(self._device)
        idle = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return int(GPU_SHARE * (free + idle))

    def _work(self, group: Group) -> torch.dtype:
        """The type of a group's products that need not be exact, which must follow from the group alone."""
        narrow = (
            self._device.type == "cpu"
            and torch.get_float32_matmul_precision() == "highest"
            and all(self._features[task].train_features.dtype == np.float32 for task in group)
        )
        if narrow:
            shares = sampler_shares(self._features, group, self._sampling)
            trace = sum(share * self._largest_trace(task) for task, share in zip(group, shares, strict=True))
            narrow = ROUNDING * trace <= TRUSTED * 2.0 * self._regularization(group)
        return torch.float32 if narrow else torch.float64

    def _largest_trace(self, task: int) -> float:
        """A bound on the trace of the Hessian of a task's loss, whatever its margins."""
        if task not in self._traces:
            found = self._features[task]
            squares = np.einsum("ij,ij->i", found.train_features, found.train_features).astype(np.float64)
            largest = np.maximum.reduceat(squares, found.starts)
            lengths = np.diff(found.starts, append=len(squares))
            # p(1 − p) of an only row; the shares of several sum to one at most.
            each = np.where(lengths > 1, largest, 0.25 * largest)
            self._traces[task] = float(sampler_weights(self._features, (task,)) @ each)
        return self._traces[task]


@dataclass
class _State:
    """The groups that have not ended yet, a row each: `place` in the batch, β, `value` of the objective, `penalty` λ, the
    inverse of the preconditioner's lower Cholesky factor, the last `decrement`, steps taken, whether the preconditioner is the
    exact Hessian at this point, and floating-point operations spent."""

    place: Tensor
    beta: Tensor
    value: Tensor
    penalty: Tensor
    inverse: Tensor
    decrement: Tensor
    iterations: Tensor
    exact: Tensor
    flops: Tensor

    def select(self, keep: Tensor) -> _State:
        """The rows in `keep`."""
        return _State(*(getattr(self, field.name)[keep] for field in fields(self)))


class _Solver:
    """One batch from the minimum of its models, Hessians (G, d, d) and slopes (G, d), to the optimum."""

    def __init__(self, loss: BatchLoss, penalty: Tensor, hessian: Tensor, slope: Tensor) -> None:
        self.loss = loss
        count, dim, device = loss.groups, loss.dim, loss.device
        integers = torch.zeros(count, dtype=torch.int64, device=device)
        inverse = _inverse_factor(hessian, penalty)
        flops = 2.0 * dim**3 / 3 + 4.0 * loss.rows * dim
        never = torch.full_like(penalty, torch.inf)
        nothing = torch.zeros(count, dim, dtype=torch.float64, device=device)
        place = torch.arange(count, device=device)
        start = loss.offsets()
        self.state = _State(
            place, nothing, loss.value(start), penalty, inverse, never, integers, integers.bool(), flops
        )
        # At the minimum of the model, unless zero is better.
        beta = self._precondition(slope)
        fitted = _plus(start, loss.times(beta))
        value = loss.value(fitted) + penalty * beta.square().sum(1)
        better = value < self.state.value
        self.state.beta = torch.where(better[:, None], beta, nothing)
        self.state.value = torch.where(better, value, self.state.value)
        self.fitted = [
            torch.where(better[bucket.owner, None], new, old)
            for bucket, new, old in zip(loss.buckets, fitted, start, strict=True)
        ]

    def run(self) -> list[Fit]:
        """Step until every group has ended; the fits in the order of the groups."""
        fits: list[Fit | None] = [None] * self.loss.groups
        while self.loss.groups:
            state, loss = self.state, self.loss
            points = loss.at(self.fitted)
            gradient = loss.gradient(points) + 2.0 * state.penalty[:, None] * state.beta
            direction, solved = self._newton_direction(points, gradient)
            decrement = -(gradient * direction).sum(1)
            near = decrement <= 2.0 * TOLERANCE * state.value.clamp_min(TINY)
            fine = decrement <= 2.0 * FINE * state.value.clamp_min(TINY)
            moved = self._move(direction, decrement)
            state.iterations += 1
            state.flops += 4.0 * loss.rows * loss.dim
            settled = fine | (near & (decrement > STALLED * state.decrement)) | ~moved
            settled |= state.iterations >= ITERATIONS - 1
            state.decrement = decrement
            ended = state.exact & settled
            remade = ~ended & (settled | ~solved)
            state.exact = remade
            if bool(ended.any()):
                for place, fit in self._finish(ended, near):
                    fits[place] = fit
                remade = remade[~ended]
            if bool(remade.any()):
                self._factorise(remade)
        return [fit for fit in fits if fit is not None]

    def _finish(self, ended: Tensor, near: Tensor) -> list[tuple[int, Fit]]:
        """The fits of the groups that ended, which leave the batch."""
        host = ended.cpu().numpy()
        loss, (fitted,) = self.loss.select(host, self.fitted)
        done = self.state.select(ended)
        left_out = loss.by_group(loss.left_out(fitted, done.inverse))
        flops = done.flops + loss.rows * loss.dim**2
        columns = (done.place, done.beta, done.value, done.iterations, near[ended], flops)
        place, beta, value, iterations, converged, spent = (column.cpu().numpy() for column in columns)
        self.state = self.state.select(~ended)
        self.loss, (self.fitted,) = self.loss.select(~host, self.fitted)
        return [
            (
                int(place[i]),
                Fit(beta[i], float(value[i]), int(iterations[i]), bool(converged[i]), int(spent[i]), left_out[i]),
            )
            for i in range(loss.groups)
        ]

    def _factorise(self, which: Tensor) -> None:
        """Precondition the groups in `which` with their Hessian at this point."""
        loss, (fitted,) = self.loss.select(which.cpu().numpy(), self.fitted)
        hessian = loss.hessian(loss.at(fitted))
        self.state.inverse[which] = _inverse_factor(hessian, self.state.penalty[which])
        self.state.flops[which] += loss.rows * loss.dim * (loss.dim + 1) + 2.0 * loss.dim**3 / 3

    def _precondition(self, vectors: Tensor) -> Tensor:
        """Each vector (G, d) times the inverse of its group's preconditioner."""
        inverse = self.state.inverse
        # Vectors as rows: torch multiplies a batch of those fast, and of columns slowly.
        row = vectors[:, None].to(inverse.dtype)
        return torch.bmm(torch.bmm(row, inverse.mT), inverse)[:, 0].double()

    def _newton_direction(self, points: list[Point], gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Solve the Newton equations by conjugate gradients from zero, as well as it is worth while.

        Returns directions (G, d), and whether few passes were enough (G,).
        """
        loss, state = self.loss, self.state
        penalty = 2.0 * state.penalty[:, None]
        direction = torch.zeros_like(gradient)
        residual = -gradient
        search = towards = self._precondition(residual)
        square = (residual * towards).sum(1)
        wanted = (square / state.value.clamp_min(TINY)).clamp(FINEST_FORCING, FORCING**2) * square
        active = square > 0.0
        solved = ~active
        for _ in range(pass_limit(loss.dim)):
            seen = loss.times(search, loss.work)
            pushed = loss.transposed(loss.curved(points, seen), loss.work) + penalty * search
            curvature = (search * pushed).sum(1)
            state.flops += active * (4.0 * loss.rows * loss.dim + 4.0 * loss.dim**2)
            positive = curvature > 0.0  # not of a gradient of zero, or of one lost in rounding
            solved |= active & ~positive
            active &= positive
            length = torch.where(active, square / curvature, 0.0)[:, None]
            direction += length * search
            residual -= length * pushed
            towards = self._precondition(residual)
            before, square = square, (residual * towards).sum(1)
            done = active & (square <= wanted)
            solved |= done
            active &= ~done
            if not bool(active.any()):
                break
            search = towards + torch.where(active, square / before, 0.0)[:, None] * search
        return direction, solved

    def _move(self, direction: Tensor, decrement: Tensor) -> Tensor:
        """Go along the directions, each group as far as `fit` says; False where nothing lowers the objective in float64."""
        loss, state = self.loss, self.state
        along = loss.times(direction)
        first = 2.0 * state.penalty * (state.beta * direction).sum(1)
        second = state.penalty * direction.square().sum(1)
        base = state.penalty * state.beta.square().sum(1)

        def objective(step: float) -> Tensor:
            return loss.value(_plus(self.fitted, along, step)) + (base + step * first + step**2 * second)

        safe = loss.largest(along) <= SAFE_MOVE
        trial = objective(1.0)
        length, best = torch.where(safe, 1.0, 0.0).double(), torch.where(safe, trial, state.value)
        searched, step = ~safe, 1.0
        for _ in range(HALVINGS):
            if not bool(searched.any()):
                break
            searched &= ~((length > 0.0) & (trial >= best))
            lower = searched & (trial <= state.value - ARMIJO * step * decrement)
            length, best = torch.where(lower, step, length), torch.where(lower, trial, best)
            step /= 2.0
            trial = objective(step)
        state.beta = state.beta + length[:, None] * direction
        state.value = best
        self.fitted = [
            old + length[bucket.owner, None] * moved
            for bucket, old, moved in zip(loss.buckets, self.fitted, along, strict=True)
        ]
        return length > 0.0


def _plus(margins: Margins, along: Margins, step: float = 1.0) -> Margins:
    return [old + step * moved for old, moved in zip(margins, along, strict=True)]


def _inverse_factor(hessian: Tensor, penalty: Tensor) -> Tensor:
    """The inverses of the lower Cholesky factors of H + 2λI, (G, d, d); of H only the lower triangle is read."""
    trace = hessian.diagonal(dim1=1, dim2=2).sum(1, dtype=torch.float64)
    # The trace only matters where λ is lost in rounding: any positive definite matrix gives a descent direction.
    shift = 2.0 * penalty + 1e-14 * trace
    while True:
        whole = hessian.clone()
        whole.diagonal(dim1=1, dim2=2).add_(shift[:, None].to(hessian.dtype))
        factor, info = torch.linalg.cholesky_ex(whole)
        failed = info != 0
        if not bool(failed.any()):
            if factor.is_cuda:
                return _inverse(factor)
            return torch.cat([_inverse(one[None]) for one in factor])
        shift = torch.where(failed, 100.0 * shift, shift)


def _inverse(lower: Tensor) -> Tensor:
    """Inverses of lower triangular matrices (G, k, k), by halves: most of it is products of matrices."""
    size = lower.shape[1]
    if size <= LEAF:
        eye = torch.eye(size, dtype=lower.dtype, device=lower.device)
        leaf: Tensor = torch.linalg.solve_triangular(lower, eye.expand_as(lower), upper=False)
        return leaf
    half = size // 2
    found = torch.zeros_like(lower)
    found[:, :half, :half] = _inverse(lower[:, :half, :half])
    found[:, half:, half:] = _inverse(lower[:, half:, half:])
    found[:, half:, :half] = -found[:, half:, half:] @ (lower[:, half:, :half] @ found[:, :half, :half])
    return found
