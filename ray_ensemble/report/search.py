"""The end of `ray-ensemble search`: objective by number of groups, the groups, who does harm, and who learns nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ray_ensemble.report.facts import count, number, plain
from ray_ensemble.report.figures_run import rows_by_m
from ray_ensemble.report.load import load_search
from ray_ensemble.report.tables import text_table

DIGITS = 4  # partitions differ in the third decimal
WIDTH = 24
NAMED = 60


def search_summary(folder: Path) -> Group:
    """What the search found, as a rich renderable: a row for each number of groups, and the groups.

    Raises:
        InputError: `partition.json` is missing or damaged.
    """
    partition = load_search(folder).partition
    parts: list[RenderableType] = [_table(partition)]
    for index, group in enumerate(partition["groups"]):
        more = f" and {len(group) - NAMED} more" if len(group) > NAMED else ""
        names = ", ".join(plain(task, WIDTH) for task in group[:NAMED])
        parts.append(Text(f"  group-{index}: {names}{more}"))
    harmful = partition.get("harmful") or []
    parts += [_harm(harm) for harm in harmful]
    parts += [_unlearnt(each) for each in partition.get("unlearnt") or []]
    plot = folder / "plots" / "search.png"
    if plot.is_file():
        parts.append(Text(f"Plot: {plot}", overflow="fold"))
    return Group(*parts)


def _table(partition: dict[str, Any]) -> Table:
    kind = "1 − estimated accuracy" if partition.get("metric") == "accuracy" else "estimated loss in nats"
    price = partition.get("price") or 0.0
    rule = str(partition.get("rule", "best")).replace("_", " ")
    about = f" + {price:g} an adapter" if price else ""
    table = text_table(
        title=f"Mean {kind}{about}, by number of groups",
        caption=f"spread: standard deviation over trials; * chosen by the rule '{rule}'; "
        "± one standard error of the difference, paired over datasets",
    )
    for column in ("m", "trials", "best", "mean", "spread", "best, report half", "minus best of all"):
        table.add_column(column, justify="right")
    for row in rows_by_m(partition):
        chosen = "*" if row["m"] == partition.get("m") else ""
        difference = number(row.get("difference"), DIGITS, sign=True)
        table.add_row(
            f"{chosen}{row['m']}",
            str(row.get("trials", "–")),
            *(number(row.get(key), DIGITS) for key in ("search_objective", "mean", "std", "objective")),
            f"{difference} ± {number(row.get('standard_error'), DIGITS)}",
        )
    return table


def _harm(harm: dict[str, Any]) -> Text:
    partners = count(int(harm["partners"]), "partner")
    effect, error = number(harm["effect"], DIGITS, sign=True), number(harm["standard_error"], DIGITS)
    return Text(f"  {plain(harm['task'], WIDTH)} harms what trains beside it: {effect} ± {error} over {partners}")


def _unlearnt(each: dict[str, Any]) -> Text:
    gain, error = number(each["gain"], DIGITS, sign=True), number(each["standard_error"], DIGITS)
    return Text(
        f"  {plain(each['task'], WIDTH)} is not predicted better than by its labels' frequencies: {gain} ± {error}"
    )
