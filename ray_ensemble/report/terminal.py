"""The summary at the end of `ray-ensemble run`: the table, the difference, the partition, the cost, the report's path."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from ray_ensemble.report import facts
from ray_ensemble.report.facts import MEASURES, Measure, change, measured, number, plain
from ray_ensemble.report.load import RIVALS, RunData, load_run
from ray_ensemble.report.tables import text_table

ROWS = 60
NAMES = 8
WIDTH = 24
SHORT = {"base": "base", "qlora_all": "one QLoRA", "ensemble": "ensemble"}


def terminal_summary(folder: Path) -> Group:
    """The end of a run as a rich renderable for 100 to 120 columns; narrower ones get the intervals on a second line.

    Raises:
        InputError: a file of a finished run is missing or damaged; it is named.
    """
    data = load_run(folder)
    parts = [
        _Results(data),
        *_means(data),
        *_differences(data),
        *_partition(data),
        *_boosting(data),
        *_router(data),
        *_cost(data),
        _path(folder),
    ]
    return Group(*parts)


def unseen_summary(found: Mapping[str, Any]) -> Group:
    """The weights of a dataset that was not in the run (`unseen/<name>.json`) as a rich renderable."""
    rows = [
        (plain(name, WIDTH), number(weight, 3))
        for name, weight in zip(found["adapters"], found["weights"], strict=True)
    ]
    rows.append(("scale", number(found["scale"], 3)))
    if found["method"] == "examples":
        losses = found["held_out"]
        used, labelled = found["examples"], found["labelled"]
        about = f"{used:,} of " * (used < labelled) + facts.count(labelled, "labelled example")
        rows.append(("held-out loss", f"{number(losses['learned'])}, {number(losses['uniform'])} with uniform weights"))
    else:
        about = f"the hidden states of {facts.count(found['examples'], 'prompt')}"
        near = sorted(found["datasets"].items(), key=lambda item: -item[1]["cosine"])[:NAMES]
        rows.append(
            ("most similar", ", ".join(f"{plain(task, WIDTH)} {number(each['cosine'], 2)}" for task, each in near))
        )
    return Group(*_block(f"Weights for {plain(found['name'], WIDTH)} from {about}", rows))


@dataclass(frozen=True)
class _Results:
    """The table of results, with each interval beside its figure where there is room and else below it."""

    data: RunData

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        beside = _table(self.data, " ")
        fits = Measurement.get(console, options.update(max_width=1000), beside).maximum <= options.max_width
        yield beside if fits else _table(self.data, "\n")


def _table(data: RunData, between: str) -> Table:
    shown = facts.extremes(data, ROWS)
    caption = "[ ] 95% interval; one QLoRA: one adapter on all datasets; bold: best of the three"
    if len(shown) < len(data.order):
        caption += f"; {len(shown)} of {len(data.order)} datasets, those with the largest gains and losses"
    table = text_table(
        title="Test splits",
        caption=caption,
        gap=2 if between == " " else 1,
    )
    table.add_column("\ndataset", overflow="fold")
    table.add_column("\nn", justify="right")
    for variant in RIVALS:
        for measure in MEASURES:
            table.add_column(f"{SHORT[variant]}\n{measure}", justify="right", overflow="fold")
    for task in shown:
        table.add_row(*_row(data, task, between))
    table.add_row()
    table.add_row(*_row(data, None, between))
    return table


def _row(data: RunData, task: str | None, between: str) -> list[Text]:
    found = [data.measured(task, variant) for variant in RIVALS]
    n = next((str(each["n"]) for each in found if "n" in each), "–")
    cells = [Text(plain(task, WIDTH) if task is not None else f"mean of {len(data.order)}"), Text(n)]
    for variant, each in zip(RIVALS, found, strict=True):
        for measure in MEASURES:
            style = "bold" if facts.is_best(data, task, variant, measure) else ""
            cells.append(_cell(each, measure, style, between))
    return cells


def _cell(found: dict[str, Any], measure: Measure, style: str, between: str) -> Text:
    """`0.576 [0.51–0.64]`: the figure and, shorter, its interval."""
    cell = Text(measured(measure, found.get(measure)), style)
    around = facts.span(measure, found.get(f"{measure}_interval"), digits=2 if measure == "loss" else 0)
    if around:
        cell.append(between + around, "not bold dim")
    return cell


def _block(title: str, rows: list[tuple[str, str]]) -> list[RenderableType]:
    """A title and rows of a key and a text that wraps beside it."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for key, text in rows:
        grid.add_row(Text(f"  {key}"), Text(text))
    return [Text(f"\n{title}", "bold"), grid]


def _means(data: RunData) -> list[RenderableType]:
    rows = list(facts.means(data, SHORT).items())
    return _block("Means over datasets", rows) if rows else []


def _differences(data: RunData) -> list[RenderableType]:
    rows: list[tuple[str, str]] = []
    for measure in MEASURES:
        found = facts.comparison(data, measure)
        rows.append((measure, f"{found.text()}: {found.verdict}" if found else "not measured for both"))
    for measure, title in zip(MEASURES, ("higher loss on", "less accurate on"), strict=True):
        behind = facts.worse(data, measure)
        sign = 1 if measure == "loss" else -1
        names = ", ".join(f"{plain(task, WIDTH)} ({change(measure, sign * by)})" for task, by in behind[:NAMES])
        more = f" and {len(behind) - NAMES} more" if len(behind) > NAMES else ""
        rows.append((title, f"{names}{more}" if behind else "no dataset"))
    return _block("Ensemble − one QLoRA on all, on the same test examples", rows)


def _partition(data: RunData) -> list[RenderableType]:
    found = data.partition
    kind = "1 − accuracy" if found.get("metric") == "accuracy" else "loss"
    estimate = found.get("objective")
    about = f", estimated {kind} {number(estimate)}" if isinstance(estimate, int | float) else ""
    rows = []
    for index, group in enumerate(data.groups):
        more = f" and {len(group) - ROWS} more" if len(group) > ROWS else ""
        names = ", ".join(plain(task, WIDTH) for task in group[:ROWS])
        rows.append((plain(data.group_name(index), WIDTH), f"{names}{more}"))
    title = f"Partition into {facts.count(len(data.groups), 'group')} (method {plain(found.get('method', 'unknown'))}{about})"
    return _block(title, rows)


def _boosting(data: RunData) -> list[RenderableType]:
    rows = []
    for step in facts.boosting_steps(data):
        losses = [
            f"{name} loss {number(before)} → {number(after)}"
            for name, (before, after) in (("training", step.training), ("validation", step.validation))
        ]
        used = sum(size > 0 for size in step.sizes.values())
        outcome = f"used by {used} of {facts.count(len(step.sizes), 'dataset')}" if step.kept else "left out"
        rows.append((plain(step.adapter, WIDTH), f"{plain(step.group, WIDTH)}: {', '.join(losses)}; {outcome}"))
    return _block("Boosting", rows) if rows else []


def _router(data: RunData) -> list[RenderableType]:
    found = data.metrics.get("router")
    if not isinstance(found, dict):
        return []
    rows = [
        (
            "picks the dataset",
            f"{measured('accuracy', found['mean']['accuracy'])} of test texts, without their templates",
        ),
        *((f"{measure}, routed", _beside(data, measure)) for measure in MEASURES),
        (
            "end to end",
            f"{measured('accuracy', found['mean']['end_to_end'])} accuracy with the picked dataset's prompt too",
        ),
    ]
    return _block("Where an input's dataset is not known", rows)


def _beside(data: RunData, measure: Measure) -> str:
    routed, known = (data.measured(None, variant).get(measure) for variant in ("routed", "ensemble"))
    return f"{measured(measure, routed)}, {measured(measure, known)} where it is known"


def _cost(data: RunData) -> list[RenderableType]:
    ratio, parts = facts.flops_ratio(data), facts.ratio_parts(data)
    split = f" = {' + '.join(parts)}" if parts else ""
    flops = "not counted" if ratio is None else f"{number(ratio, 2)} × one QLoRA on all{split}"
    times, peaks = facts.figures(data, "seconds"), facts.figures(data, "peak_memory_bytes")
    each_time = ", ".join(f"{plain(stage)} {facts.seconds(value)}" for stage, value in times.items())
    each_peak = ", ".join(f"{plain(stage)} {facts.size(value)}" for stage, value in peaks.items())
    rows = [
        ("FLOPs", flops),
        ("time", f"{facts.seconds(sum(times.values()))}: {each_time}" if times else "not kept"),
        ("peak memory", f"{facts.size(max(peaks.values()))}: {each_peak}" if peaks else "not measured"),
    ]
    return _block("Cost", rows)


def _path(folder: Path) -> Text:
    report = folder / "report.html"
    if report.is_file():
        return Text(f"\nReport: {report}", "bold", overflow="fold")
    return Text("\nReport: not written yet (ray-ensemble report)")
