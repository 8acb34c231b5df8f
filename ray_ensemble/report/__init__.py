"""The report of a run: one self-contained HTML page with its plots, and the summary that ends `ray-ensemble run`."""

from __future__ import annotations

from ray_ensemble.report.terminal import terminal_summary
from ray_ensemble.report.validation import validation_summary
from ray_ensemble.report.write import write_report, write_validation_plot

__all__ = ["terminal_summary", "validation_summary", "write_report", "write_validation_plot"]
