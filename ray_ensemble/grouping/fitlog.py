"""Fits on disk, a line per group ever estimated, so that a search that was killed does not pay for them twice."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from ray_ensemble.config import JobConfig
from ray_ensemble.estimator.calibration import Truth
from ray_ensemble.estimator.estimator import Group, GroupEstimate
from ray_ensemble.estimator.features import TaskFeatures
from ray_ensemble.estimator.predict import Estimate
from ray_ensemble.files import sha256_json, write_text

SOLVER = 2  # raised when the same inputs give other estimates, so that old logs are not read


@dataclass(frozen=True)
class Reference:
    """λ_ref of the job, and the operations that its choice took."""

    regularization: float
    flops: int


class FitLog:
    """`fits.jsonl`: a header with the inputs' fingerprint and λ_ref, then one estimate a line.

    A log of other inputs is not read. A last line torn by a kill is dropped. One process writes.
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.path = path
        self.fingerprint = fingerprint
        self.reference: Reference | None = None
        self.known: dict[Group, GroupEstimate] = {}
        rows = _read(path)
        if rows and rows[0].get("fingerprint") == fingerprint:
            self.reference = Reference(rows[0]["regularization"], rows[0]["flops"])
            estimates = [_from_row(row) for row in rows[1:]]
            self.known = {estimate.members: estimate for estimate in estimates}

    def start(self, reference: Reference) -> None:
        """Write header and what is known, whole: a new file, or the old one without its torn line."""
        self.reference = reference
        lines = [json.dumps({"fingerprint": self.fingerprint, **asdict(reference)})]
        lines += [json.dumps(asdict(estimate)) for estimate in self.known.values()]
        write_text(self.path, "\n".join(lines) + "\n")

    def add(self, estimates: Iterable[GroupEstimate]) -> None:
        """Append the estimates that are new."""
        new = {estimate.members: estimate for estimate in estimates if estimate.members not in self.known}
        if new:
            self.known.update(new)
            with self.path.open("a", encoding="utf-8") as stream:
                stream.writelines(json.dumps(asdict(estimate)) + "\n" for estimate in new.values())


def fingerprint(features: Sequence[TaskFeatures], config: JobConfig, truths: Sequence[Truth] = ()) -> str:
    """SHA-256 of all that a search depends on: features, real runs, settings of estimator, search and training budget, and
    the solver's version."""
    digest = sha256()
    for task in features:
        digest.update(json.dumps(task.name).encode())
        for field in (
            "train_features",
            "train_margins",
            "starts",
            "validation_scores",
            "validation_features",
            "validation_labels",
        ):
            array = np.ascontiguousarray(getattr(task, field))
            digest.update(f"{field}{array.dtype}{array.shape}".encode())
            digest.update(array.data)
        if task.training_examples != task.examples:
            digest.update(f"trained{task.training_examples}".encode())
    training = config.training
    settings = {
        "estimator": config.estimator.model_dump(),
        "search": config.search.model_dump(exclude={"wait_minutes"}),
        # The usual sampling goes without saying: logs are older than the choice.
        "training": [training.epochs, training.min_steps, training.batch_size]
        + ([] if training.sampling == "examples" else [training.sampling]),
        "features": digest.hexdigest(),
        "truths": [asdict(truth) for truth in truths],
        "solver": SOLVER,
    }
    return sha256_json(settings)


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:  # torn by a kill: it is the last one
            break
    return rows


def _from_row(row: dict[str, Any]) -> GroupEstimate:
    halves = {half: tuple(Estimate(**estimate) for estimate in row[half]) for half in ("search", "report")}
    return GroupEstimate(**{**row, **halves, "members": tuple(row["members"])})
