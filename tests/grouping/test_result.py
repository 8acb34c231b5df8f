"""Trials without Ray: price, the rule that chooses m, and what partition.json says of each m."""

from __future__ import annotations

import numpy as np
import pytest

from ray_ensemble.config import SearchConfig, TrainingConfig
from ray_ensemble.estimator import Estimator, sample_subsets
from ray_ensemble.estimator.affinity import affinity
from ray_ensemble.estimator.planted import planted_tasks
from ray_ensemble.grouping.cases import format_partition, parse_partition, run_case, search_cases
from ray_ensemble.grouping.exact import best_optimum, estimated_optima
from ray_ensemble.grouping.fitlog import FitLog, Reference
from ray_ensemble.grouping.partitions import from_labels
from ray_ensemble.grouping.result import best_result, choose


@pytest.fixture(scope="module")
def estimator():
    tasks, _ = planted_tasks(8, 3, train=60, validation=160, dim=30, seed=0)
    return Estimator(tasks, TrainingConfig(min_steps=0), 0.05)


@pytest.fixture(scope="module")
def similarity(estimator):
    return affinity(estimator, sample_subsets(8, 50, 3, 0))


def trials(estimator, similarity, search):
    view = similarity.symmetric()
    return [run_case(case, estimator, view, search) for case in search_cases(search, len(estimator))]


def result(estimator, similarity, search, tmp_path, table=None):
    fits = FitLog(tmp_path / "fits.jsonl", "inputs")
    fits.reference = Reference(estimator.regularization, 0)
    return best_result(table or trials(estimator, similarity, search), estimator, similarity, fits, search)


@pytest.mark.parametrize("price", [0.0, 0.01, 1.0])
def test_the_price_enters_every_objective(estimator, similarity, tmp_path, price):
    search = SearchConfig(groups=list(range(1, 9)), trials=24, price=price)
    table = trials(estimator, similarity, search)
    for row in table:
        partition = parse_partition(row["partition"])
        assert row["objective"] == pytest.approx(estimator.objective(partition) + price * len(partition))
    found = result(estimator, similarity, search, tmp_path, table)
    written = found.to_json()
    assert written["price"] == price
    alone = [[task] for task in range(8)]
    assert written["references"]["alone"]["search_objective"] == pytest.approx(estimator.objective(alone) + 8 * price)
    assert written["objective"] == pytest.approx(
        estimator.objective(found.partition, "loss", "report") + price * found.m
    )
    best = best_optimum(estimated_optima(estimator, price=price))
    assert written["search_objective"] == pytest.approx(best.objective, abs=1e-9)
    assert found.m == len(best.partition)
    if price == 1.0:
        assert found.m == 1


def test_a_trial_with_free_m_gets_to_the_best_m_among_those_allowed(estimator, similarity):
    optima = estimated_optima(estimator)
    for groups in ([2, 3, 4, 5], [2], [1, 8]):
        search = SearchConfig(groups=groups, methods=["sdp-penalty"])
        rows = [
            run_case(
                {"m": None, "method": "sdp-penalty", "seed": seed, "repeat": seed},
                estimator,
                similarity.symmetric(),
                search,
            )
            for seed in range(3)
        ]
        assert {row["m"] for row in rows} <= set(groups)
        assert min(row["objective"] for row in rows) == pytest.approx(best_optimum(optima, groups).objective, abs=1e-9)


@pytest.mark.parametrize("metric", ["loss", "accuracy"])
def test_differences_are_paired_over_tasks(estimator, similarity, tmp_path, metric):
    search = SearchConfig(groups=[2, 3, 5], trials=8, objective=metric, price=0.003)
    table = trials(estimator, similarity, search)
    found = result(estimator, similarity, search, tmp_path, table)
    best = {m: min((row for row in table if row["m"] == m), key=lambda row: row["objective"]) for m in (2, 3, 5)}

    def values(row):
        estimates = estimator.tasks(parse_partition(row["partition"]), "search")
        if metric == "loss":
            return np.array([estimate.loss for estimate in estimates])
        return np.array([1 - estimate.accuracy + 1e-4 * estimate.loss for estimate in estimates])

    lowest = min(row["objective"] for row in table)
    for row in found.by_m:
        objectives = [each["objective"] for each in table if each["m"] == row["m"]]
        differences = values(best[row["m"]]) - values(best[found.m])
        assert row["search_objective"] == min(objectives)
        assert row["std"] == pytest.approx(np.std(objectives))
        assert row["difference"] == pytest.approx(min(objectives) - lowest, abs=1e-12)
        assert row["standard_error"] == pytest.approx(np.std(differences, ddof=1) / np.sqrt(8), abs=1e-12)


def rows(*triples):
    return [{"m": m, "difference": difference, "standard_error": error} for m, difference, error in triples]


def test_the_rule_takes_the_fewest_groups_within_one_standard_error_of_the_best():
    by_m = rows((2, 0.05, 0.02), (3, 0.01, 0.012), (4, 0.002, 0.009), (5, 0.0, 0.0), (6, 0.001, 0.5))
    assert choose(by_m, "best") == 5
    assert choose(by_m, "one_standard_error") == 3
    assert choose(rows((2, 0.05, 0.02), (3, 0.0, 0.0)), "one_standard_error") == 3


def test_the_chosen_partition_is_that_of_the_rule(estimator, similarity, tmp_path):
    """Between partitions that hardly differ the rule takes the one of fewer groups."""
    labels = [0, 1, 2, 0, 1, 2, 0, 1]
    best = format_partition(from_labels(labels))
    table = [
        {"m": 3, "method": "sdp", "seed": 4, "partition": best, "objective": 0.0, "reassignment_flops": 0},
        {
            "m": 8,
            "method": "sdp",
            "seed": 5,
            "partition": format_partition([[t] for t in range(8)]),
            "objective": 0.0,
            "reassignment_flops": 0,
        },
    ]
    for row in table:
        row["objective"] = estimator.objective(parse_partition(row["partition"]))
    search = SearchConfig(groups=[3, 8], rule="one_standard_error")
    found = result(estimator, similarity, search, tmp_path, table)
    assert (found.m, found.seed, found.rule, found.to_json()["rule"]) == (3, 4, "one_standard_error", search.rule)
    # Alone is worse by much more than noise, so that the rule goes no further than what noise allows.
    reverse = SearchConfig(groups=[3, 8], rule="one_standard_error", price=0.0)
    merged = format_partition(from_labels([0, 0, 2, 0, 0, 2, 0, 0]))
    table.append({"m": 2, "method": "sdp", "seed": 6, "partition": merged, "objective": 0.0, "reassignment_flops": 0})
    table[-1]["objective"] = estimator.objective(parse_partition(merged))
    by_m = {row["m"]: row for row in result(estimator, similarity, reverse, tmp_path, table).by_m}
    within = by_m[2]["difference"] <= by_m[2]["standard_error"]
    assert result(estimator, similarity, reverse, tmp_path, table).m == (2 if within else 3)


def test_prices_below_zero_are_refused():
    for wrong in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="price"):
            SearchConfig(price=wrong)
