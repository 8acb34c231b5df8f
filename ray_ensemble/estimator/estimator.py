"""The estimate of a group, cached: what the affinity and the search ask for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ray_ensemble.config import TrainingConfig
from ray_ensemble.errors import InputError
from ray_ensemble.estimator.budget import first_rows, group_regularization, prediction_flops, stack_group
from ray_ensemble.estimator.features import TaskFeatures, validation_halves
from ray_ensemble.estimator.fit import Fit, Model, fit_margins, is_reduced
from ray_ensemble.estimator.models import sampler_shares, sum_models, task_model
from ray_ensemble.estimator.predict import Estimate, estimate_held_out, estimate_task

if TYPE_CHECKING:
    from ray_ensemble.estimator.batched import BatchedFits

Group = tuple[int, ...]
Metric = Literal["loss", "accuracy"]
Half = Literal["search", "report"]

LOSS_TIE_BREAK = 1e-4  # nats to accuracy: smaller than one example of any validation set in use, larger than rounding


@dataclass(frozen=True)
class GroupEstimate:
    """Estimates of the `members` (sorted task indices) of a group, in their order, on either validation half.

    `regularization` is the group's own λ, `steps` the Newton steps and `flops` the operations of fit and predictions; those of a
    task alone hold also the model of its loss that all its groups start from.
    """

    members: Group
    search: tuple[Estimate, ...]
    report: tuple[Estimate, ...]
    regularization: float
    steps: int
    flops: int

    def half(self, half: Half) -> tuple[Estimate, ...]:
        """The estimates on the half that serves the search, or on the one that is reported."""
        return self.search if half == "search" else self.report


class Estimator:
    """Estimates each task's loss and accuracy after fine-tuning one adapter on any group of tasks.

    `regularization` is λ_ref (see `budget`), more than 0. A group's estimate depends on the group alone: never on
    what was asked before, so that caches can be shared between processes. `cache` may be any mapping from sorted
    members to `GroupEstimate`. The object can be pickled if its cache can.

    With a `device`, "cpu" or "cuda", groups are fitted by `batched`, many at once in torch; without one by `fit`, one after
    another in numpy. Both reach the same optimum, and estimates that differ by less than 1e-6 of a nat. A device that is not
    there is a `ValueError` when the first group is asked for.
    """

    def __init__(
        self,
        features: Sequence[TaskFeatures],
        training: TrainingConfig,
        regularization: float,
        cache: MutableMapping[Group, GroupEstimate] | None = None,
        device: str | None = None,
    ) -> None:
        if not features:
            raise ValueError("an estimator needs at least one task")
        dims = {task.dim for task in features}
        if len(dims) > 1:
            raise InputError(f"the tasks' features differ in dimension: {sorted(dims)}; recompute the gradients")
        self.features = tuple(features)
        self.training = training
        self.regularization = regularization
        self.cache: MutableMapping[Group, GroupEstimate] = {} if cache is None else cache
        self.fits = 0
        self.flops = 0
        self._models: dict[int, tuple[Model, int]] = {}
        self._device = device
        self._batched: BatchedFits | None = None
        self._halves = [validation_halves(len(task.validation_labels)) for task in self.features]

    def __len__(self) -> int:
        return len(self.features)

    def fit(self, members: Iterable[int]) -> tuple[Fit, float]:
        """β of a group, not cached, and the λ that it was fitted with, in numpy. Members out of range are an `IndexError`."""
        group = self._group(members)
        regularization = self._regularization(group)
        rows, margins, weights, starts = stack_group(self.features, group, self.training.sampling)
        model = None
        if not is_reduced(*rows.shape):
            shares = sampler_shares(self.features, group, self.training.sampling)
            model = sum_models((self._model(task)[0] for task in group), shares)
        fit = fit_margins(rows, margins, weights, regularization, model, starts=starts)
        return fit, regularization

    def group(self, members: Iterable[int]) -> GroupEstimate:
        """Loss and accuracy of every member under the group's own β, on both halves; cached by members.

        `fits` and `flops` count only what this object computed itself.
        """
        return self.groups([members])[0]

    def groups(self, groups: Iterable[Iterable[int]]) -> list[GroupEstimate]:
        """The estimates of many groups, in their order, each as `group` gives it alone.

        To the last bit in numpy, where groups share the models of their tasks and are fitted one after another; with a device
        up to about 1e-9, since a product that serves several groups at once rounds otherwise than one that serves one.
        """
        found: dict[Group, GroupEstimate] = {}
        wanted = [self._group(members) for members in groups]
        missing = []
        for group in dict.fromkeys(wanted):
            known = self.cache.get(group)
            if known is None:
                missing.append(group)
            else:
                found[group] = known
        for group, estimate in self._estimates(missing):
            self.fits += 1
            self.flops += estimate.flops
            self.cache[group] = found[group] = estimate
        return [found[group] for group in wanted]

    def tasks(self, partition: Iterable[Iterable[int]], half: Half) -> list[Estimate]:
        """The estimate of every task under its own group, in the tasks' order.

        A partition that does not hold every task exactly once is a `ValueError`.
        """
        found: dict[int, Estimate] = {}
        count = 0
        for estimate in self.groups(partition):
            count += len(estimate.members)
            found.update(zip(estimate.members, estimate.half(half), strict=True))
        if count != len(self) or len(found) != len(self):
            raise ValueError(f"a partition must hold each of the {len(self)} tasks once")
        return [found[task] for task in range(len(self))]

    def objective(self, partition: Iterable[Iterable[int]], metric: Metric = "loss", half: Half = "search") -> float:
        """Mean over tasks of the estimated loss in nats (DESIGN section 2.5), the smaller the better.

        For `accuracy`: mean of 1 − accuracy, plus 1e-4 of the mean loss, which orders partitions of equal accuracy.
        """
        estimates = self.tasks(partition, half)
        loss = sum(estimate.loss for estimate in estimates) / len(estimates)
        if metric == "loss":
            return loss
        return sum(1.0 - estimate.accuracy for estimate in estimates) / len(estimates) + LOSS_TIE_BREAK * loss

    def _estimates(self, groups: Sequence[Group]) -> Iterator[tuple[Group, GroupEstimate]]:
        """The estimates of groups that no cache holds, as they are made."""
        if self._device is None:
            for group in groups:
                fit, _ = self.fit(group)
                more = self._model(group[0])[1] if len(group) == 1 else 0
                yield group, self._estimate(group, fit, more)
            return
        if self._batched is None:
            from ray_ensemble.estimator.batched import BatchedFits

            self._batched = BatchedFits(
                self.features, self._regularization, self._device, sampling=self.training.sampling
            )
        for place, fit in self._batched.fit(groups):
            yield groups[place], self._estimate(groups[place], fit, 0)

    def _estimate(self, group: Group, fit: Fit, more: int) -> GroupEstimate:
        """The estimate from a group's fit; `more` operations than those of fit and predictions were spent."""
        flops = fit.flops + more + sum(prediction_flops(self.features[task]) for task in group)
        firsts = first_rows(self.features, group)
        search = tuple(
            estimate_held_out(fit, first, self.features[task], self._halves[task][0])
            for task, first in zip(group, firsts, strict=True)
        )
        report = tuple(estimate_task(fit.beta, self.features[task], self._halves[task][1]) for task in group)
        return GroupEstimate(group, search, report, self._regularization(group), fit.iterations, flops)

    def _regularization(self, group: Group) -> float:
        return group_regularization(self.regularization, self.training, self.features, group)

    def _model(self, task: int) -> tuple[Model, int]:
        """The task's loss to second order and its operations, computed when first asked for."""
        if task not in self._models:
            self._models[task] = task_model(self.features, task, self._regularization((task,)))
        return self._models[task]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_models": {}, "_batched": None}  # d×d a task, and soon made again

    def _group(self, members: Iterable[int]) -> Group:
        group = tuple(sorted({int(task) for task in members}))
        if not group or group[0] < 0 or group[-1] >= len(self.features):
            raise IndexError(f"group {group} of {len(self.features)} tasks")
        return group
