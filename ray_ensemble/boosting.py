"""Boosting, in the ensemble stage: the worst group's residual becomes an adapter, as long as validation gains.

A booster serves the datasets of its group. Those of which validation does not say that it helps skip it, and its passes.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax

from ray_ensemble.ensemble import (
    ScoreRequest,
    best_step,
    booster_scores,
    combine,
    label_losses,
    learn_step_sizes,
    score_all,
)
from ray_ensemble.ensemble.weights import LearnedSteps
from ray_ensemble.estimator import TaskFeatures, validation_halves
from ray_ensemble.evaluation import forward_flops, training_flops
from ray_ensemble.files import whole_folder
from ray_ensemble.gradients.lifting import lift_group, save_moved
from ray_ensemble.progress import console
from ray_ensemble.tasks import EncodedExample, EncodedTask
from ray_ensemble.training import AdapterJob, train_adapters
from ray_ensemble.training.boosting import ResidualFit, fit_residual, group_loss, residuals, worst_group

if TYPE_CHECKING:
    from ray_ensemble.stages import Stages

Scores = NDArray[np.float64]

SAMPLE = 64  # training examples of each dataset that the group is picked by
DISTANCE = 0.02  # of a group's first booster from θ₀ at most, relative to ‖θ₀‖: near enough for the first order to hold


@dataclass
class Boosted:
    """What boosting did: the boosters kept, what each dataset uses of them, each step's figures, why it ended, and its cost."""

    adapters: list[str] = field(default_factory=list)
    boosters: dict[str, list[str]] = field(default_factory=dict)
    step_sizes: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    stopped: str | None = None
    files: list[Path] = field(default_factory=list)
    flops: float = 0.0
    peak_memory_bytes: int = 0

    def described(self) -> dict[str, Any]:
        """What `ensemble.json` says about it."""
        return {key: getattr(self, key) for key in ("adapters", "boosters", "step_sizes", "history", "stopped")}


@dataclass
class _Dataset:
    """One dataset in boosting: its scores under the ensemble without boosters, and what its boosters add at step size 1."""

    task: EncodedTask
    examples: tuple[EncodedExample, ...]  # of training, those that have gradients
    features: TaskFeatures  # validation: the half that the weights are fitted on
    scores: Scores  # (V, K)
    train_scores: Scores  # (n, K): of the first n examples
    added: Scores | float = 0.0  # (V, K)
    train_added: Scores | float = 0.0
    step: float = 0.0
    held_out_loss: float | None = None  # nats, under step sizes that have not seen the example; None before any booster

    @property
    def labels(self) -> NDArray[np.int64]:
        """Labels (n,) of the training examples that are scored."""
        return np.array([example.label for example in self.examples[: len(self.train_scores)]])

    def linear(self, beta: Scores) -> tuple[Scores, Scores]:
        """What a booster of β adds to first order to the validation scores (V, K) and to the training scores (n, K)."""
        wrong = np.arange(self.train_scores.shape[1])[None, :] != self.labels[:, None]
        rows = (self.features.train_features @ beta).reshape(self.features.examples, -1)
        train = np.zeros(self.train_scores.shape)
        train[wrong] = np.broadcast_to(-rows, (len(rows), wrong.shape[1] - 1)).ravel()
        return self.features.validation_features @ beta, train

    @property
    def train_boosted(self) -> Scores:
        """(n, K)."""
        return self.train_scores + self.step * self.train_added

    @property
    def train_losses(self) -> Scores:
        """(n,) in nats."""
        return label_losses(self.train_boosted, self.labels)

    @property
    def validation_loss(self) -> float:
        """In nats, cross-fitted where there are boosters."""
        if self.held_out_loss is not None:
            return self.held_out_loss
        return float(label_losses(self.scores, self.features.validation_labels).mean())


def boost(stages: Stages, weights: Mapping[str, Scores], scores: Mapping[str, Scores]) -> Boosted:
    """Make up to `boosting.steps` boosters.

    Args:
        stages: of a run whose groups are trained.
        weights: of each dataset (m,) over the groups' adapters, times its scale.
        scores: ensemble scores (V, K) of the half of each dataset's validation examples that the weights are fitted on.
    """
    return _Boosting(stages, weights, scores).run()


class _Boosting:
    def __init__(self, stages: Stages, weights: Mapping[str, Scores], scores: Mapping[str, Scores]) -> None:
        self.stages, self.weights = stages, weights
        self.settings, self.sampling = stages.config.boosting, stages.config.training.sampling
        self.done = Boosted()
        self.factors: dict[int, float] = {}  # of a group's first fit, for one step size to suit all of its boosters
        self.data: dict[str, _Dataset] = {}
        examples = {f.name: stages.task(f.name)["train"][: f.examples] for f in stages.features()}
        sampled = self._ensemble_scores({name: found[:SAMPLE] for name, found in examples.items()})
        for features in stages.features():
            name = features.name
            half = validation_halves(len(features.validation_labels))[1]
            held_out = replace(
                features,
                validation_scores=features.validation_scores[half],
                validation_features=features.validation_features[half],
                validation_labels=features.validation_labels[half],
            )
            self.data[name] = _Dataset(stages.task(name), examples[name], held_out, scores[name], sampled[name])

    def run(self) -> Boosted:
        while len(self.done.adapters) < self.settings.steps and self.done.stopped is None:
            self._step()
        for name, data in self.data.items():
            if data.step > 0:
                own = self.stages.own_group(name)
                used = [row["adapter"] for row in self.done.history if row["kept"] and row["group"] == own]
                self.done.boosters[name], self.done.step_sizes[name] = used, data.step
        return self.done

    def _step(self) -> None:
        losses = {name: data.train_losses for name, data in self.data.items()}
        counts = {name: len(data.task["train"]) for name, data in self.data.items()}
        group = worst_group(losses, counts, self.stages.partition, self.sampling)
        members = self.stages.partition[group]
        self._score_rest(members)
        name = f"booster-{len(self.done.adapters)}"
        target = self.stages.adapter_folder(name)
        before = self._losses(members)
        row: dict[str, Any] = {"adapter": name, "group": group, "kept": False}
        self.done.history.append(row)
        by_ridge = self.settings.method == "ridge"
        start_scores = self._lifted(group, members, target, row) if by_ridge else self._trained(members, target, row)
        if start_scores is None:
            self.done.stopped = f"to first order no booster lowers the validation loss of group {group}"
            return
        previous = {task: replace(self.data[task]) for task in members}
        for task, (train, validation) in self._added(members, target, start_scores).items():
            data = self.data[task]
            data.added, data.train_added = data.added + validation, data.train_added + train
        datasets = [self.data[task] for task in members]
        fitted = _step_sizes(datasets, [(np.asarray(d.added), np.asarray(d.train_added)) for d in datasets])
        for data, step, loss in zip(datasets, fitted.steps, fitted.losses, strict=True):
            data.step, data.held_out_loss = step, loss
        after = self._losses(members)
        row |= {"step_sizes": {task: self.data[task].step for task in members}, "shrinkage": fitted.choice.described()}
        row |= {key: [before[key], after[key]] for key in before}
        console.print(
            f"  {name} for group {group}: training loss {before['train_loss']:.4f} -> {after['train_loss']:.4f}, "
            f"validation {before['validation_loss']:.4f} -> {after['validation_loss']:.4f}",
            markup=False,
        )
        if after["validation_loss"] < before["validation_loss"]:
            row["kept"] = True
            self.done.adapters.append(name)
            self.done.files += sorted(target.iterdir())
            return
        self.data.update(previous)
        shutil.rmtree(target)
        self.done.stopped = f"{name} did not lower the validation loss of group {group}"

    def _lifted(
        self, group: int, members: Sequence[str], target: Path, row: dict[str, Any]
    ) -> dict[str, NDArray[np.float32]] | None:
        """Write the booster of a group by lifting a ridge fit; scores (N, K) at θ₀ of its training examples.

        None if it promises nothing.
        """
        datasets = [self.data[task] for task in members]
        known = self.factors.get(group)
        fit = self._fit(datasets, 1.0 if known is None else known)
        self.done.flops += fit.flops
        row |= {"regularization": fit.regularization, "estimated_validation_loss": fit.judged}
        if not fit.judged < float(np.mean([data.validation_loss for data in datasets])):
            return None
        stages = self.stages
        lifted = lift_group(
            [data.task for data in datasets], fit.shares, stages.spec, stages.config.gradients, stages.base_hashes
        )
        # As far as is best to first order, so that step sizes are about 1, but no farther than that holds.
        best = float(np.mean(_promise(datasets, fit.beta, 1.0).steps)) if known is None else known
        factor, distance = save_moved(stages.start, lifted.delta, target, best, DISTANCE if known is None else None)
        self.factors[group], row["distance"] = factor, distance
        self.done.flops += training_flops(stages.size(), lifted.tokens)
        self.done.peak_memory_bytes = max(self.done.peak_memory_bytes, lifted.peak_memory_bytes)
        return dict(zip(members, lifted.scores, strict=True))

    def _trained(self, members: Sequence[str], target: Path, row: dict[str, Any]) -> dict[str, NDArray[np.float32]]:
        """Write the booster of a group by a short training on the loss of the ensemble with it; scores as `_lifted`."""
        stages, steps = self.stages, self.settings.train_steps
        datasets = [self.data[task] for task in members]
        start = self._score(
            [ScoreRequest(stages.start, data.task, data.examples) for data in datasets], "training scores at the start"
        )
        tasks = [
            replace(data.task, splits={**data.task.splits, "train": _offset(data, scores)})
            for data, scores in zip(datasets, start, strict=True)
        ]
        # Validation examples have no offsets: what an early stop would look at is not the ensemble's loss.
        training = stages.config.training.model_copy(update={"early_stop": None})
        job = AdapterJob(target.name, tuple(members), steps, training.seed)
        config = stages.config.model_copy(update={"training": training})
        model = asdict(stages.spec)
        trained = train_adapters([job], tasks, config, stages.folder.path, model, stages.base_hashes)[target.name]
        with whole_folder(target) as temporary:
            for file in trained.folder.iterdir():
                shutil.copy(file, temporary / file.name)
        row["steps"] = trained.steps
        self.done.flops += training_flops(stages.size(), trained.tokens)
        self.done.peak_memory_bytes = max(self.done.peak_memory_bytes, trained.peak_memory_bytes)
        return dict(zip(members, start, strict=True))

    def _fit(self, datasets: Sequence[_Dataset], factor: float) -> ResidualFit:
        wanted = [
            residuals(data.train_boosted, data.labels, len(data.features.train_features) // data.features.examples)
            for data in datasets
        ]
        chosen = self.settings.regularization
        return fit_residual(
            [data.features for data in datasets],
            wanted,
            self.sampling,
            lambda beta: float(np.mean(_promise(datasets, beta, factor).losses)),
            None if chosen == "auto" else chosen,
        )

    def _added(
        self, members: Sequence[str], target: Path, start: Mapping[str, NDArray[np.float32]]
    ) -> dict[str, tuple[Scores, Scores]]:
        """What a booster adds at step size 1 to the scores of the members' training and validation examples."""
        held_out = {task: self.stages.held_out(task) for task in members}
        requests = [
            ScoreRequest(target, self.data[task].task, examples)
            for task in members
            for examples in (self.data[task].examples, held_out[task])
        ]
        found = iter(self._score(requests, "booster scores"))
        return {
            task: (
                booster_scores(next(found)[None], start[task]),
                booster_scores(next(found)[None], self.data[task].features.validation_scores),
            )
            for task in members
        }

    def _score_rest(self, members: Sequence[str]) -> None:
        """Ensemble scores of those training examples of a group that have none yet."""
        rest = {task: self.data[task].examples[len(self.data[task].train_scores) :] for task in members}
        for task, scores in self._ensemble_scores({task: found for task, found in rest.items() if found}).items():
            self.data[task].train_scores = np.concatenate([self.data[task].train_scores, scores])

    def _ensemble_scores(self, examples: Mapping[str, tuple[EncodedExample, ...]]) -> dict[str, Scores]:
        """Scores (n, K) of the ensemble without boosters."""
        used = {task: [g for g, weight in enumerate(self.weights[task]) if weight > 0] for task in examples}
        adapters = [self.stages.adapter_folder(name) for name in self.stages.members]
        requests = [
            ScoreRequest(adapters[g], self.stages.task(task), found)
            for task, found in examples.items()
            for g in used[task]
        ]
        scored = iter(self._score(requests, "training scores"))
        return {
            task: combine(np.stack([next(scored) for _ in places]), self.weights[task][places])
            for task, places in used.items()
        }

    def _score(self, requests: Sequence[ScoreRequest], title: str) -> tuple[NDArray[np.float32], ...]:
        stages = self.stages
        scored = score_all(
            requests, stages.spec, stages.config.gradients, stages.base_hashes, stages.folder.path, title
        )
        self.done.flops += forward_flops(stages.size(), scored.tokens)
        self.done.peak_memory_bytes = max(self.done.peak_memory_bytes, scored.peak_memory_bytes)
        return scored.scores

    def _losses(self, members: Sequence[str]) -> dict[str, float]:
        """Mean training loss of a group as it is picked by, and the mean of its members' validation losses."""
        losses = {task: self.data[task].train_losses for task in members}
        counts = {task: len(self.data[task].task["train"]) for task in members}
        return {
            "train_loss": group_loss(losses, counts, members, self.sampling),
            "validation_loss": float(np.mean([self.data[task].validation_loss for task in members])),
        }


def _offset(data: _Dataset, start: NDArray[np.float32]) -> tuple[EncodedExample, ...]:
    """Training examples whose offsets make a model's score at θ₀ that of the ensemble so far."""
    offsets = data.train_boosted - log_softmax(start.astype(np.float64), axis=1)
    return tuple(
        replace(example, offsets=tuple(float(value) for value in row))
        for example, row in zip(data.examples, offsets, strict=True)
    )


def _step_sizes(datasets: Sequence[_Dataset], added: Sequence[tuple[Scores, Scores]]) -> LearnedSteps:
    """Step sizes where `added` is what boosters add at η = 1 to each dataset's validation (V, K) and training scores (n, K)."""
    return learn_step_sizes(
        [data.scores for data in datasets],
        [validation for validation, _ in added],
        [data.features.validation_labels for data in datasets],
        [best_step(data.train_scores, train, data.labels) for data, (_, train) in zip(datasets, added, strict=True)],
    )


def _promise(datasets: Sequence[_Dataset], beta: Scores, factor: float) -> LearnedSteps:
    """Step sizes and held-out losses to first order, if factor·β is added to what boosts the datasets already."""
    added = []
    for data in datasets:
        validation, train = data.linear(factor * beta)
        added.append((data.added + validation, data.train_added + train))
    return _step_sizes(datasets, added)
