"""A task whose labels are shuffled: where the search puts it, and that it is named."""

from __future__ import annotations

import numpy as np
import pytest

from ray_ensemble.config import SearchConfig, TrainingConfig
from ray_ensemble.estimator import Estimator, sample_subsets
from ray_ensemble.estimator.affinity import affinity
from ray_ensemble.estimator.planted import planted_tasks
from ray_ensemble.grouping.cases import parse_partition, run_case, search_cases
from ray_ensemble.grouping.harm import harmful
from ray_ensemble.grouping.partitions import from_labels


def shuffled(task, seed=0):
    """The task with wrong labels, training and validation: of two labels, the wrong one for a random half."""
    generator = np.random.default_rng(seed)
    signs = generator.choice([-1.0, 1.0], size=len(task.train_margins))
    changed = {
        "train_features": (task.train_features * signs[:, None]).astype(np.float32),
        "train_margins": task.train_margins * signs,
        "validation_labels": generator.integers(2, size=len(task.validation_labels)),
    }
    return type(task)(**{**vars(task), **changed})


def estimator_of(tasks):
    return Estimator(tasks, TrainingConfig(min_steps=0), 0.05)


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_poisoned_task_ends_with_few_and_it_alone_is_named(groups, seed):
    tasks, membership = planted_tasks(9, groups, train=80, validation=160, dim=40, seed=seed)
    poison = 4
    tasks[poison] = shuffled(tasks[poison], seed)
    estimator = estimator_of(tasks)
    view = affinity(estimator, sample_subsets(9, 50, 3, 0)).symmetric()
    search = SearchConfig(groups=[2, 3, 4], trials=14)
    best = min(
        (run_case(case, estimator, view, search) for case in search_cases(search, 9)), key=lambda row: row["objective"]
    )
    partition = parse_partition(best["partition"])
    (home,) = [group for group in partition if poison in group]
    assert len(home) <= 2
    (harm,) = harmful(estimator, partition)
    assert harm.task == "task-4"
    assert harm.effect < -2 * harm.standard_error < 0
    assert harm.partners == 8
    for planted in range(groups):  # the others are still with their own
        healthy = {t for t in range(9) if membership[t] == planted and t != poison}
        assert max(len(healthy & set(group)) for group in partition) >= len(healthy) - 1


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_without_poison_nobody_is_named(groups):
    for seed in range(3):
        tasks, membership = planted_tasks(9, groups, train=80, validation=160, dim=40, seed=seed)
        assert harmful(estimator_of(tasks), from_labels(membership)) == ()


@pytest.mark.parametrize("partition", [((0, 1, 2, 3, 4, 5, 6, 7, 8),), ((0, 1, 3, 5), (2,), (4, 6, 7, 8))])
def test_the_effect_is_the_mean_over_all_partners_of_joining_their_group(partition):
    tasks, _ = planted_tasks(9, 1, train=80, validation=160, dim=40, seed=0)
    tasks[2] = shuffled(tasks[2])
    estimator = estimator_of(tasks)
    (harm,) = harmful(estimator, partition)
    effects = []
    for group in partition:
        without, with_ = tuple(t for t in group if t != 2), tuple(sorted({*group, 2}))
        if without:
            before, after = estimator.group(without).search, estimator.group(with_).search
            effects += [old.loss - after[with_.index(member)].loss for member, old in zip(without, before, strict=True)]
    assert harm.effect == pytest.approx(np.mean(effects))
    assert harm.standard_error == pytest.approx(np.std(effects, ddof=1) / np.sqrt(8))
    assert (harm.task, harm.partners, harm.better) == ("task-2", 8, sum(effect > 0 for effect in effects))


def test_too_few_tasks_are_not_judged():
    tasks, _ = planted_tasks(3, 1, train=40, validation=40, dim=10)
    assert harmful(estimator_of([*tasks[:2], shuffled(tasks[2])]), ((0, 1, 2),)) == ()
