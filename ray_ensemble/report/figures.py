"""The plots of results: affinity, test bars, estimates against truth. Each is a `Drawing`, or says why there is none."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from ray_ensemble.report.facts import Measure, estimated_and_real, extremes, number
from ray_ensemble.report.load import VARIANTS, RunData
from ray_ensemble.report.theme import WIDTH, Theme, name

ANNOTATED_TASKS = 12
NAMED_TASKS = 60  # above this, names on the axes of the heat map would overlap
BARS_TASKS = 30
NAMED_POINTS = 20

_PLOT_POINTS = 310  # side of the scatter plot's axes, about, in points of 1/72 inch


@dataclass(frozen=True)
class Drawing:
    """A figure to be: its file name, one sentence on how to read it, and the function that draws it in a theme."""

    name: str
    caption: str
    draw: Callable[[Theme], Figure]


@dataclass(frozen=True)
class Missing:
    """Why there is no figure of that name, in words."""

    name: str
    reason: str


def affinity_map(data: RunData) -> Drawing | Missing:
    """Who helps whom: every row of the affinity minus its off-diagonal mean, groups outlined."""
    n = len(data.order)
    if n < 2:
        return Missing("affinity", "There is no affinity to draw between fewer than two datasets.")
    effect = relative_affinity(data.affinity)
    measure = "accuracy" if data.affinity_info.get("metric") == "accuracy" else "loss (nats)"
    noise = ""
    if data.affinity_errors is not None and np.isfinite(data.affinity_errors).any():
        typical = float(np.nanmedian(data.affinity_errors))
        noise = f" The median standard error of a value over subsets is {number(typical, _digits(effect) + 1)}."
    caption = (
        f"Row i, column j: how much better (blue) or worse (red) the estimated {measure} of dataset i is when its subset "
        f"also holds j, against i's mean over all partners; the outlines are the groups.{noise}"
    )
    return Drawing("affinity", caption, partial(_draw_affinity, data, effect))


def relative_affinity(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Each row minus the mean of its off-diagonal values; the diagonal, which compares with nobody, is NaN."""
    off = np.where(np.eye(len(values), dtype=bool), np.nan, values)
    known = np.isfinite(off)
    means = np.where(known, off, 0.0).sum(axis=1) / np.maximum(known.sum(axis=1), 1)
    return np.asarray(off - means[:, None], dtype=np.float64)


def _digits(effect: NDArray[np.float64]) -> int:
    """Decimals that give the largest effect two figures."""
    largest = float(np.nanmax(np.abs(effect))) if np.isfinite(effect).any() else 0.0
    return min(max(1 - math.floor(math.log10(largest)), 1), 5) if largest > 0 else 2


def _draw_affinity(data: RunData, effect: NDArray[np.float64], theme: Theme) -> Figure:
    n = len(data.order)
    side = min(max(0.52 * n + 1.8, 4.2), WIDTH)
    figure = Figure(figsize=(min(side + 1.2, WIDTH), side), layout="constrained")
    axes = figure.add_subplot()
    limit = float(np.nanmax(np.abs(effect))) if np.isfinite(effect).any() else 0.0
    norm = TwoSlopeNorm(0.0, -(limit or 1.0), limit or 1.0)
    image = axes.imshow(np.ma.masked_invalid(effect), cmap=theme.diverging(), norm=norm, aspect="equal")
    axes.spines[:].set_visible(False)
    if n <= NAMED_TASKS:
        names = [name(task, 20) for task in data.order]
        small = 9.5 if n <= 25 else 6.5
        axes.set_xticks(
            range(n), names, rotation=45 if n <= 25 else 90, ha="left", rotation_mode="anchor", fontsize=small
        )
        axes.set_yticks(range(n), names, fontsize=small)
        axes.tick_params(top=True, bottom=False, labeltop=True, labelbottom=False, pad=4)
        axes.tick_params(axis="x", colors=theme.ink)
    else:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_xlabel(f"{n} datasets, in the order of the groups")
    if n <= ANNOTATED_TASKS:
        digits = _digits(effect)
        for i, j in np.ndindex(n, n):
            if math.isfinite(effect[i, j]):
                strong = abs(effect[i, j]) > 0.6 * limit
                text = number(effect[i, j], digits, sign=True).replace("0.", ".", 1)
                color = "#ffffff" if strong else theme.ink
                axes.text(j, i, text, ha="center", va="center", fontsize=8, color=color)
    start = 0
    for group in data.groups:
        corner = (start - 0.5, start - 0.5)
        size = len(group)
        axes.add_patch(Rectangle(corner, size, size, fill=False, edgecolor=theme.ink, linewidth=2, clip_on=False))
        start += size
    bar = figure.colorbar(image, ax=axes, shrink=0.6, pad=0.03)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, colors=theme.muted)
    bar.set_label("hurts  ←   against an average partner   →  helps", fontsize=8)
    return figure


def test_bars(data: RunData) -> Drawing | Missing:
    """Test loss and accuracy of the base, one QLoRA on all and the ensemble, with their intervals."""
    shown = extremes(data, BARS_TASKS)
    part = ""
    if len(shown) < len(data.order):
        part = f" Of {len(data.order)} datasets these are the {len(shown)} with the largest gains and losses."
    caption = (
        "Loss (left, shorter is better) and accuracy (right, longer is better) on each dataset's test split, whiskers the "
        f"95% intervals; the dotted tick is an even guess among the labels.{part}"
    )
    return Drawing("test", caption, partial(_draw_bars, data, shown))


def _draw_bars(data: RunData, shown: tuple[str, ...], theme: Theme) -> Figure:
    variants = {"base": theme.base, "qlora_all": theme.joint, "ensemble": theme.ours}
    figure = Figure(figsize=(WIDTH, 0.58 * len(shown) + 1.3), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    measures: tuple[tuple[Axes, Measure], ...] = ((left, "loss"), (right, "accuracy"))
    for axes, measure in measures:
        for place, (variant, color) in enumerate(variants.items()):
            _bars_of(axes, data, shown, measure, variant, (place - 1) * 0.25, color, theme)
        for row, task in enumerate(shown):
            labels = len(data.tasks[task].get("labels") or [])
            if labels > 1:
                guess = math.log(labels) if measure == "loss" else 1 / labels
                # Counted in label widths from the row's middle, so that it spans the three bars.
                axes.plot([guess, guess], [row - 0.42, row + 0.42], color=theme.ink, linestyle=":", linewidth=1.3)
        for row in range(1, len(shown)):
            if data.group_of(shown[row]) != data.group_of(shown[row - 1]):
                axes.axhline(row - 0.5, color=theme.muted, linewidth=0.8)
        axes.set_title(f"test {measure}{' (nats)' if measure == 'loss' else ''}")
        axes.grid(axis="x")
        axes.spines["bottom"].set_visible(False)
        axes.set_xlim(left=0, right=1 if measure == "accuracy" else None)
    left.set_yticks(range(len(shown)), [name(task) for task in shown])
    left.set_ylim(len(shown) - 0.45, -0.55)
    handles, texts = left.get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside upper left", ncols=3)
    return figure


def _bars_of(
    axes: Axes,
    data: RunData,
    shown: tuple[str, ...],
    measure: Measure,
    variant: str,
    offset: float,
    color: str,
    theme: Theme,
) -> None:
    rows, values, whiskers = [], [], []
    for row, task in enumerate(shown):
        found = data.measured(task, variant)
        if measure in found:
            value = float(found[measure])
            low, high = found.get(f"{measure}_interval") or (value, value)
            rows.append(row + offset)
            values.append(value)
            whiskers.append((max(value - low, 0.0), max(high - value, 0.0)))
    if rows:
        axes.barh(rows, values, height=0.22, color=color, label=VARIANTS[variant])
        axes.errorbar(values, rows, xerr=np.array(whiskers).T, fmt="none", ecolor=theme.ink, elinewidth=0.9, alpha=0.75)


def estimates(data: RunData) -> Drawing | Missing:
    """Loss that the first-order estimate promised against the loss that training reached."""
    pairs = estimated_and_real(data)
    if not pairs:
        reason = "partition.json holds no estimates by dataset, or metrics.json no group adapters, to compare."
        return Missing("estimates", reason)
    caption = (
        "A point a dataset: across, the loss that the first-order estimate promised for its group (validation); up, the "
        "test loss after its group was really trained; on the line the promise was kept, above it the training did worse."
    )
    return Drawing("estimates", caption, partial(_draw_estimates, data, pairs))


def _draw_estimates(data: RunData, pairs: list[tuple[str, float, float]], theme: Theme) -> Figure:
    figure = Figure(figsize=(6.2, 5.2), layout="constrained")
    axes = figure.add_subplot()
    low = min(min(estimate, real) for _, estimate, real in pairs)
    high = max(max(estimate, real) for _, estimate, real in pairs)
    margin = 0.12 * (high - low) or 0.1
    low, high = max(low - margin, 0.0), high + margin
    axes.plot([low, high], [low, high], color=theme.muted, linewidth=1, linestyle="--", zorder=1)
    for index in range(len(data.groups)):
        of_group = [(estimate, real) for task, estimate, real in pairs if data.group_of(task) == index]
        if of_group:
            label = name(data.group_name(index)) if len(data.groups) <= 8 else None
            across, up = zip(*of_group, strict=True)
            axes.scatter(across, up, s=46, color=theme.group(index), edgecolors=theme.surface, label=label, zorder=3)
    if len(pairs) <= NAMED_POINTS:
        for (task, estimate, real), (offset, side) in zip(pairs, _places(pairs, low, high), strict=True):
            text, at = name(task, 20), (estimate, real)
            # A name that had to step aside is tied to its point by a line.
            line = {"arrowstyle": "-", "color": theme.muted, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 3}
            tie = line if offset[1] else None
            axes.annotate(
                text, at, offset, textcoords="offset points", ha=side, va="center", fontsize=8, arrowprops=tie, zorder=4
            )
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    axes.set_aspect("equal")
    axes.set_xlabel("estimated validation loss (nats)")
    axes.set_ylabel("test loss of the group's adapter (nats)")
    axes.grid()
    if len(data.groups) <= 8:
        axes.legend(loc="upper left", fontsize=8)
    return figure


def _places(pairs: list[tuple[str, float, float]], low: float, high: float) -> list[tuple[tuple[int, int], str]]:
    """For each point where its name goes: the first place around it where it covers no point and no name set before."""
    scale = _PLOT_POINTS / (high - low)
    dots = [((x - low) * scale, (y - low) * scale) for _, x, y in pairs]
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in dots]
    found = []
    for (task, _, _), (x, y) in zip(pairs, dots, strict=True):
        width = 4.8 * min(len(task), 20)
        options = [
            ((dx, dy), side)
            for dy in (0, 9, -9, 18, -18, 27, -27)
            for dx, side in ((8 + abs(dy) // 3, "left"), (-8 - abs(dy) // 3, "right"))
        ]
        boxes = [
            (
                x + dx - (width if side == "right" else 0),
                y + dy - 5,
                x + dx + (width if side == "left" else 0),
                y + dy + 5,
            )
            for (dx, dy), side in options
        ]
        inside = [box[0] > 0 and box[2] < _PLOT_POINTS for box in boxes]
        free = [not any(_overlap(box, other) for other in taken) for box in boxes]
        best = next((i for i in range(len(boxes)) if inside[i] and free[i]), 0)
        taken.append(boxes[best])
        found.append(options[best])
    return found


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
