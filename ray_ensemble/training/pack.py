"""A pack of adapters that one Ray Train run trains, and what its folder tells of interruptions.

Ray Train's controllers read this too, so it imports neither torch nor PEFT: those take seconds in every process.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ray_ensemble.files import jsonl_appender
from ray_ensemble.training.cache import AdapterJob

_INTERRUPTIONS = "interruptions.jsonl"
Interruption = Literal["memory", "preemption", "failure"]


@dataclass(frozen=True)
class Pack:
    """Adapters that one Ray Train run trains: its name, and the jobs by key. Most packs hold one."""

    name: str
    jobs: dict[str, AdapterJob]

    def folder(self, run: Path) -> Path:
        """Where Ray Train keeps the pack's checkpoints."""
        return run / "checkpoints" / self.name

    def log(self, run: Path, key: str) -> Path:
        """Where a job's steps are logged while it trains."""
        return self.folder(run) / "logs" / f"{key}.jsonl"

    def read_by(self, rank: int) -> tuple[str, ...]:
        """Names in the run folder of what a worker reads of earlier attempts, besides checkpoints; the first one writes there."""
        return tuple(
            f"checkpoints/{self.name}/{name}" for name in (_INTERRUPTIONS, *(("logs", "failed") if rank == 0 else ()))
        )

    def told(self) -> tuple[str, ...]:
        """Names in the run folder of what workers tell of how far they are."""
        return tuple(f"checkpoints/{self.name}/{name}" for name in (_INTERRUPTIONS, "logs"))

    def failure(self, run: Path, key: str) -> Path:
        """Where a job says why it cannot be trained, if that is so: `{"reason": …}`."""
        return self.folder(run) / "failed" / f"{key}.json"


def note_interruption(checkpoints: Path, reason: Interruption) -> None:
    """Write down why workers of this pack ended before their time."""
    jsonl_appender(checkpoints / _INTERRUPTIONS)({"reason": reason})


def interruptions(checkpoints: Path) -> list[Interruption]:
    """Why workers of this pack ended before their time, in order."""
    file = checkpoints / _INTERRUPTIONS
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return [row["reason"] for line in lines if (row := read_row(line)) is not None]


def read_row(line: str) -> dict[str, Any] | None:
    """A row of a log, or None where a kill cut it off."""
    try:
        row: dict[str, Any] = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row
