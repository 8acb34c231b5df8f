"""The losses of many groups at once, in torch: `loss.MarginLoss` for a batch, on a CPU or a GPU.

Groups are unions of tasks, so every task's rows are held once; a product of the rows of a task with one vector for each of
the groups that hold it is a matrix product, which reads the rows once for all of them. What belongs to a pair of group and
example (margins, weights) lies in buckets, one for each number of rows an example, tasks in turn and in a task its groups.
An example with fewer rows than others of its task is filled up with rows of zeros whose margin is +inf: their softmax share
is zero, so they change nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ray_ensemble.estimator.features import TaskFeatures
from ray_ensemble.estimator.loss import Vector

PIECE_ROWS = 8192  # of a task that are widened at a time
STRIPS = 4  # of a symmetric or triangular product of matrices: its upper part is left out, 3/8 of the work
STRIP_DIM = 128  # below it there is nothing to save
# Of weighted rows at a time: enough to fill a GPU; on a CPU one group's, so that float32 rounds the same in any company.
BLOCK_BYTES = {"cpu": 1, "cuda": 2**28}

Margins = list[Tensor]  # a bucket each: (E, L) float64, pairs of group and example × rows an example


@dataclass(frozen=True, eq=False)
class TaskRows:
    """Some examples of a task: `features` (N, L, d) as stored, `margins` (N, L) float64, `kept` (N, L) bool where not all are."""

    features: Tensor
    margins: Tensor
    kept: NDArray[np.bool_] | None

    @property
    def rows(self) -> int:
        """Rows, those that fill up not counted."""
        return int(self.margins.numel() if self.kept is None else self.kept.sum())


def task_rows(task: TaskFeatures, device: torch.device) -> list[TaskRows]:
    """The training rows of a task on `device`, in pieces of about `PIECE_ROWS`; on a CPU only copied where they must be."""
    starts = task.starts
    lengths = np.diff(starts, append=len(task.train_features))
    longest = int(lengths.max())
    step = max(1, PIECE_ROWS // longest)
    pieces = []
    for first in range(0, len(starts), step):
        some = lengths[first : first + step]
        shape = (len(some), longest)
        rows = slice(int(starts[first]), int(starts[first]) + int(some.sum()))
        features, margins = np.ascontiguousarray(task.train_features[rows]), task.train_margins[rows].astype(np.float64)
        kept = None
        if some.min() < longest:
            kept = np.arange(longest) < some[:, None]
            wide, offsets = np.zeros((*shape, task.dim), features.dtype), np.full(shape, np.inf)
            wide[kept], offsets[kept] = features, margins
            features, margins = wide, offsets
        # torch cannot share what is not to be written, as arrays of Ray's store are.
        held = torch.as_tensor(features if features.flags.writeable else features.copy(), device=device)
        pieces.append(TaskRows(held.view(*shape, task.dim), torch.as_tensor(margins, device=device).view(shape), kept))
    return pieces


class Part(NamedTuple):
    """A piece of a task for the groups that hold it: `places` (n,) of these in the batch, on the host and on the device, and
    the first pair of its bucket."""

    task: int
    piece: int
    places: NDArray[np.int64]
    where: Tensor
    first: int


class Bucket(NamedTuple):
    """Pairs of group and example with L rows each: `owner` (E,) is the group, `weight` (E, 1), `offsets` (E, L)."""

    parts: list[Part]
    owner: Tensor
    weight: Tensor
    offsets: Tensor


class Point(NamedTuple):
    """What the derivatives share in a bucket: `share` p (E, L), `own` (E, L), p(1 − p) of an only row and p of one of several,
    and `right` (E, 1), the share of the right label."""

    share: Tensor
    own: Tensor
    right: Tensor


class BatchLoss:
    """Σ_x w_x log(1 + Σ_k exp(−f_k)) for each of G groups.

    `rows` are the pieces of every task that a group holds, on whatever device; all else is on `device`. `work` is the type of
    products that need not be exact: Hessians and their products with vectors. Everything else is float64.
    """

    def __init__(
        self,
        rows: Mapping[int, list[TaskRows]],
        buckets: list[Bucket],
        groups: int,
        dim: int,
        device: torch.device,
        work: torch.dtype,
    ) -> None:
        self._tasks, self.buckets, self.groups, self.dim = rows, buckets, groups, dim
        self.device, self.work = device, work
        counts = np.zeros(groups)
        for bucket in buckets:
            for part in bucket.parts:
                counts[part.places] += rows[part.task][part.piece].rows
        self.rows = torch.tensor(counts, device=device)  # (G,) float64, of the operations counted

    @classmethod
    def of(
        cls,
        rows: Mapping[int, list[TaskRows]],
        groups: Sequence[Sequence[int]],
        weights: Sequence[Vector],
        dim: int,
        device: torch.device,
        work: torch.dtype,
    ) -> BatchLoss:
        """The losses of `groups`, sorted task indices each; `weights` (N,) of each group's examples, its members' in turn."""
        holders: dict[int, list[tuple[int, int]]] = {}  # of a task: groups, and the task's first example in each
        for place, group in enumerate(groups):
            first = 0
            for task in group:
                holders.setdefault(task, []).append((place, first))
                first += sum(len(piece.margins) for piece in rows[task])
        by_length: dict[int, list[int]] = {}
        for task in sorted(holders):
            by_length.setdefault(rows[task][0].margins.shape[1], []).append(task)
        buckets = []
        for _, tasks in sorted(by_length.items()):
            parts, owners, shares, offsets, size = [], [], [], [], 0
            for task in tasks:
                places = np.array([place for place, _ in holders[task]], dtype=np.int64)
                where = torch.tensor(places, device=device)
                before = 0
                for index, piece in enumerate(rows[task]):
                    count = len(piece.margins)
                    parts.append(Part(task, index, places, where, size))
                    owners.append(np.repeat(places, count))
                    shares += [weights[p][first + before : first + before + count] for p, first in holders[task]]
                    offsets.append(piece.margins.to(device).repeat(len(places), 1))
                    before += count
                    size += count * len(places)
            owner = torch.tensor(np.concatenate(owners), device=device)
            weight = torch.tensor(np.concatenate(shares).astype(np.float64), device=device)[:, None]
            buckets.append(Bucket(parts, owner, weight, torch.cat(offsets)))
        return cls(rows, buckets, len(groups), dim, device, work)

    def select(self, keep: NDArray[np.bool_], *margins: Margins) -> tuple[BatchLoss, list[Margins]]:
        """The loss of the groups in `keep` (G,), and what there is of each of `margins` for them."""
        renumbered = np.cumsum(keep) - 1
        mask = torch.tensor(keep, device=self.device)
        numbers = torch.tensor(renumbered, device=self.device)
        buckets: list[Bucket] = []
        selected: list[Margins] = [[] for _ in margins]
        for index, bucket in enumerate(self.buckets):
            parts, size = [], 0
            for part in bucket.parts:
                places = renumbered[part.places[keep[part.places]]]
                if len(places):
                    where = torch.tensor(places, device=self.device)
                    parts.append(Part(part.task, part.piece, places, where, size))
                    size += len(places) * len(self._tasks[part.task][part.piece].margins)
            if parts:
                chosen = mask[bucket.owner]
                owner = numbers[bucket.owner[chosen]]
                buckets.append(Bucket(parts, owner, bucket.weight[chosen], bucket.offsets[chosen]))
                for found, every in zip(selected, margins, strict=True):
                    found.append(every[index][chosen])
        return BatchLoss(self._tasks, buckets, int(keep.sum()), self.dim, self.device, self.work), selected

    def offsets(self) -> Margins:
        """The margins of β = 0."""
        return [bucket.offsets for bucket in self.buckets]

    def times(self, vectors: Tensor, dtype: torch.dtype = torch.float64) -> Margins:
        """Each group's rows times its vector, (G, d) float64 → margins; the products made in `dtype`."""
        found = []
        narrow = vectors.to(dtype)
        for bucket in self.buckets:
            out = torch.empty_like(bucket.offsets)
            for part, rows, block in self._blocks(bucket, dtype):
                out[rows] = (narrow[part.where] @ block.flatten(0, 1).T).view(-1, block.shape[1])  # (n, d) @ (d, N·L)
            found.append(out)
        return found

    def transposed(self, margins: Margins, dtype: torch.dtype = torch.float64) -> Tensor:
        """Each group's rowsᵀ times its margins, (G, d) float64; the products made in `dtype` piece by piece."""
        total = torch.zeros(self.groups, self.dim, dtype=torch.float64, device=self.device)
        for bucket, values in zip(self.buckets, margins, strict=True):
            for part, rows, block in self._blocks(bucket, dtype):
                along = values[rows].view(len(part.places), -1).to(dtype)
                total[part.where] += along @ block.flatten(0, 1)  # (n, N·L) @ (N·L, d)
        return total

    def value(self, fitted: Margins) -> Tensor:
        """The losses at the fitted margins, (G,)."""
        total = torch.zeros(self.groups, dtype=torch.float64, device=self.device)
        for bucket, margins in zip(self.buckets, fitted, strict=True):
            odds = _odds(margins)
            each = bucket.weight * torch.logaddexp(odds, torch.zeros_like(odds))
            total.index_add_(0, bucket.owner, each[:, 0])
        return total

    def largest(self, margins: Margins) -> Tensor:
        """The largest absolute margin of each group, (G,)."""
        total = torch.zeros(self.groups, dtype=torch.float64, device=self.device)
        for bucket, values in zip(self.buckets, margins, strict=True):
            total.scatter_reduce_(0, bucket.owner, values.abs().amax(1), "amax")
        return total

    def at(self, fitted: Margins) -> list[Point]:
        """What the derivatives at the fitted margins need."""
        points = []
        for margins in fitted:
            odds = _odds(margins)
            right = torch.sigmoid(-odds)
            if margins.shape[1] == 1:
                share = torch.sigmoid(-margins)
                points.append(Point(share, share * right, right))
            else:
                share = torch.exp(-margins - torch.logaddexp(odds, torch.zeros_like(odds)))
                points.append(Point(share, share, right))
        return points

    def gradient(self, points: Sequence[Point]) -> Tensor:
        """Gradients of the losses in β, (G, d)."""
        pull = [bucket.weight * point.share for bucket, point in zip(self.buckets, points, strict=True)]
        return -self.transposed(pull)

    def curved(self, points: Sequence[Point], along: Margins) -> Margins:
        """Hessians of the losses in the margins, times `along`."""
        found = []
        for bucket, point, values in zip(self.buckets, points, along, strict=True):
            pushed = point.own * values
            if values.shape[1] > 1:
                pushed = pushed - point.share * pushed.sum(1, keepdim=True)
            found.append(bucket.weight * pushed)
        return found

    def hessian(self, points: Sequence[Point]) -> Tensor:
        """Hessians of the losses in β, (G, d, d) of type `work`: the lower triangles; what is above them is not defined.

        A group's rows times the roots of their curvature, times themselves. For several rows an example those are the rows
        less their mean φ̄ = Σ p φ, and one more that is −φ̄ with the share of the right label, so that nothing cancels.
        """
        total = torch.zeros(self.groups, self.dim, self.dim, dtype=self.work, device=self.device)
        for bucket, point in zip(self.buckets, points, strict=True):
            for part, rows, block in self._blocks(bucket, self.work):
                count, length, dim = block.shape
                for lot, some in self._lots(part, rows, count * (length + 1) * dim):
                    weight = bucket.weight[some].view(len(lot), count, 1)
                    own = torch.sqrt(weight * point.own[some].view(len(lot), count, length)).to(self.work)
                    if length == 1:
                        scaled = own * block[:, 0]  # (b, N, 1) * (N, d)
                    else:
                        share = point.share[some].view(len(lot), count, 1, length).to(self.work)
                        mean = share @ block  # (b, N, 1, L) @ (N, L, d)
                        right = torch.sqrt(weight * point.right[some].view(len(lot), count, 1)).to(self.work)
                        scaled = torch.cat([own[..., None] * (block - mean), right[..., None] * mean], 2).flatten(1, 2)
                    for i, j in strips(dim):
                        total[lot, i:j, :j] += torch.bmm(scaled[:, :, i:j].mT, scaled[:, :, :j])
        return total

    def left_out(self, fitted: Margins, inverse: Tensor) -> Margins:
        """Margins of each example under the fit without it, as `MarginLoss.left_out` has them.

        `inverse` (G, d, d) of type `work` is the inverse of the lower Cholesky factor of each objective's Hessian.
        """
        found = []
        for bucket, margins, point in zip(self.buckets, fitted, self.at(fitted), strict=True):
            out = margins.clone()
            for part, rows, block in self._blocks(bucket, self.work):
                count, length, dim = block.shape
                flat = block.flatten(0, 1)
                for lot, some in self._lots(part, rows, count * length * dim):
                    factor = inverse[lot]
                    gram = torch.zeros(len(lot) * count, length, length, dtype=torch.float64, device=self.device)
                    for i, j in strips(dim):
                        half = (flat[:, :j] @ factor[:, i:j, :j].mT).view(-1, length, j - i)  # (N·L, j) @ (b, j, w)
                        gram += half @ half.mT if length > 1 else half.square().sum(2, keepdim=True)
                    a = bucket.weight[some, :, None] * gram
                    p, right = point.share[some], point.right[some]
                    if length == 1:
                        leverage = a[:, :, 0]
                        out[some] -= leverage * p / (1.0 - leverage * p * right)
                        continue
                    curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
                    eye = torch.eye(length, dtype=torch.float64, device=self.device)
                    out[some] -= torch.linalg.solve(eye - a @ curvature, a @ p[:, :, None])[:, :, 0]
            found.append(out)
        return found

    def by_group(self, margins: Margins) -> list[Vector]:
        """The margins (M,) of each group, its members' rows in turn, without those that fill up."""
        found: list[list[tuple[int, int, Vector]]] = [[] for _ in range(self.groups)]
        for bucket, values in zip(self.buckets, margins, strict=True):
            host = values.cpu().numpy()
            for part in bucket.parts:
                piece = self._tasks[part.task][part.piece]
                count = len(piece.margins)
                for n, place in enumerate(part.places):
                    mine = host[part.first + n * count : part.first + (n + 1) * count]
                    found[place].append(
                        (part.task, part.piece, mine.ravel() if piece.kept is None else mine[piece.kept])
                    )
        return [np.concatenate([values for *_, values in sorted(parts, key=lambda p: p[:2])]) for parts in found]

    def _blocks(self, bucket: Bucket, dtype: torch.dtype) -> Iterator[tuple[Part, slice, Tensor]]:
        """The parts of a bucket, where each lies in it, and its rows (N, L, d) in `dtype`."""
        for part in bucket.parts:
            block = self._tasks[part.task][part.piece].features.to(self.device, dtype)
            yield part, slice(part.first, part.first + len(part.places) * len(block)), block

    def _lots(self, part: Part, rows: slice, numbers: int) -> Iterator[tuple[Tensor, slice]]:
        """The groups of a part some at a time, where each needs so many numbers of type `work`; and where these lie."""
        size = max(1, BLOCK_BYTES[self.device.type] // (numbers * self.work.itemsize))
        count = (rows.stop - rows.start) // len(part.places)
        for first in range(0, len(part.places), size):
            lot = part.where[first : first + size]
            begin = rows.start + first * count
            yield lot, slice(begin, begin + len(lot) * count)


def strips(dim: int) -> list[tuple[int, int]]:
    """Where a lower triangle is cut into strips of rows, of which only as many columns are needed."""
    cuts = [0, dim] if dim < STRIP_DIM else [dim * i // STRIPS for i in range(STRIPS + 1)]
    return list(pairwise(cuts))


def _odds(margins: Tensor) -> Tensor:
    """Log of the wrong labels' odds, (E, 1)."""
    return -margins if margins.shape[1] == 1 else torch.logsumexp(-margins, 1, keepdim=True)
