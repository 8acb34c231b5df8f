"""The plot of a validation: estimated against really reached losses, as they are and with each dataset's mean taken off."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ray_ensemble.report.facts import number
from ray_ensemble.report.figures import Drawing, Missing
from ray_ensemble.report.load import RunData
from ray_ensemble.report.theme import WIDTH, Theme, name

NAMED = 12  # datasets in the legend

Rows = list[dict[str, Any]]


def validation_plot(data: RunData) -> Drawing | Missing:
    """The plot of the run's last validation."""
    return drawing(data.validation or {})


def drawing(validation: dict[str, Any]) -> Drawing | Missing:
    """The plot of the content of a `validation.json`."""
    rows = [row for row in validation.get("table") or [] if isinstance(row, dict) and row.get("true")]
    if not rows:
        return Missing(
            "validation", "No subsets were fine-tuned for real, so there is nothing to draw the estimate against."
        )
    rho = validation.get("spearman")
    told = "" if rho is None else f" Spearman's ρ of the right panel is {number(rho, 2)}."
    caption = (
        "A point a dataset of a fine-tuned subset: across, its estimated validation loss; up, the loss that training reached, a "
        "bar where a second seed ended elsewhere. Left: as they are; on the line the estimate was right. Right: each dataset's "
        f"mean taken off both, so that only the order of its partners is left, which is what groups are chosen by.{told}"
    )
    return Drawing("validation", caption, partial(_draw, rows))


def _draw(rows: Rows, theme: Theme) -> Figure:
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    levels, orders = figure.subplots(1, 2)
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    estimated = np.array([row["estimated"]["loss"] for row in rows])
    true = [np.array([each["loss"] for each in row["true"]]) for row in rows]
    place = np.array([tasks.index(row["task"]) for row in rows])
    means = [
        (estimated[place == i].mean(), float(np.mean([true[j][0] for j in np.flatnonzero(place == i)])))
        for i in range(len(tasks))
    ]
    _scatter(levels, tasks, place, estimated, true, theme)
    shifted = estimated - np.array([means[i][0] for i in place])
    _scatter(orders, tasks, place, shifted, [t - means[i][1] for t, i in zip(true, place, strict=True)], theme)
    levels.set_xlabel("estimated loss (nats)")
    levels.set_ylabel("loss after fine-tuning (nats)")
    orders.set_xlabel("estimated loss − the dataset's mean")
    orders.set_ylabel("loss after fine-tuning − the dataset's mean")
    if len(tasks) <= NAMED:
        orders.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    return figure


def _scatter(axes: Axes, tasks: list[str], place: Any, across: Any, true: list[Any], theme: Theme) -> None:
    low = min(float(across.min()), *(float(t.min()) for t in true))
    high = max(float(across.max()), *(float(t.max()) for t in true))
    axes.plot([low, high], [low, high], color=theme.muted, linewidth=1, linestyle="--", zorder=1)
    for i, task in enumerate(tasks):
        own = np.flatnonzero(place == i)
        color, marker = theme.group(i), "os"[i // len(theme.groups) % 2]
        axes.scatter(
            across[own], [true[j][0] for j in own], s=22, color=color, marker=marker, label=name(task, 20), zorder=3
        )
        for j in own[[len(true[j]) > 1 for j in own]]:
            axes.plot([across[j]] * 2, [true[j].min(), true[j].max()], color=color, linewidth=1.2, alpha=0.7, zorder=2)
    axes.grid()
