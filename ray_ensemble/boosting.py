"""Boosting, in the ensemble stage: the worst group's residual becomes an adapter, as long as validation gains.

A booster serves the datasets of its group. Those of which validation does not say that it helps skip it, and its passes.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ray_ensemble.ensemble import ScoreRequest, booster_scores, combine, fit_step_size, label_losses, score_all
from ray_ensemble.estimator import TaskFeatures, validation_halves
from ray_ensemble.evaluation import forward_flops, training_flops
from ray_ensemble.gradients.lifting import lift_group, save_moved
from ray_ensemble.progress import console
from ray_ensemble.tasks import EncodedExample, EncodedTask
from ray_ensemble.training.boosting import ResidualFit, fit_residual, group_loss, residuals, worst_group

if TYPE_CHECKING:
    from ray_ensemble.stages import Stages

Scores = NDArray[np.float64]

SAMPLE = 64  # training examples of each dataset that the group is picked by
DISTANCE = 0.05  # of a group's first lifted booster from θ₀, relative to ‖θ₀‖: near enough for the first order to hold


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

    @property
    def labels(self) -> NDArray[np.int64]:
        """Labels (n,) of the training examples that are scored."""
        return np.array([example.label for example in self.examples[: len(self.train_scores)]])

    @property
    def boosted(self) -> Scores:
        """(V, K)."""
        return self.scores + self.step * self.added

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
        """In nats."""
        return float(label_losses(self.boosted, self.features.validation_labels).mean())


def boost(stages: Stages, weights: Mapping[str, Sequence[float]], scores: Mapping[str, Scores]) -> Boosted:
    """Make up to `boosting.steps` boosters.

    Args:
        stages: of a run whose groups are trained.
        weights: of each dataset over the groups' adapters.
        scores: ensemble scores (V, K) of the half of each dataset's validation examples that the weights are fitted on.
    """
    return _Boosting(stages, weights, scores).run()


class _Boosting:
    def __init__(self, stages: Stages, weights: Mapping[str, Sequence[float]], scores: Mapping[str, Scores]) -> None:
        self.stages, self.weights = stages, weights
        self.settings, self.sampling = stages.config.boosting, stages.config.training.sampling
        self.done = Boosted()
        self.factors: dict[
            int, tuple[float, float]
        ] = {}  # group -> λ and scaling of its first booster, which all share
        self.data: dict[str, _Dataset] = {}
        shutil.rmtree(stages.folder / "boosters", ignore_errors=True)
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
        counts = {name: len(data.examples) for name, data in self.data.items()}
        group = worst_group(losses, counts, self.stages.partition, self.sampling)
        members = self.stages.partition[group]
        self._score_rest(members)
        name = f"booster-{len(self.done.adapters)}"
        target = self.stages.adapter_folder(name)
        before = self._losses(members)
        row: dict[str, Any] = {"adapter": name, "group": group, "kept": False}
        self.done.history.append(row)
        start_scores = self._make(group, members, target, row)
        added = self._added(members, target, start_scores)
        previous = {task: replace(self.data[task]) for task in members}
        for task, (train, validation) in added.items():
            data = self.data[task]
            data.added, data.train_added = data.added + validation, data.train_added + train
            data.step = fit_step_size(data.scores, data.added, data.features.validation_labels)
        after = self._losses(members)
        row |= {"step_sizes": {task: self.data[task].step for task in members}}
        row |= {key: [before[key], after[key]] for key in before}
        console.print(
            f"  {name} for group {group} ({', '.join(members)}): training loss {before['train_loss']:.4f} -> "
            f"{after['train_loss']:.4f}, validation {before['validation_loss']:.4f} -> {after['validation_loss']:.4f}",
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

    def _make(
        self, group: int, members: Sequence[str], target: Path, row: dict[str, Any]
    ) -> dict[str, NDArray[np.float32]]:
        """Write the booster of a group; scores (N, K) at θ₀ of its training examples."""
        fit = self._fit(group, members)
        stages = self.stages
        tasks = [self.data[task].task for task in members]
        lifted = lift_group(tasks, fit.shares, stages.spec, stages.config.gradients, stages.base_hashes)
        factor = self.factors[group][1] if group in self.factors else None
        factor, distance = save_moved(stages.start, lifted.delta, target, factor=factor, distance=DISTANCE)
        self.factors.setdefault(group, (fit.regularization, factor))
        row |= {"regularization": fit.regularization, "distance": distance, "estimated_validation_loss": fit.judged}
        self.done.flops += fit.flops + training_flops(stages.size(), lifted.tokens)
        self.done.peak_memory_bytes = max(self.done.peak_memory_bytes, lifted.peak_memory_bytes)
        return dict(zip(members, lifted.scores, strict=True))

    def _fit(self, group: int, members: Sequence[str]) -> ResidualFit:
        datasets = [self.data[task] for task in members]
        features = [data.features for data in datasets]
        wanted = [
            residuals(data.train_boosted, data.labels, len(data.features.train_features) // data.features.examples)
            for data in datasets
        ]

        def judge(beta: NDArray[np.float64]) -> float:
            """Mean validation loss to first order, with step sizes as they will be fitted."""
            found = []
            for data in datasets:
                labels, direction = data.features.validation_labels, data.features.validation_features @ beta
                step = fit_step_size(data.boosted, direction, labels)
                found.append(float(label_losses(data.boosted + step * direction, labels).mean()))
            return float(np.mean(found))

        chosen = self.settings.regularization
        value = None if chosen == "auto" else chosen
        if group in self.factors:
            value = self.factors[group][0]
        return fit_residual(features, wanted, self.sampling, judge, value)

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
        adapters = [self.stages.adapter_folder(name) for name in self.stages.group_names]
        requests = [
            ScoreRequest(adapters[g], self.stages.task(task), found)
            for task, found in examples.items()
            for g in used[task]
        ]
        scored = iter(self._score(requests, "training scores"))
        return {
            task: combine(np.stack([next(scored) for _ in places]), np.array(self.weights[task])[places])
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
        counts = {task: len(self.data[task].examples) for task in members}
        return {
            "train_loss": group_loss(losses, counts, members, self.sampling),
            "validation_loss": float(np.mean([self.data[task].validation_loss for task in members])),
        }
