"""The end of `ray-ensemble validate`: errors of the estimate beside what another seed of training changes."""

from __future__ import annotations

from typing import Any

from rich.console import Group
from rich.table import Table

from ray_ensemble.report.tables import text_table

_ROWS = (
    ("loss error", "loss_error", "%"),
    ("loss error, calibrated", "loss_error_calibrated", "%"),
    ("accuracy error", "accuracy_error", "%"),
    ("accuracy error, points", "accuracy_error_points", ""),
    ("Spearman within datasets", "spearman", ""),
)


def validation_summary(found: dict[str, Any]) -> Group:
    """The content of `validation.json` as tables: each measure and the same of a second seed (the ceiling); linearity."""
    return Group(_errors(found), "", _by_task(found), "", _linearity(found))


def _errors(found: dict[str, Any]) -> Table:
    table = text_table(
        title=f"Estimate against {found['subsets']} really fine-tuned subsets, {found['points']} (subset, dataset) points",
        caption="errors are relative to the truth and averaged over points; seed to seed: training again with another seed",
    )
    ceiling = found.get("seed_to_seed") or {}
    table.add_column("")
    table.add_column("estimate", justify="right")
    table.add_column("seed to seed", justify="right")
    for title, key, kind in _ROWS:
        table.add_row(title, _text(found.get(key), kind) + _interval(found, key), _text(ceiling.get(key), kind))
    return table


def _by_task(found: dict[str, Any]) -> Table:
    table = text_table(
        title="Within each dataset: does the estimate order the subsets that hold it as training does?",
        caption="mean loss over the subsets, nats; Spearman over few subsets says little by itself",
    )
    table.add_column("dataset")
    for title in ("subsets", "estimated", "true", "Spearman"):
        table.add_column(title, justify="right")
    for task, value in found["spearman_by_task"].items():
        rows = [row for row in found["table"] if row["task"] == task]
        means = [
            sum(row["estimated"]["loss"] for row in rows) / len(rows),
            sum(row["true"][0]["loss"] for row in rows) / len(rows),
        ]
        table.add_row(task, str(len(rows)), *(f"{mean:.3f}" for mean in means), _text(value, ""))
    return table


def _linearity(found: dict[str, Any]) -> Table:
    table = text_table(
        title="Linearity: margins against their first-order prediction",
        caption="distance: of the adapter from its start, relative to the start's norm; error: squared remainder over squared "
        "margins; of change: over their squared changes; loss: of the model there, and of its first-order prediction, in nats",
    )
    table.add_column("along")
    for title in ("distance", "error", "of change", "loss", "predicted"):
        table.add_column(title, justify="right")
    for row in found.get("approximation", ()):
        errors = (row["approximation_error"], row["approximation_error_of_change"])
        losses = (f"{row['loss']:.3f}", f"{row['linear_loss']:.3f}")
        table.add_row(row["direction"], f"{row['distance']:.3f}", *(_text(error, "%") for error in errors), *losses)
    return table


def _text(value: float | None, kind: str) -> str:
    if value is None:
        return "–"
    return f"{100 * value:.1f}%" if kind == "%" else f"{value:.2f}"


def _interval(found: dict[str, Any], key: str) -> str:
    interval = found.get(f"{key}_interval")
    return f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else ""
