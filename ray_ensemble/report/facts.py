"""What the page and the terminal both say about a run: names fit for print, figures as text, comparisons, costs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ray_ensemble.report.load import RIVALS, RunData

Measure = Literal["loss", "accuracy"]
MEASURES: tuple[Measure, ...] = ("loss", "accuracy")
MEANS = {"macro_f1": "macro-F1", "ece": "ECE, interval less its bias"}  # told as means over datasets alone, in percent

FLOPS_PARTS = {
    "gradients": "gradients",
    "search": "search",
    "groups": "training",
    "boosting": "boosting",
    "ensemble": "weights",
    "merging": "merging",
}


def plain(text: object, width: int | None = None) -> str:
    """Text from data on one line: control characters become spaces, and what is over `width` an ellipsis."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    return line if width is None or len(line) <= width else line[: width - 1] + "…"


def count(n: int, thing: str) -> str:
    """`1 dataset`, `2 datasets`."""
    return f"{n:,} {thing}{'' if n == 1 else 's'}"


def number(value: Any, digits: int = 3, sign: bool = False) -> str:
    """A figure with a real minus sign; a dash where there is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return "–"
    text = f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
    if float(text) == 0:
        text = text.lstrip("+-")
    return text.replace("-", "−")


def measured(measure: Measure, value: Any, sign: bool = False) -> str:
    """A loss in nats, or an accuracy in percent."""
    if measure == "loss" or not isinstance(value, int | float):
        return number(value, 3, sign)
    return number(100 * value, 1, sign) + "%"


def span(measure: Measure, bounds: Any, digits: int | None = None, sign: bool = False) -> str:
    """`[low, high]` of a loss in nats or of an accuracy in percent, or nothing where there is no interval."""
    if not isinstance(bounds, list | tuple) or len(bounds) != 2:
        return ""
    scale, usual = (1, 3) if measure == "loss" else (100, 1)
    low, high = (number(scale * bound, usual if digits is None else digits, sign) for bound in bounds)
    return f"[{low}, {high}]" if sign else f"[{low}–{high}]"


def change(measure: Measure, value: Any, bounds: Any = None) -> str:
    """A difference with its interval: of losses in nats, of accuracies in percentage points."""
    if not isinstance(value, int | float):
        return "–"
    text = number(value, 3, True) if measure == "loss" else f"{number(100 * value, 1, True)} points"
    return f"{text} {span(measure, bounds, sign=True)}".rstrip()


def seconds(value: Any) -> str:
    """A duration: seconds below two minutes, then minutes and seconds, then hours and minutes."""
    if not isinstance(value, int | float):
        return "–"
    if value < 120:
        return f"{value:.1f} s" if value < 10 else f"{value:.0f} s"
    if value < 7200:
        return f"{round(value) // 60} min {round(value) % 60:02d} s"
    return f"{round(value / 60) // 60} h {round(value / 60) % 60:02d} min"


def size(value: Any) -> str:
    """An amount of memory."""
    if not isinstance(value, int | float):
        return "–"
    return f"{value / 2**30:.1f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


def operations(value: Any) -> str:
    """Floating-point operations with a power-of-ten prefix."""
    if not isinstance(value, int | float):
        return "–"
    for scale, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G")):
        if value >= scale:
            return f"{value / scale:.3g} {prefix}FLOP"
    return f"{value:.3g} FLOP"


def compact(value: Any) -> str:
    """A value of unknown shape from a JSON file, on one line."""
    if isinstance(value, float):
        return f"{value:.4g}".replace("-", "−")
    return plain(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True), 300)


@dataclass(frozen=True)
class Comparison:
    """Ensemble − one QLoRA on all, mean over datasets: the difference, its paired interval (or None), and in words."""

    measure: Measure
    difference: float
    interval: tuple[float, float] | None

    @property
    def verdict(self) -> str:
        """What the interval allows to say."""
        if self.interval is None:
            return "no paired interval was computed, so this may be chance"
        low, high = self.interval
        if low <= 0 <= high:
            return "the interval holds 0: these test sets show no difference"
        better = high < 0 if self.measure == "loss" else low > 0
        return "the ensemble is better" if better else "the ensemble is WORSE"

    def text(self) -> str:
        """The difference with its interval."""
        return change(self.measure, self.difference, self.interval)


def comparison(data: RunData, measure: Measure) -> Comparison | None:
    """The paired difference that the evaluation stored, or that of the means where it stored none."""
    paired = data.metrics.get("paired") or {}
    found = (paired.get("ensemble_vs_qlora_all") or {}).get(measure)
    if found:
        low, high = found["interval"]
        return Comparison(measure, float(found["difference"]), (float(low), float(high)))
    ours, theirs = data.measured(None, "ensemble"), data.measured(None, "qlora_all")
    if measure in ours and measure in theirs:
        return Comparison(measure, ours[measure] - theirs[measure], None)
    return None


def gain(data: RunData, task: str, measure: Measure, over: str = "qlora_all") -> float | None:
    """By how much the ensemble is better than `over` on a task: positive is better for loss and accuracy alike."""
    ours, theirs = data.measured(task, "ensemble"), data.measured(task, over)
    if measure not in ours or measure not in theirs:
        return None
    difference = float(ours[measure]) - float(theirs[measure])
    return -difference if measure == "loss" else difference


def worse(data: RunData, measure: Measure, over: str = "qlora_all") -> list[tuple[str, float]]:
    """Datasets on which the ensemble is worse than `over` and by how much, the worst first."""
    found = [(task, gain(data, task, measure, over)) for task in data.order]
    return sorted(((task, -by) for task, by in found if by is not None and by < 0), key=lambda pair: -pair[1])


def means(data: RunData, variants: Mapping[str, str]) -> dict[str, str]:
    """Each of `MEANS` that was measured, by its name: every variant's figure and interval on one line.

    Args:
        data: the run.
        variants: the names that variants are told by.
    """
    lines = {}
    for measure, name in MEANS.items():
        found = {variant: data.measured(None, variant) for variant in variants}
        told = [
            f"{variants[variant]} {number(100 * each[measure], 1)}% {span('accuracy', each.get(f'{measure}_interval'))}"
            for variant, each in found.items()
            if isinstance(each.get(measure), int | float)
        ]
        if told:
            lines[name] = ", ".join(told)
    return lines


def is_best(data: RunData, task: str | None, variant: str, measure: Measure) -> bool:
    """Whether a variant is the best of `RIVALS` on a task, or on the mean for None; equals are all best."""
    rivals = {name: data.measured(task, name).get(measure) for name in RIVALS}
    known = {name: value for name, value in rivals.items() if isinstance(value, int | float)}
    return variant in known and known[variant] == (min if measure == "loss" else max)(known.values())


def figures(data: RunData, key: str) -> dict[str, float]:
    """Figures by stage from `metrics.json`: `seconds` or `peak_memory_bytes`; empty where there are none.

    A stage has no peak memory if all it needed was in files, so that no process was measured.
    """
    found = data.metrics.get(key) or {}
    figures = {str(stage): float(value) for stage, value in found.items() if isinstance(value, int | float)}
    return {stage: value for stage, value in figures.items() if value or key != "peak_memory_bytes"}


def extremes(data: RunData, limit: int) -> tuple[str, ...]:
    """All tasks where there are at most `limit`, else the half with the largest gains in loss and the largest losses.

    Always in the order of the groups.
    """
    order = data.order
    if len(order) <= limit:
        return order
    ranked = sorted(order, key=lambda task: gain(data, task, "loss") or 0.0)
    kept = {*ranked[: limit // 2], *ranked[-(limit - limit // 2) :]}
    return tuple(task for task in order if task in kept)


@dataclass(frozen=True)
class FlopsPart:
    """One part of the cost: its key in `metrics.json`, its name, and its operations."""

    key: str
    name: str
    flops: float


def flops_parts(data: RunData) -> list[FlopsPart]:
    """The parts of the FLOPs ratio that were counted, in the order of the stages."""
    found = data.metrics.get("flops") or {}
    return [FlopsPart(key, name, float(found[key])) for key, name in FLOPS_PARTS.items() if key in found]


def flops_reference(data: RunData) -> float | None:
    """Operations of one QLoRA on all data, or None where they were not counted."""
    value = (data.metrics.get("flops") or {}).get("qlora_all")
    return float(value) if isinstance(value, int | float) and value > 0 else None


def flops_ratio(data: RunData) -> float | None:
    """The ratio as stored, or from its parts."""
    value = (data.metrics.get("flops") or {}).get("ratio")
    if isinstance(value, int | float):
        return float(value)
    reference = flops_reference(data)
    return sum(part.flops for part in flops_parts(data)) / reference if reference else None


def ratio_parts(data: RunData) -> list[str]:
    """`"gradients 0.08"`: every part as a multiple of one QLoRA on all data."""
    reference = flops_reference(data)
    if reference is None:
        return []
    return [f"{part.name} {share(part.flops / reference)}" for part in flops_parts(data)]


@dataclass(frozen=True)
class BoostingStep:
    """One boosting step: losses of its group before and after (empty where it was not tried), and step sizes by task."""

    adapter: str
    group: str
    kept: bool
    training: tuple[float | None, float | None]
    validation: tuple[float | None, float | None]
    sizes: dict[str, float]


def boosting_steps(data: RunData) -> list[BoostingStep]:
    """The boosting steps of a run, in their order, those that were left out too."""
    found = (data.ensemble.get("boosting") or {}).get("history") or []
    return [
        BoostingStep(
            str(row["adapter"]),
            data.group_name(int(row["group"])),
            bool(row["kept"]),
            tuple(row.get("train_loss") or (None, None)),
            tuple(row.get("validation_loss") or (None, None)),
            row.get("step_sizes") or {},
        )
        for row in found
    ]


def share(value: float) -> str:
    """A part of a ratio with two decimals; what is there but rounds to nothing is told from nothing."""
    return "<0.01" if 0 < value < 0.005 else number(value, 2)


def estimated_and_real(data: RunData) -> list[tuple[str, float, float]]:
    """(task, estimated validation loss, test loss of its own group's adapter) for every task that has both."""
    estimates = data.partition.get("estimates") or {}
    pairs = []
    for task in data.order:
        estimate, real = estimates.get(task), data.measured(task, "group")
        if isinstance(estimate, dict) and "loss" in estimate and "loss" in real:
            pairs.append((task, float(estimate["loss"]), float(real["loss"])))
    return pairs
