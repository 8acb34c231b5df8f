"""Tasks of noise are named whatever they train beside, and those that are learnt are not."""

from __future__ import annotations

import numpy as np
import pytest
from test_harm import estimator_of, shuffled

from ray_ensemble.estimator.planted import planted_tasks
from ray_ensemble.grouping.partitions import from_labels
from ray_ensemble.grouping.unlearnt import guessing_losses, unlearnt


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("together", [True, False])
def test_tasks_of_shuffled_labels_are_named_alone_and_beside_each_other(seed, together):
    tasks, membership = planted_tasks(9, 2, train=80, validation=160, dim=40, seed=seed)
    assert unlearnt(estimator_of(tasks), from_labels(membership)) == ()
    tasks[4], tasks[7] = shuffled(tasks[4], seed), shuffled(tasks[7], seed + 9)
    labels = list(membership)
    labels[4], labels[7] = (2, 2) if together else (2, 3)
    named = unlearnt(estimator_of(tasks), from_labels(labels))
    assert {each.task for each in named} == {"task-4", "task-7"}
    assert [each.gain for each in named] == sorted(each.gain for each in named)


def test_guessing_is_by_the_other_examples_labels():
    labels = np.array([0, 0, 0, 1, 2, 2])
    losses = guessing_losses(labels, 4)
    for place, label in enumerate(labels):
        others = np.delete(labels, place)
        assert losses[place] == pytest.approx(-np.log((np.sum(others == label) + 1) / (len(others) + 4)))
