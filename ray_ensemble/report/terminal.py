"""The summary at the end of `ray-ensemble run`: the table, the difference, the partition, the cost, the report's path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from ray_ensemble.report import facts
from ray_ensemble.report.facts import number, plain
from ray_ensemble.report.load import VARIANTS, RunData, load_run

ROWS = 60
_SHOWN = ("base", "qlora_all", "ensemble")


def terminal_summary(folder: Path) -> Group:
    """The end of a run as a rich renderable for 100 to 120 columns (narrower terminals wrap the intervals).

    Raises:
        InputError: a file of a finished run is missing or damaged; it is named.
    """
    data = load_run(folder)
    return Group(
        _table(data), *_differences(data), Text(), *_partition(data), Text(), *_cost(data), Text(), _path(folder)
    )


def _table(data: RunData) -> Table:
    shown = facts.extremes(data, ROWS)
    caption = "[ ]: 95% intervals; bold: best of the three"
    if len(shown) < len(data.order):
        caption += f"; {len(shown)} of {len(data.order)} datasets, with the largest gains and losses"
    table = Table(
        title="Test splits", caption=caption, title_justify="left", caption_justify="left", box=None, pad_edge=False
    )
    table.add_column("dataset", overflow="fold")
    table.add_column("n", justify="right")
    for variant in _SHOWN:
        table.add_column(f"{VARIANTS[variant]}\nloss", justify="right", no_wrap=False)
        table.add_column("\naccuracy", justify="right")
    for task in shown:
        table.add_row(*_row(data, task))
    table.add_section()
    table.add_row(*_row(data, None), style="italic")
    return table


def _row(data: RunData, task: str | None) -> list[Text]:
    found = [data.measured(task, variant) for variant in _SHOWN]
    n = next((str(each["n"]) for each in found if "n" in each), "–")
    cells = [Text(plain(task, 24) if task is not None else f"mean of {len(data.order)}"), Text(n)]
    for each in found:
        for measure, best in (("loss", min), ("accuracy", max)):
            known = [other[measure] for other in found if measure in other]
            style = "bold" if measure in each and each[measure] == best(known) else ""
            cells.append(_cell(each, measure, style))
    return cells


def _cell(found: dict[str, Any], measure: str, style: str) -> Text:
    """`.576 [.51 .64]`: short, so that six of them fit a terminal."""
    if measure == "accuracy":
        cell = Text(f"{100 * found[measure]:.1f}%" if measure in found else "–", style)
    else:
        cell = Text(number(found.get(measure)), style)
    bounds = found.get(f"{measure}_interval")
    if bounds:
        low, high = (100 * bounds[0], 100 * bounds[1]) if measure == "accuracy" else bounds
        digits = 0 if measure == "accuracy" else 2
        cell.append(f" [{number(low, digits)}–{number(high, digits)}]", "not bold dim")
    return cell


def _differences(data: RunData) -> list[Text]:
    lines = [Text("\nEnsemble − one QLoRA on all, same test examples", "bold")]
    for measure in ("loss", "accuracy"):
        found = facts.comparison(data, measure)
        line = Text(f"  {measure:<9}")
        line.append(f"{found.text()}: {found.verdict}" if found else "not measured for both")
        lines.append(line)
    behind = facts.worse(data, "loss")
    if behind:
        names = ", ".join(f"{plain(task, 24)} (+{number(by)})" for task, by in behind[:8])
        more = f" and {len(behind) - 8} more" if len(behind) > 8 else ""
        lines.append(Text(f"  higher loss than one QLoRA on all: {names}{more}"))
    else:
        lines.append(Text("  higher loss than one QLoRA on all: no dataset"))
    return lines


def _partition(data: RunData) -> list[Text]:
    found = data.partition
    estimate = found.get("objective")
    kind = "1 − accuracy" if found.get("metric") == "accuracy" else "loss"
    about = f", estimated {kind} {number(estimate)}" if isinstance(estimate, int | float) else ""
    lines = [
        Text(f"Partition: {len(data.groups)} groups ({plain(found.get('method', 'method unknown'))}{about})", "bold")
    ]
    for index, group in enumerate(data.groups):
        names = ", ".join(plain(task, 24) for task in group[:ROWS])
        more = f" and {len(group) - ROWS} more" if len(group) > ROWS else ""
        lines.append(Text(f"  {plain(data.group_name(index))}: {names}{more}"))
    return lines


def _cost(data: RunData) -> list[Text]:
    lines = [Text("Cost", "bold")]
    ratio, parts = facts.flops_ratio(data), facts.ratio_parts(data)
    if ratio is None:
        lines.append(Text("  operations  not counted"))
    else:
        split = f" = {' + '.join(parts)}" if parts else ""
        lines.append(Text(f"  operations  {number(ratio, 2)} × one QLoRA on all{split}"))
    times = {k: v for k, v in (data.metrics.get("seconds") or {}).items() if isinstance(v, int | float)}
    each = ", ".join(f"{plain(stage)} {facts.seconds(value)}" for stage, value in times.items())
    lines.append(
        Text(f"  time        {facts.seconds(sum(times.values()))}: {each}" if times else "  time        not kept")
    )
    peaks = {k: v for k, v in (data.metrics.get("peak_memory_bytes") or {}).items() if isinstance(v, int | float)}
    if peaks:
        each = ", ".join(f"{plain(stage)} {facts.size(value)}" for stage, value in peaks.items())
        lines.append(Text(f"  peak memory {facts.size(max(peaks.values()))}: {each}"))
    else:
        lines.append(Text("  peak memory not measured"))
    return lines


def _path(folder: Path) -> Text:
    report = folder / "report.html"
    if report.is_file():
        return Text.assemble("Report: ", (str(report), "bold"), no_wrap=True, overflow="fold")
    return Text("Report: not written yet (ray-ensemble report)")
