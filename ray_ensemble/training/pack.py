"""A pack of adapters that one Ray Train run trains, and what its folder tells of interruptions.

Ray Train's controllers read this too, so it imports neither torch nor PEFT: those take seconds in every process.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ray_ensemble.errors import RunError
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
        """Names in the run folder of what a worker reads of earlier attempts, besides checkpoints; the first one has the logs."""
        return (*(self.told() if rank == 0 else self.told()[:1]), self.failed)

    def told(self) -> tuple[str, ...]:
        """Names in the run folder of what workers tell of how far they are."""
        return tuple(f"checkpoints/{self.name}/{name}" for name in (_INTERRUPTIONS, "logs"))

    @property
    def failed(self) -> str:
        """Name in the run folder of where its jobs say why they cannot be trained."""
        return f"checkpoints/{self.name}/failed"

    def failure(self, run: Path, key: str) -> Path:
        """Where a job says why it cannot be trained, if that is so: `{"reason": …}`."""
        return run / self.failed / f"{key}.json"


class StepLost(RunError):
    """A worker ran out of memory in the middle of a pass that all workers make together, so it cannot tell them.

    It ends, and Ray Train starts all of them again. What that attempt has to know is written down by then.

    Args:
        message: what did not fit, and what to lower.
        tokens: padded tokens of the micro-batch that did not fit; 0 where it cannot be halved.
    """

    def __init__(self, message: str, tokens: int = 0) -> None:
        super().__init__(message)
        self.tokens = tokens


def step_lost(error: BaseException) -> StepLost | None:
    """The `StepLost` that a worker's error is, or that Ray Train wrapped."""
    cause = getattr(error, "_base_exc", error)
    return cause if isinstance(cause, StepLost) else None


def note_interruption(checkpoints: Path, reason: Interruption, tokens: int | None = None) -> None:
    """Write down why workers of this pack ended before their time, and the micro-batch that did not fit if that was why."""
    jsonl_appender(checkpoints / _INTERRUPTIONS)({"reason": reason} | ({"tokens": tokens} if tokens else {}))


def interruptions(checkpoints: Path) -> list[Interruption]:
    """Why workers of this pack ended before their time, in order."""
    return [row["reason"] for row in _interruptions(checkpoints)]


def smaller_budget(checkpoints: Path, tokens: int) -> int:
    """Padded tokens of a micro-batch after this pack's interruptions, where it began with `tokens`.

    Half for every worker that was killed for its memory, and at most half of a micro-batch that did not fit.
    """
    for row in _interruptions(checkpoints):
        if row["reason"] == "memory":
            tokens = min(tokens, row["tokens"] // 2) if "tokens" in row else tokens // 2
    return max(1, tokens)


def _interruptions(checkpoints: Path) -> list[dict[str, Any]]:
    file = checkpoints / _INTERRUPTIONS
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return [row for line in lines if (row := read_row(line)) is not None]


def read_row(line: str) -> dict[str, Any] | None:
    """A row of a log, or None where a kill cut it off."""
    try:
        row: dict[str, Any] = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row
