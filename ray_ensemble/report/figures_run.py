"""The plots of how the run went: objective against m, training curves, cost."""

from __future__ import annotations

from functools import partial
from statistics import fmean, pstdev
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ray_ensemble.report.facts import (
    FlopsPart,
    figures,
    flops_parts,
    flops_reference,
    number,
    operations,
    seconds,
    share,
)
from ray_ensemble.report.figures import Drawing, Missing
from ray_ensemble.report.load import Curve, RunData, SearchData
from ray_ensemble.report.theme import WIDTH, Theme, name

SMOOTHING = 20  # the window of a curve is its length divided by this
MARKERS = "osD^vP*X"


def search_plot(data: RunData | SearchData) -> Drawing | Missing:
    """Objective of every trial against the number of groups, or best, mean and spread by m where no trials are kept."""
    by_m = rows_by_m(data.partition)
    if not data.trials and not by_m:
        return Missing("search", "There are no trials and partition.json has no summary by m, so no plot against m.")
    if data.trials:
        what = (
            "a mark is one trial, the line joins the best at each m, the grey band is the mean ± one standard deviation"
        )
    else:
        what = "the line joins the best at each m, the grey band is the mean ± one standard deviation over trials"
    bars = ""
    if any(row.get("standard_error") for row in by_m):
        bars = "; a bar is one standard error of the difference to the best of all, paired over datasets"
    caption = (
        f"Objective of the search (lower is better) against the number of groups m: {what}{bars}; "
        "the ring is what was chosen."
    )
    return Drawing("search", caption, partial(_draw_search, data, by_m))


def rows_by_m(partition: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of `by_m` in partition.json that have a number of groups and its best objective, by m."""
    rows = [row for row in partition.get("by_m") or [] if isinstance(row, dict)]
    return sorted((row for row in rows if {"m", "search_objective"} <= row.keys()), key=lambda row: int(row["m"]))


def _draw_search(data: RunData | SearchData, by_m: list[dict[str, Any]], theme: Theme) -> Figure:
    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    axes = figure.add_subplot()
    if data.trials:
        groups = sorted({trial.m for trial in data.trials})
        at = {m: [trial.objective for trial in data.trials if trial.m == m] for m in groups}
        best, mean, spread = ([f(at[m]) for m in groups] for f in (min, fmean, pstdev))
    else:
        groups, best = [int(row["m"]) for row in by_m], [float(row["search_objective"]) for row in by_m]
        mean = [float(row.get("mean", row["search_objective"])) for row in by_m]
        spread = [float(row.get("std") or 0.0) for row in by_m]
    low, high = np.subtract(mean, spread), np.add(mean, spread)
    if len(groups) > 1:
        axes.fill_between(groups, low, high, color=theme.base, alpha=0.25, linewidth=0)
        axes.plot(groups, mean, color=theme.base, linewidth=1.2)
    else:
        axes.errorbar(groups, mean, yerr=spread, color=theme.base, capsize=4)
    axes.plot(groups, best, color=theme.ink, linewidth=1.2, zorder=2)
    errors = {int(row["m"]): float(row.get("standard_error") or 0.0) for row in by_m}
    if any(errors.values()):
        bars = [errors.get(m, 0.0) for m in groups]
        axes.errorbar(groups, best, yerr=bars, fmt="none", ecolor=theme.ink, elinewidth=1.0, capsize=3, zorder=2)
    methods = sorted({trial.method for trial in data.trials})
    for index, method in enumerate(methods):
        shift = (index - (len(methods) - 1) / 2) * 0.08
        own = [trial for trial in data.trials if trial.method == method]
        across, up = [trial.m + shift for trial in own], [trial.objective for trial in own]
        marker, color = MARKERS[index % len(MARKERS)], theme.group(index)
        axes.scatter(across, up, s=26, marker=marker, color=color, alpha=0.8, label=name(method), zorder=3)
    chosen = data.partition.get("search_objective", data.partition.get("objective"))
    m = int(data.partition.get("m", len(data.partition["groups"])))
    if isinstance(chosen, int | float):
        axes.scatter(
            [m], [chosen], s=150, facecolors="none", edgecolors=theme.ink, linewidths=1.8, label="chosen", zorder=4
        )
    axes.set_xticks(groups)
    axes.set_xlabel("number of groups m")
    accuracy = data.partition.get("metric") == "accuracy"
    price = " + price · m" if data.partition.get("price") else ""
    axes.set_ylabel(("1 − estimated accuracy" if accuracy else "estimated loss (nats)") + price)
    axes.grid(axis="y")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    return figure


def training_curves(data: RunData) -> Drawing | Missing:
    """Smoothed training losses of every group's adapter and of the one adapter on all data."""
    if not data.curves:
        return Missing("training", "No adapter left a training log, so there are no curves.")
    caption = (
        "Training loss against optimiser steps, each point the mean over the last 5% of that adapter's steps; the dashed "
        "curve is the one QLoRA on all data, which gets as many steps as all groups together."
    )
    return Drawing("training", caption, partial(_draw_curves, data))


def smooth(values: tuple[float, ...], window: int) -> NDArray[np.float64]:
    """Mean over the last `window` values, over fewer at the start."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return np.asarray((sums[ends] - sums[starts]) / (ends - starts), dtype=np.float64)


def _draw_curves(data: RunData, theme: Theme) -> Figure:
    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    axes = figure.add_subplot()
    groups = [curve for curve in data.curves if curve.name in data.adapters]
    for curve in data.curves:
        line = smooth(curve.losses, max(1, len(curve.losses) // SMOOTHING))
        label = name(_label(data, curve), 40) if len(groups) <= 12 or curve not in groups else None
        if curve in groups:
            index = data.adapters.index(curve.name)
            style = ("-", (0, (6, 1)), (0, (2, 1)))[(index // len(theme.groups)) % 3]
            axes.plot(curve.steps, line, color=theme.group(index), linestyle=style, label=label)
        else:
            axes.plot(curve.steps, line, color=theme.ink, linestyle="--", linewidth=1.4, label=label)
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("training loss (nats)")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(axis="y")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    return figure


def _label(data: RunData, curve: Curve) -> str:
    if curve.name not in data.adapters:
        return curve.name
    index = data.adapters.index(curve.name)
    return f"{curve.name}: {', '.join(data.groups[index])}" if index < len(data.groups) else curve.name


def cost_bars(data: RunData) -> Drawing | Missing:
    """Operations by stage, stacked, beside those of one QLoRA on all data; and seconds by stage."""
    parts, reference = flops_parts(data), flops_reference(data)
    times = figures(data, "seconds")
    if (not parts or reference is None) and not times:
        return Missing("cost", "metrics.json holds neither FLOPs nor seconds, so there is no plot of the cost.")
    caption = (
        "Above: floating-point operations of the ensemble, stacked by stage, beside those of one QLoRA on all data; "
        "below: wall-clock seconds of each stage of this run."
    )
    return Drawing("cost", caption, partial(_draw_cost, parts, reference, times))


def _draw_cost(parts: list[FlopsPart], reference: float | None, times: dict[str, float], theme: Theme) -> Figure:
    rows = max(len(times), 1)
    figure = Figure(figsize=(WIDTH, 2.4 + 0.32 * rows), layout="constrained")
    top, bottom = figure.subplots(2, 1, height_ratios=[1.5, 0.32 * rows + 0.3])
    if parts and reference is not None:
        left = 0.0
        for index, part in enumerate(parts):
            length = part.flops / reference
            label = f"{part.name} {share(length)}"
            top.barh(
                [0], [length], left=left, height=0.55, color=theme.group(index), edgecolor=theme.surface, label=label
            )
            left += length
        top.barh([1], [1.0], height=0.55, color=theme.base)
        for row, value in enumerate((left, 1.0)):
            text = f"{number(value, 2)}  ({operations(value * reference)})"
            top.annotate(text, (value, row), (6, 0), textcoords="offset points", va="center", fontsize=8.5)
        top.set_xlim(0, 1.25 * max(left, 1.0))
        top.set_yticks([0, 1], ["ensemble", "one QLoRA on all"])
        top.set_ylim(1.5, -0.5)
        top.set_title("FLOPs, as multiples of one QLoRA on all data")
        top.legend(loc="upper left", bbox_to_anchor=(-0.02, -0.12), ncols=3, fontsize=8)
    else:
        top.set_title("FLOPs were not counted")
        top.set_yticks([])
    bottom.barh(range(len(times)), list(times.values()), height=0.6, color=theme.joint)
    for row, value in enumerate(times.values()):
        bottom.annotate(seconds(value), (value, row), (6, 0), textcoords="offset points", va="center", fontsize=8.5)
    bottom.set_yticks(range(len(times)), [name(stage) for stage in times])
    bottom.set_ylim(rows - 0.5, -0.5)
    bottom.set_xlim(0, 1.12 * (max(times.values(), default=0.0) or 1.0))
    bottom.set_title("seconds by stage" if times else "seconds were not kept")
    for axes in (top, bottom):
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
    return figure
