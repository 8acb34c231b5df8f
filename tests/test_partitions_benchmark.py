"""`benchmarks/partitions.py`: the found partition against others, really trained with equal budgets."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from tiny import write_job, write_task

from ray_ensemble.config import SearchConfig, TrainingConfig
from ray_ensemble.estimator import Estimator
from ray_ensemble.estimator.planted import planted_tasks

NAMES = ["contrary", "films", "phones"]


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "partitions.py"
    spec = importlib.util.spec_from_file_location("partitions_benchmark", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def drawn_truth(benchmark, seed, seeds=2):
    generator = np.random.default_rng(seed)
    losses = [[generator.gamma(2.0, size=n) for n in (5, 9)] for _ in range(seeds)]
    return benchmark.Truth(losses, [[each < 1.5 for each in row] for row in losses])


def test_truth_is_a_mean_over_tasks_then_seeds(benchmark):
    ours, found = drawn_truth(benchmark, 0), drawn_truth(benchmark, 1)
    search = SearchConfig(objective="accuracy", price=0.01)
    told = benchmark.figures_of(ours, found, 3, search, ["a", "b"])
    by_seed = [(row[0].mean() + row[1].mean()) / 2 for row in ours.losses]
    others = [(row[0].mean() + row[1].mean()) / 2 for row in found.losses]
    assert told["loss"] == pytest.approx(np.mean(by_seed))
    assert told["loss_spread"] == pytest.approx(np.std(by_seed, ddof=1))
    assert told["objective"] == pytest.approx(1 - told["accuracy"] + 1e-4 * told["loss"] + 0.03)
    assert told["tasks"]["b"]["loss"] == pytest.approx((ours.losses[0][1].mean() + ours.losses[1][1].mean()) / 2)
    minus = told["minus_found"]
    assert minus["loss"]["difference"] == pytest.approx(np.mean(by_seed) - np.mean(others))
    assert minus["loss_by_seed"] == pytest.approx([a - b for a, b in zip(by_seed, others, strict=True)])
    low, high = minus["loss"]["interval"]
    assert low < minus["loss"]["difference"] < high
    itself = benchmark.figures_of(ours, ours, 3, search, ["a", "b"])["minus_found"]["loss"]
    assert itself == {"difference": 0.0, "interval": [0.0, 0.0]}
    once = drawn_truth(benchmark, 0, seeds=1)
    assert benchmark.figures_of(once, once, 3, search, ["a", "b"])["loss_spread"] is None


def test_a_partition_with_two_names_counts_once_in_the_correlation(benchmark):
    keys = ("search", "report", "search_at_budget", "report_at_budget")

    def row(estimated, true, m=2, same_as=None) -> dict[str, Any]:
        return {"m": m, "same_as": same_as, "estimated": dict.fromkeys(keys, estimated), "true": {"objective": true}}

    rows = {
        "a": row(1.0, 2.0),
        "b": row(1.0, 2.0, same_as="a"),
        "c": row(2.0, 1.0),
        "d": row(3.0, 5.0),
        "e": row(0, 9, 1),
    }
    found = benchmark.rank_correlations(rows)
    assert found["partitions"] == 4
    assert found["report"] == pytest.approx(spearmanr([1, 2, 3, 0], [2, 1, 5, 9]).statistic)
    assert benchmark.rank_correlations(rows, 2)["search"] == pytest.approx(0.5)
    assert benchmark.rank_correlations(rows, 1)["search"] is None


def test_the_estimate_at_the_budget_is_the_search_s_own_where_no_floor_binds(benchmark):
    features, _ = planted_tasks(3, 2, train=16, validation=8, dim=6)
    free = TrainingConfig(min_steps=0)
    partition = ((0, 2), (1,))
    plain = Estimator(features, free, 0.1).objective(partition)
    for floor in (0, 4):  # a task has 4 steps of its own
        ours = Estimator(features, TrainingConfig(min_steps=floor), 0.1)
        assert benchmark.at_budget(ours).objective(partition) == pytest.approx(plain, rel=1e-12)
    # Above the steps of all tasks together (12) the floor moves what λ_ref stands for, too.
    high = Estimator(features, TrainingConfig(min_steps=24), 0.1)
    assert benchmark.at_budget(high).regularization == pytest.approx(0.2)


@pytest.mark.slow
@pytest.mark.ray
def test_every_partition_is_trained_with_one_budget_and_never_twice(
    ray_cluster, benchmark, tiny_model, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "200")
    for seed, name in enumerate(NAMES):
        write_task(tmp_path / "tasks" / name, flip=name == "contrary", seed=seed, train=8 + 4 * seed)
    path = write_job(
        tmp_path, tiny_model, tmp_path / "tasks",
        gradients={"dim": 32, "replicas": 1},
        estimator={"regularization": 0.1},
        search={"groups": [2], "trials": 2},
        training={"epochs": 1, "batch_size": 8, "min_steps": 16, "learning_rate": 5.0e-3},
    )  # fmt: skip
    run, file = tmp_path / "run", tmp_path / "figures.json"
    command = [str(path), "--output", str(run), "--json", str(file), "--random", "2"]
    assert benchmark.main(command) == 0
    told = capsys.readouterr().out
    figures = json.loads(file.read_text())
    rows = figures["partitions"]
    kinds = ["found", "exact", "hidden_states", "gradient_cosine", "random-1", "random-2", "together", "alone"]
    assert list(rows) == kinds
    assert all(f"\n{kind}" in told for kind in kinds)

    # 36 examples in batches of 8 are 5 steps: 8, 12 and 16 of 36 are 1.1, 1.7 and 2.2 of them.
    assert figures["task_steps"] == [1, 2, 2]
    assert {row["steps"] for row in rows.values()} == {5}
    partition = json.loads((run / "partition.json").read_text())
    assert rows["found"]["groups"] == partition["groups"]
    assert rows["found"]["estimated"]["report"] == pytest.approx(partition["objective"], rel=1e-12)
    assert rows["exact"]["same_as"] == "found", "of three partitions the local search sees all"
    assert rows["exact"]["true"] == rows["found"]["true"]
    for row in rows.values():
        assert sorted(name for group in row["groups"] for name in group) == NAMES
        if row["m"] == 2:
            assert row["estimated"]["search"] >= rows["found"]["estimated"]["search"] - 1e-12

    # Each adapter that was trained had its group's budget, and the truth is what it reaches on the test split.
    groups = {tuple(group) for row in rows.values() for group in row["groups"]}
    records = {path.parent: json.loads(path.read_text()) for path in (run / "trained").glob("*/result.json")}
    assert {tuple(record["members"]): record["steps"] for record in records.values()} == {
        group: sum(figures["task_steps"][NAMES.index(name)] for name in group) for group in groups
    }
    assert figures["adapters"] == len(groups) == len(records)
    alone = next(folder for folder, record in records.items() if record["members"] == ["films"])
    assert rows["alone"]["true"]["tasks"]["films"]["loss"] == pytest.approx(
        loss_on_test(path, tiny_model, alone), rel=1e-4
    )

    content, stamps = file.read_bytes(), {path: path.stat().st_mtime_ns for path in (run / "trained").rglob("*")}
    assert benchmark.main(command) == 0
    assert file.read_bytes() == content
    assert {path: path.stat().st_mtime_ns for path in (run / "trained").rglob("*")} == stamps


def loss_on_test(job: Path, base: Path, adapter: Path) -> float:
    """Mean test loss of `films` under a saved adapter, one example at a time."""
    from ray_ensemble import Job
    from ray_ensemble.models import LabelTree, attach_adapters, label_scores, load_base, load_tokenizer, make_batch
    from ray_ensemble.stages import encode_all
    from ray_ensemble.tasks import load_tasks

    config = Job.from_yaml(job).config
    tasks = encode_all(load_tasks(config.tasks, config.limits, Path()), load_tokenizer(base), config)
    task = next(task for task in tasks if task.name == "films")
    cpu = torch.device("cpu")
    model = attach_adapters(load_base(base, "none", cpu), {"default": adapter})
    losses = []
    for example in task["test"]:
        batch = make_batch([example], [LabelTree.of(task.label_ids)], 2, 0, cpu)
        with torch.inference_mode():
            losses.append(float(torch.nn.functional.cross_entropy(label_scores(model, batch), batch.labels)))
    return float(np.mean(losses))


def test_wrong_use_is_told(benchmark, whole_job, tmp_path, capsys):
    with pytest.raises(SystemExit):
        benchmark.main([str(whole_job), "--output", str(tmp_path / "run"), "--seeds", "0"])
    assert "--seeds 0: 1 at least" in capsys.readouterr().err
    assert benchmark.main([str(tmp_path / "none.yaml"), "--output", str(tmp_path / "run")]) == 2
    assert "none.yaml" in capsys.readouterr().err
