"""Writes `report.html` and `plots/*.png` of a run folder; the same inputs give the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray_ensemble.files import whole_file, whole_folder, write_text
from ray_ensemble.report import figures, figures_run, figures_validation
from ray_ensemble.report.load import load_run, load_search
from ray_ensemble.report.markup import Html, figure, paragraph, picture
from ray_ensemble.report.page import page
from ray_ensemble.report.theme import DARK, LIGHT, render

_FIGURES = (
    figures.test_bars,
    figures.affinity_map,
    figures_run.search_plot,
    figures_run.training_curves,
    figures.estimates,
    figures_run.cost_bars,
    figures_validation.validation_plot,
)


def write_search_plot(folder: Path) -> Path | None:
    """Draw objective against number of groups into `plots/search.png` as soon as the search is done.

    The report draws it again with all other plots. Returns its path, or None where there is nothing to draw.

    Raises:
        InputError: `partition.json` is missing or damaged.
    """
    return _write_plot(folder, figures_run.search_plot(load_search(folder)))


def write_validation_plot(folder: Path, validation: dict[str, Any]) -> Path | None:
    """Write `plots/validation.png` from the content of a `validation.json`; None where it holds no points."""
    return _write_plot(folder, figures_validation.drawing(validation))


def _write_plot(folder: Path, made: figures.Drawing | figures.Missing) -> Path | None:
    if isinstance(made, figures.Missing):
        return None
    path = folder / "plots" / f"{made.name}.png"
    with whole_file(path) as temporary:
        temporary.write_bytes(render(made.draw, LIGHT))
    return path


def write_report(folder: Path) -> Path:
    """Write the report of a finished run.

    Args:
        folder: a run folder in which every stage before the report is whole. `report.html` and `plots/` are written
            there; what those held before is replaced.

    Returns:
        The path of `report.html`. The page needs no network and no scripts.

    Raises:
        InputError: a file that the report needs is missing or damaged; it is named.
    """
    data = load_run(folder)
    drawn: dict[str, Html] = {}
    with whole_folder(folder / "plots") as plots:
        for make in _FIGURES:
            made = make(data)
            if isinstance(made, figures.Missing):
                drawn[made.name] = paragraph(made.reason, class_="note")
                continue
            light = render(made.draw, LIGHT)
            (plots / f"{made.name}.png").write_bytes(light)
            drawn[made.name] = figure(picture(light, render(made.draw, DARK), made.caption), made.caption)
    path = folder / "report.html"
    write_text(path, page(data, drawn))
    return path
