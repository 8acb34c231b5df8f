"""Actors of `scaling_measure.py` whose units take no time. They import next to nothing, so that they start at once."""

from __future__ import annotations

import time
from typing import Any

import numpy as np


class Echo:
    """Hands back features of so many rows of `dim` numbers, and their margins, as a unit of the gradient pass does."""

    def __init__(self, dim: int) -> None:
        self._dim = dim

    def work(self, rows: int) -> dict[str, Any]:
        """A unit's arrays."""
        return {"features": np.ones((rows, self._dim), np.float32), "margins": np.ones(rows, np.float32)}


class Idle:
    """Waits."""

    def wait(self, seconds: float) -> None:
        """Return after so many seconds."""
        time.sleep(seconds)
