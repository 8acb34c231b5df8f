"""The exact optimum against every partition there is."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from set_partitions import all_partitions

from ray_ensemble.config import TrainingConfig
from ray_ensemble.errors import InputError
from ray_ensemble.estimator import Estimator
from ray_ensemble.estimator.planted import planted_tasks
from ray_ensemble.grouping.exact import best_optimum, estimated_optima, exact_optima
from ray_ensemble.grouping.objective import group_value, objective, paired, task_values


def drawn(seed):
    """A value for each group without any structure."""
    return lambda group: float(np.random.default_rng([seed, *group]).normal())


@settings(deadline=None, max_examples=30)
@given(n=st.integers(1, 6), seed=st.integers(0, 1000), price=st.sampled_from([0.0, 0.3]))
def test_it_is_the_best_of_all_partitions(n, seed, price):
    value = drawn(seed)
    found = exact_optima(n, value, price)
    assert sorted(found) == list(range(1, n + 1))
    for m, optimum in found.items():
        every = {p: sum(map(value, p)) / n + price * m for p in all_partitions(n, m)}
        assert optimum.objective == pytest.approx(min(every.values()))
        assert every[optimum.partition] == pytest.approx(optimum.objective)
    assert best_optimum(found).objective == min(optimum.objective for optimum in found.values())


def test_each_group_is_asked_for_once():
    asked = []

    def value(group):
        asked.append(group)
        return 1.0

    exact_optima(7, value)
    assert len(asked) == len(set(asked)) == 2**7 - 1


def test_what_cannot_be_enumerated_is_refused():
    with pytest.raises(InputError, match="12 tasks at most, these are 13"):
        exact_optima(13, len)
    with pytest.raises(ValueError, match="no tasks"):
        exact_optima(0, len)


def test_only_allowed_numbers_of_groups_compete():
    found = exact_optima(5, lambda group: len(group) ** 2, price=0.0)
    assert len(best_optimum(found).partition) == 5
    assert len(best_optimum(found, [2, 3]).partition) == 3
    dear = exact_optima(5, lambda group: len(group) ** 2, price=10.0)
    assert len(best_optimum(dear).partition) == 1
    with pytest.raises(ValueError, match="no optimum"):
        best_optimum(found, [7])


@pytest.fixture(scope="module")
def estimator():
    tasks, _ = planted_tasks(5, 2, train=30, validation=40, dim=10, seed=1)
    return Estimator(tasks, TrainingConfig(min_steps=0), 0.05)


@pytest.mark.parametrize("metric", ["loss", "accuracy"])
@pytest.mark.parametrize("price", [0.0, 0.02])
def test_the_estimated_optimum_is_of_the_estimators_own_objective(estimator, metric, price):
    for m, optimum in estimated_optima(estimator, metric, price).items():
        best = min(objective(estimator, p, metric, price) for p in all_partitions(5, m))
        assert optimum.objective == pytest.approx(best, abs=1e-12)
        assert estimator.objective(optimum.partition, metric) + price * m == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("metric", ["loss", "accuracy"])
def test_task_values_and_group_values_add_up_to_the_objective(estimator, metric):
    partition = ((0, 3), (1, 2, 4))
    values = task_values(estimator, partition, metric)
    assert values.mean() == pytest.approx(estimator.objective(partition, metric), abs=1e-12)
    value = group_value(estimator, metric)
    assert value((0, 3)) == pytest.approx(values[[0, 3]].sum())
    report = task_values(estimator, partition, metric, "report")
    assert report.mean() == pytest.approx(estimator.objective(partition, metric, "report"), abs=1e-12)


def test_paired_difference_ignores_what_tasks_have_in_common():
    generator = np.random.default_rng(0)
    reference, effect = generator.normal(size=50), generator.normal(0.1, 0.01, size=50)
    level = 100 * generator.normal(size=50)
    found = paired(reference + level + effect, reference + level)
    assert found.difference == pytest.approx(effect.mean())
    assert found.standard_error == pytest.approx(effect.std(ddof=1) / np.sqrt(50))
    assert paired(reference[:1] + 1, reference[:1]).standard_error == 0.0
    with pytest.raises(ValueError, match="same tasks"):
        paired(reference, reference[:3])
