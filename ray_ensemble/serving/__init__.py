"""Answers of a finished run for others: an HTTP server by Ray Serve, and whole files of rows by Ray Data.

`application` needs the extra `serve` and is imported by Ray's workers alone; `requests` needs no Ray.
"""

from ray_ensemble.serving.bulk import predict_file
from ray_ensemble.serving.requests import Refused, check_row, check_rows, parse_body, tasks_of
from ray_ensemble.serving.server import serve_run

__all__ = ["Refused", "check_row", "check_rows", "parse_body", "predict_file", "serve_run", "tasks_of"]
