"""The figures of `benchmarks/classify10.py`: means over seeds, paired differences, and what was estimated beside what is real."""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import pytest
from test_classify10_benchmark import TASKS, arms, benchmark, experiment, job, planted  # noqa: F401 (fixtures)


def write_gradient_counts(experiment: Any, tokens: int) -> None:  # noqa: F811
    """As a gradient store tells them, with prompts of so many tokens each."""
    for task in experiment.job.encoded:
        for split in ("train", "validation"):
            count = len(task[split])
            info = {"examples": count, "forward_tokens": count * tokens, "backward_tokens": count * tokens}
            folder = experiment.job.folder / "gradients" / task.name / split
            folder.mkdir(parents=True)
            (folder / "info.json").write_text(json.dumps(info))


def test_figures_are_means_over_seeds_and_pairs_are_paired(benchmark, experiment, arms):  # noqa: F811
    from ray_ensemble.evaluation import losses_and_hits

    experiment.job.through("plan")
    write_gradient_counts(experiment, tokens=10)
    taken = sys.modules["classify10_lengths"].pass_flops(experiment)
    halved = sys.modules["classify10_lengths"].pass_flops(experiment, 0.5)
    rows = {split: sum(len(task[split]) for task in experiment.job.encoded) for split in ("train", "validation")}
    assert halved / taken == pytest.approx(
        (rows["train"] / 2 + rows["validation"]) / (rows["train"] + rows["validation"])
    )
    unit = taken / 100  # so that no part of a cost is lost beside another
    result = sys.modules["classify10_experiment"].Result
    sizes = tuple(len(task["test"]) for task in experiment.job.encoded)
    labels = [np.array([e.label for e in task["test"]]) for task in experiment.job.encoded]
    accuracy: dict[str, list[list[float]]] = {}
    skills = {"qlora_all": 0.5, "qlora_scaled": 0.7, "ours": 1.5, "merged": 1.4, "per_dataset": 1.0, "qlora_wide": 0.6}
    for place, (arm, skill) in enumerate(skills.items()):
        for seed in range(2):
            scores = dict(zip(TASKS, planted(10 * place + seed, skill, sizes), strict=True))
            kept = result(scores, steps=13, adapters=2, about={"m": 2, "groups": [["films", "phones"], ["contrary"]]})
            kept.add("groups", (100 + 20 * seed) * unit, 5.0, 2**20)
            if arm in ("ours", "merged"):
                kept.add("search", 10 * unit, 1.0)
                kept.add("gradients", taken + 5 * unit, 1.0)  # a common start of 5
            experiment.keep(arm, seed, kept)
            hits = [losses_and_hits(scores[name], y)[1].mean() for name, y in zip(TASKS, labels, strict=True)]
            accuracy.setdefault(arm, []).append(hits)
    experiment.keep("random", 0, kept)  # of seed 0 alone: not complete
    told = benchmark.figures(experiment, [*skills, "random"], 2)
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    assert list(told["arms"]) == list(skills)
    assert told["left_out"] == ["random"]
    ours = told["arms"]["ours"]
    assert ours["equal_steps"] is True
    assert ours["ratio"] == pytest.approx([215 / 100, 235 / 120])
    # Ten epochs instead of one: 90 steps after the 4 of the common start instead of 9.
    for share, gradients in {"1": 100, "0.5": halved / unit}.items():
        expected = [(g * 90 / 9 + 15 + gradients) / (g * 94 / 13) for g in (100, 120)]
        assert ours["ratio_if_longer"][share] == pytest.approx(expected)
    assert "ratio_if_longer" not in told["arms"]["per_dataset"]
    assert ours["flops"] == pytest.approx({"groups": 110 * unit, "search": 10 * unit, "gradients": 105 * unit})
    assert ours["seconds"] == {"groups": 5.0, "search": 1.0, "gradients": 1.0}
    assert ours["accuracy"]["by_seed"] == pytest.approx(np.mean(accuracy["ours"], axis=1))
    for arm, other in (("ours", "qlora_all"), ("ours", "per_dataset"), ("ours", "qlora_wide"), ("merged", "ours")):
        gap = np.subtract(accuracy[arm], accuracy[other])
        paired = told["arms"][arm]["minus"][other]["accuracy"]
        assert paired["difference"] == pytest.approx(gap.mean())
        assert paired["by_training"] == pytest.approx(gap.mean(axis=1))
        for place, name in enumerate(TASKS):
            each = told["by_dataset"][name][f"{arm}_minus_{other}"]["accuracy"]
            assert each["difference"] == pytest.approx(gap[:, place].mean())
    words = "\n".join(sys.modules["classify10_table"].verdicts(told))
    for line in ("qlora_all: accuracy +", "qlora_wide: accuracy +", "qlora_scaled: loss "):
        assert f"ours − {line}" in words
    assert "not complete yet: random" in words
    assert "ours: at 10 epochs, counted and not run: " in words
    text = sys.modules["classify10_table"].markdown(told)
    assert "| ours: found groups, fitted weights | 13 |" in text
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 2, "two whole tables"


def test_agreement_of_estimated_and_real_differences_is_their_correlation_over_tasks(benchmark):  # noqa: F811
    agreement = sys.modules["classify10_estimate"].agreement
    real = np.array([[0.0, 1.0, 2.0], [0.0, 2.0, 1.0], [2.0, 1.0, 0.0]])  # means 2/3, 4/3, 1
    found = agreement(np.array([-1.0, 2.0, 1.0]), np.array([1.0, 2.0, 1.0]), real)  # means 0, 2, 1: in the same order
    assert found == pytest.approx(
        {"search": 2 / 3, "held_out": 4 / 3, "correlation": 1.0, "between_seeds": (0.5 - 1.0 - 0.5) / 3}
    )
    constant = agreement(np.ones(3), np.zeros(3), real[:1])
    assert constant == {"search": 1.0, "held_out": 0.0, "correlation": None, "between_seeds": None}
