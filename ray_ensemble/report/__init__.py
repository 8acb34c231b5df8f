"""The report of a run: one self-contained HTML page with its plots, and the summaries that end commands."""

from __future__ import annotations

from ray_ensemble.report.search import search_summary
from ray_ensemble.report.terminal import terminal_summary, unseen_summary
from ray_ensemble.report.validation import validation_summary
from ray_ensemble.report.write import write_report, write_search_plot, write_validation_plot

__all__ = [
    "search_summary",
    "terminal_summary",
    "unseen_summary",
    "validation_summary",
    "write_report",
    "write_search_plot",
    "write_validation_plot",
]
