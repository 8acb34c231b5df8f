"""Reassignment in batches: its predictions against the estimator, and that it only ever improves."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from ray_ensemble.config import TrainingConfig
from ray_ensemble.estimator import Estimator, TaskFeatures, estimate_task, pairwise_margins, validation_halves
from ray_ensemble.estimator.planted import planted_tasks
from ray_ensemble.grouping.partitions import from_labels, random_partition
from ray_ensemble.grouping.reassignment import predicted_values, reassign


@pytest.fixture(scope="module")
def planted():
    return planted_tasks(60, 4, train=40, validation=60, dim=12, signal=3.0, own=0.0, seed=0)


def with_pairwise_rows(labels=3):
    """A task of several labels with K − 1 training rows an example."""
    (task,), _ = planted_tasks(1, 1, train=20, validation=30, dim=8, labels=labels, seed=2)
    rows, margins, starts = pairwise_margins(task.validation_scores, task.validation_features, task.validation_labels)
    changed = {"train_features": rows, "train_margins": margins, "train_starts": starts}
    return TaskFeatures(**{**vars(task), **changed})


@pytest.mark.parametrize("metric", ["loss", "accuracy"])
@pytest.mark.parametrize("rows", ["margin", "pairwise"])
def test_predictions_are_the_means_over_search_half_and_training_examples(metric, rows):
    if rows == "pairwise":
        task = with_pairwise_rows()
    else:
        (task,), _ = planted_tasks(1, 1, train=20, validation=30, dim=8, seed=1)
    betas = np.random.default_rng(0).normal(size=(4, 8)) * 0.3
    half = validation_halves(30)[0]
    for beta, value in zip(betas, predicted_values(task, betas, metric), strict=True):
        held_out = estimate_task(beta, task, half)
        losses, hits = [], []
        bounds = [*task.starts, len(task.train_margins)]
        for start, end in pairwise(bounds):
            margins = task.train_margins[start:end] + task.train_features[start:end].astype(float) @ beta
            losses.append(np.log1p(np.exp(-margins).sum()))
            hits.append(float(margins.min() > 0))
        loss = (15 * held_out.loss + sum(losses)) / (15 + len(losses))
        accuracy = (15 * held_out.accuracy + sum(hits)) / (15 + len(hits))
        assert value == pytest.approx(loss if metric == "loss" else 1 - accuracy + 1e-4 * loss, abs=1e-6)


def test_with_one_margin_against_several_labels_accuracy_is_the_validations():
    (task,), _ = planted_tasks(1, 1, train=20, validation=30, dim=8, labels=3, seed=1)
    beta = np.random.default_rng(0).normal(size=8) * 0.3
    expected = estimate_task(beta, task, validation_halves(30)[0]).accuracy
    (found,) = predicted_values(task, beta[None], "accuracy")
    assert found == pytest.approx(1 - expected, abs=1e-3)


def test_planted_groups_are_found_from_a_start_that_is_half_wrong(planted):
    tasks, membership = planted
    estimator = Estimator(tasks, TrainingConfig(min_steps=0), 0.02)
    generator = np.random.default_rng(0)
    start = from_labels([int(generator.integers(4)) if task % 2 else membership[task] for task in range(60)])
    found = reassign(start, estimator, estimator.objective, "loss")
    assert found.partition == from_labels(membership)
    assert found.flops > 0
    assert estimator.fits < 60  # single moves would take two fits each


@pytest.mark.parametrize("metric", ["loss", "accuracy"])
def test_the_objective_never_rises_and_no_group_is_lost(planted, metric):
    tasks, _ = planted
    estimator = Estimator(tasks[:20], TrainingConfig(min_steps=0), 0.02)

    def objective(partition):
        return estimator.objective(partition, metric)

    for m in (1, 2, 6, 19):
        start = random_partition(20, m, m)
        found = reassign(start, estimator, objective, metric)
        assert len(found.partition) == m
        assert objective(found.partition) <= objective(start)
        assert found == reassign(start, estimator, objective, metric)


def test_a_group_in_two_parts_and_two_in_one_are_put_right(planted):
    tasks, membership = planted
    estimator = Estimator(tasks, TrainingConfig(min_steps=0), 0.02)
    # Groups 0 and 1 are one, group 2 is in two parts: no move of single tasks leads out of it.
    start = from_labels([{0: 0, 1: 0, 2: 1 + task % 8 // 4, 3: 3}[group] for task, group in enumerate(membership)])
    assert len(start) == 4
    stuck = reassign(start, estimator, estimator.objective, "loss")
    assert stuck.partition != from_labels(membership)
    guide = np.where(np.equal.outer(membership, membership), 1.0, -0.2) * (1 - np.eye(60))
    found = reassign(start, estimator, estimator.objective, "loss", guide)
    assert found.partition == from_labels(membership)
    assert found.flops > stuck.flops
