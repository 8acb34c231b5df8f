"""What the arms of `classify10.py` reached, as figures, as tables for a terminal, and as Markdown."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from classify10_arms import ARMS
from classify10_estimate import HALVES, Estimates, agreement
from classify10_experiment import Experiment
from classify10_lengths import counted, flops_at
from numpy.typing import NDArray
from rich.table import Table

from ray_ensemble.evaluation import flops_ratio
from ray_ensemble.evaluation.metrics import MEASURES, RESAMPLES, Resampled, resample
from ray_ensemble.models import default_device
from ray_ensemble.report.facts import Measure, change, measured, number, seconds, size, span
from ray_ensemble.report.tables import text_table

REFERENCES = ("qlora_all", "per_dataset")
OURS = ("ours", "own_group", "merged", "boosted")
OTHERS = ("random", "hidden_states", "by_hand")  # partitions that the search did not find
SCALED = "qlora_scaled"  # as accurate as one QLoRA, so ours are held against it in loss
SAME_SIZE = "qlora_wide"  # one adapter of as many parameters as the groups' have
MADE_FROM = {"merged": "ours", "boosted": "ours"}  # by merging it, by adding boosters to it
LONGER = 10  # epochs, the paper's
GRADIENT_SHARES = (1.0, 0.5, 0.25)  # of each training split


def figures(experiment: Experiment, names: Sequence[str], seeds: int) -> dict[str, Any]:
    """All figures of the arms among `names` that every seed has a result of.

    Intervals are over examples and seeds together (`resample`); differences are paired in both.
    """
    complete = [arm for arm in names if all(experiment.record(arm, seed).exists() for seed in range(seeds))]
    labels = [np.array([example.label for example in task["test"]]) for task in experiment.job.encoded]
    scores = {arm: stacked([experiment.scores(arm, seed) for seed in range(seeds)]) for arm in complete}
    found = {arm: resample(each, labels) for arm, each in scores.items()}
    costs = {arm: [experiment.cost(arm, seed) for seed in range(seeds)] for arm in complete}
    reference = [total(cost) for cost in costs.get("qlora_all", ())]
    shown = [arm for arm in (*REFERENCES, SAME_SIZE, *OURS, *OTHERS) if arm in complete]
    # Of the other arms only the values on each task are told, which need no draws.
    by_task = {
        arm: [
            resample([each], [right], resamples=RESAMPLES if arm in shown else 1)
            for each, right in zip(scores[arm], labels, strict=True)
        ]
        for arm in complete
    }
    estimates, arms = Estimates(experiment, seeds), {}
    for arm in complete:
        arms[arm] = {
            "told": ARMS[arm].told,
            "steps": [cost["steps"] for cost in costs[arm]],
            "equal_steps": all(cost["steps"] == experiment.steps for cost in costs[arm]),
            "adapters": [cost["adapters"] for cost in costs[arm]],
            **measures(found[arm]),
            "minus": {other: differences(found[arm], found[other]) for other in compared(arm) if other in found},
            "tasks": {
                name: {measure: each.value(measure) for measure in MEASURES}
                for name, each in zip(experiment.names, by_task[arm], strict=True)
            },
            **spent(costs[arm], reference),
            "about": [cost["about"] for cost in costs[arm]],
        }
        if arm in ("ours", *OTHERS) and SCALED in complete and estimates.known:
            beside, place = zip(by_task[arm], by_task[SCALED], strict=True), MEASURES.index("loss")
            real = np.stack([one.trainings[:, place] - other.trainings[:, place] for one, other in beside], axis=1)
            search, held_out = (estimates.difference(costs[arm], half) for half in HALVES)
            arms[arm]["estimate"] = agreement(search, held_out, real)
        if arm in OURS and reference and counted(experiment):
            pairs = list(zip(costs[arm], costs["qlora_all"], strict=True))
            arms[arm]["ratio_if_longer"] = {
                f"{share:g}": [flops_ratio(*flops_at(experiment, cost, one, LONGER, share)) for cost, one in pairs]
                for share in GRADIENT_SHARES
            }
    return {
        "benchmark": "classify10",
        "machine": {"cores": os.cpu_count(), "device": default_device().type},
        "seeds": seeds,
        "tasks": {
            name: {split: len(task[split]) for split in ("train", "validation", "test")}
            for name, task in zip(experiment.names, experiment.job.encoded, strict=True)
        },
        "steps": {"all": experiment.steps, "common_start": experiment.warm_up, "shares": experiment.shares},
        "left_out": [arm for arm in names if arm not in complete],
        "arms": arms,
        "by_dataset": {
            name: {
                f"{arm}_minus_{other}": differences(by_task[arm][place], by_task[other][place])
                for arm in shown
                for other in compared(arm)
                if other in shown and arm in (*OURS, *OTHERS)
            }
            for place, name in enumerate(experiment.names)
        },
    }


def compared(arm: str) -> list[str]:
    """The arms that an arm is compared with, where they are complete."""
    others = [*REFERENCES]
    if arm in (*OURS, *OTHERS):
        others += [SCALED, SAME_SIZE]
    if arm in OTHERS:
        others.append("ours")
    if arm in MADE_FROM:
        others.append(MADE_FROM[arm])
    return [other for other in others if other != arm]


def stacked(by_seed: Sequence[Sequence[NDArray[Any]]]) -> list[NDArray[Any]]:
    """Scores (R, N, K) of each task from those (N, K) of each seed and task."""
    return [np.stack(each) for each in zip(*by_seed, strict=True)]


def measures(found: Resampled) -> dict[str, Any]:
    """Every measure with its interval and its value at each seed."""
    told: dict[str, Any] = {}
    for place, measure in enumerate(MEASURES):
        told[measure] = {
            "value": found.value(measure),
            "interval": found.interval(measure),
            "by_seed": found.trainings[:, place].tolist(),
        }
    return told


def differences(ours: Resampled, other: Resampled) -> dict[str, Any]:
    """Paired differences in every measure."""
    return {measure: ours.minus(other, measure) for measure in MEASURES}


def total(cost: Mapping[str, Any]) -> float:
    """FLOPs of an arm with one seed."""
    return float(sum(cost["flops"].values()))


def spent(costs: Sequence[Mapping[str, Any]], reference: Sequence[float]) -> dict[str, Any]:
    """FLOPs and seconds by part, means over seeds; the FLOPs ratio to one QLoRA on all at each seed; the highest peak memory."""
    parts = list(dict.fromkeys(part for cost in costs for part in cost["flops"]))
    return {
        "flops": {part: float(np.mean([cost["flops"].get(part, 0.0) for cost in costs])) for part in parts},
        "ratio": [total(cost) / one for cost, one in zip(costs, reference, strict=True)] if reference else None,
        "seconds": {part: float(np.mean([cost["seconds"].get(part, 0.0) for cost in costs])) for part in parts},
        "peak_memory_bytes": max(cost["peak_memory_bytes"] for cost in costs),
    }


def rows(told: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The table of arms: its head, and a row an arm."""
    head = [
        "arm", "steps", "accuracy", "macro-F1", "loss", "ECE",
        "accuracy − one QLoRA", "accuracy − per dataset", "FLOPs", "seconds", "memory",
    ]  # fmt: skip
    body = []
    for name, arm in told["arms"].items():
        cells = [arm["told"] if name != "qlora_all" else "**one QLoRA on all**"]
        steps = sorted(set(arm["steps"]))
        cells.append(" to ".join(f"{count:,}" for count in dict.fromkeys((steps[0], steps[-1]))))
        for measure in ("accuracy", "macro_f1", "loss", "ece"):
            kind: Measure = "loss" if measure == "loss" else "accuracy"
            cells.append(f"{measured(kind, arm[measure]['value'])} {span(kind, arm[measure]['interval'])}")
        for other in REFERENCES:
            paired = arm["minus"].get(other)
            cells.append(change("accuracy", *_bounds(paired["accuracy"])) if paired else "")
        cells.append("" if arm["ratio"] is None else f"{number(float(np.mean(arm['ratio'])), 2)} ×")
        cells.append(seconds(sum(arm["seconds"].values())) if arm["seconds"] else "")
        cells.append(size(arm["peak_memory_bytes"]) if arm["peak_memory_bytes"] else "")
        body.append(cells)
    return head, body


def dataset_rows(told: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Accuracy on each dataset, those first on which ours gains most over one QLoRA; empty before both are there."""
    arms = told["arms"]
    columns = [name for name in ("base", *REFERENCES, *OTHERS, "own_group", "ours", "boosted") if name in arms]
    others = [other for other in REFERENCES if other in arms]
    if "ours" not in arms or "qlora_all" not in arms:
        return [], []
    head = ["dataset", "n", *columns, *(f"ours − {other}" for other in others)]
    gains = {name: each["ours_minus_qlora_all"]["accuracy"]["difference"] for name, each in told["by_dataset"].items()}
    body = []
    for name in sorted(gains, key=lambda name: -gains[name]):
        cells = [name, str(told["tasks"][name]["test"])]
        cells += [measured("accuracy", arms[arm]["tasks"][name]["accuracy"]) for arm in columns]
        for other in others:
            paired = told["by_dataset"][name][f"ours_minus_{other}"]["accuracy"]
            cells.append(change("accuracy", *_bounds(paired)))
        body.append(cells)
    return head, body


def verdicts(told: Mapping[str, Any]) -> list[str]:
    """In words: every arm of groups against what it is `compared` with and what was estimated of it, its FLOPs ratio by parts,
    groups, and what is not there yet."""
    arms, lines = told["arms"], []
    for name in (*OURS, *OTHERS):
        if name not in arms:
            continue
        for other, paired in arms[name]["minus"].items():
            if other == SCALED:
                lines.append(f"{name} − {other}: loss {change('loss', *_bounds(paired['loss']))}")
                continue
            low, high = paired["accuracy"]["interval"]
            holds = "holds zero" if low <= 0 <= high else "excludes zero"
            text = change("accuracy", *_bounds(paired["accuracy"]))
            lines.append(f"{name} − {other}: accuracy {text}, which {holds}; {_tally(told, name, other)}")
        if "estimate" in arms[name]:
            lines.append(_beside(name, arms[name]))
        if arms[name]["ratio"]:
            whole = sum(arms["qlora_all"]["flops"].values())
            parts = ", ".join(f"{part} {number(value / whole, 2)}" for part, value in arms[name]["flops"].items())
            lines.append(f"{name}: FLOPs ratio {number(float(np.mean(arms[name]['ratio'])), 3)} ({parts})")
        if "ratio_if_longer" in arms[name]:
            longer = ", ".join(
                f"{number(float(np.mean(ratios)), 3)} with gradients of {100 * float(share):g}%"
                for share, ratios in arms[name]["ratio_if_longer"].items()
            )
            lines.append(f"{name}: at {LONGER} epochs, counted and not run: {longer} of the training examples")
    if "ours" in arms:
        found = [about["m"] for about in arms["ours"]["about"]]
        lines.append(f"groups: {', '.join(map(str, found))} of {len(told['tasks'])} datasets, by seed")
        for seed, about in enumerate(arms["ours"]["about"]):
            lines.append(f"seed {seed}: " + " | ".join(", ".join(group) for group in about["groups"]))
    if told["left_out"]:
        lines.append(f"not complete yet: {', '.join(told['left_out'])}")
    return lines


def _beside(name: str, arm: Mapping[str, Any]) -> str:
    """What the estimate said of a partition's loss, and what came of it."""
    estimate, real = arm["estimate"], arm["minus"][SCALED]["loss"]["difference"]
    related, ceiling = number(estimate["correlation"], 2), estimate["between_seeds"]
    between = "" if ceiling is None else f" (of one seed with another {number(ceiling, 2)})"
    said, held_out = change("loss", estimate["search"]), change("loss", estimate["held_out"])
    return (
        f"{name}: loss less that of all together, estimated {said} (validation half that the search does not see: {held_out}), "
        f"real {change('loss', real)}; correlation over datasets {related}{between}"
    )


def _tally(told: Mapping[str, Any], arm: str, other: str) -> str:
    """On how many datasets it is more and less accurate, by the figure and beyond its interval."""
    paired = [each[f"{arm}_minus_{other}"]["accuracy"] for each in told["by_dataset"].values()]
    up, down = (sum(sign * each["difference"] > 0 for each in paired) for sign in (1, -1))
    surely = sum(each["interval"][0] > 0 for each in paired), sum(each["interval"][1] < 0 for each in paired)
    return f"higher on {up} datasets ({surely[0]} beyond their intervals), lower on {down} ({surely[1]})"


def _bounds(paired: Mapping[str, Any]) -> tuple[float, list[float]]:
    return paired["difference"], paired["interval"]


def caption(told: Mapping[str, Any]) -> str:
    """What the tables' figures are."""
    common = told["steps"]["common_start"]
    return (
        f"means over {len(told['tasks'])} datasets' test splits and {told['seeds']} seed(s); [ ]: 95% interval over examples and "
        f"seeds; steps: optimiser steps in all, {told['steps']['all']:,} where budgets are equal"
        + (f" ({common:,} of them the common start)" if common else "")
        + "; FLOPs: one QLoRA on all = 1; seconds: all parts one after the other; evaluation left out"
    )


def tables(told: Mapping[str, Any]) -> list[Table | str]:
    """The figures for a terminal."""
    parts: list[Table | str] = []
    for title, below, (head, body) in (
        ("Arms", caption(told), rows(told)),
        ("Accuracy by dataset", "means over seeds", dataset_rows(told)),
    ):
        if body:
            table = text_table(title=title, caption=below)
            for place, column in enumerate(head):
                table.add_column(column, justify="left" if place == 0 else "right")
            for cells in body:
                table.add_row(*(cell.replace("**", "") for cell in cells))
            parts += [table, ""]
    return [*parts, *verdicts(told)]


def markdown(told: Mapping[str, Any]) -> str:
    """The same as Markdown."""
    parts = []
    for head, body in (rows(told), dataset_rows(told)):
        if body:
            lines = [head, ["---", *("---:" for _ in head[1:])], *body]
            parts.append("\n".join(f"| {' | '.join(cells)} |" for cells in lines))
    parts.insert(1, f"M{caption(told)[1:]}.")
    parts.append("\n".join(f"- {line}" for line in verdicts(told)))
    return "\n\n".join(parts) + "\n"
