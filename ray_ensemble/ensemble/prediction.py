"""Predictions of a finished run's ensemble, in this process: one base, a dataset's adapters one after the other."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import softmax

from ray_ensemble.config import load_config
from ray_ensemble.ensemble.scoring import ScoreRequest, ScoringReplica
from ray_ensemble.ensemble.weights import booster_scores, boosters_of, combine
from ray_ensemble.errors import InputError, nearest
from ray_ensemble.files import read_json
from ray_ensemble.gradients import ReplicaSpec
from ray_ensemble.models import load_tokenizer, materialise, quiet_libraries
from ray_ensemble.tasks import Example, Split, Task, encode_task, prompt_fields


class Predictor:
    """The ensemble of one dataset of a run.

    Args:
        folder: a run folder whose ensemble stage is whole.
        task: the dataset whose prompt, label words and weights to use.

    Raises:
        InputError: no such dataset, or the run is not that far.
    """

    def __init__(self, folder: str | Path, task: str) -> None:
        self._folder = Path(folder)
        tasks = {entry["name"]: entry for entry in read_json(self._folder / "tasks.json", "list of tasks")["tasks"]}
        if task not in tasks:
            raise InputError(f"{folder}: no task '{task}'{nearest(task, tasks)} (tasks: {', '.join(tasks)})")
        ensemble = read_json(self._folder / "ensemble.json", "ensemble; has the run come this far?")
        plan = read_json(self._folder / "plan.json", "plan")
        self._config = load_config(self._folder / "config.yaml")
        self._task = tasks[task]
        weights = np.array(ensemble["weights"][task])
        self._adapters = [self._folder / "adapters" / name for name in np.array(ensemble["adapters"])[weights > 0]]
        self._weights = weights[weights > 0]
        boosters, self._step = boosters_of(ensemble["boosting"], task)
        self._boosters = [self._folder / "boosters" / name for name in boosters]
        self._start = self._folder / "start" if self._config.gradients.start == "meta" else None
        quiet_libraries()
        self._tokenizer = load_tokenizer(materialise(self._config.model.source))
        spec = ReplicaSpec(
            self._config.model.source,
            plan["model"]["quantization"],
            str(self._folder / "init"),
            plan["model"]["pad_id"],
        )
        gradients = self._config.gradients
        self._replica = ScoringReplica(spec, gradients.threads, gradients.batch_tokens)

    def predict(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """`{"label": word, "probabilities": {word: p}}` for every row of prompt fields.

        Raises:
            InputError: a row lacks a field that the prompt names; it is told by its number.
        """
        if not rows:
            return []
        fields = prompt_fields(self._task["prompt"])
        for number, row in enumerate(rows, start=1):
            missing = [field for field in fields if field not in row]
            if missing:
                raise InputError(f"row {number}: no field '{missing[0]}' (the prompt names {', '.join(fields)})")
        labels = tuple(self._task["labels"])
        examples = tuple(Example({field: str(row[field]) for field in fields}, 0) for row in rows)
        splits: dict[Split, tuple[Example, ...]] = {"train": (), "validation": (), "test": examples}
        task = Task(self._task["name"], self._task["prompt"], labels, splits)
        encoded = encode_task(task, self._tokenizer, self._config.limits.max_tokens, self._config.model.chat)

        def scores_of(adapter: Path | None) -> Any:
            return self._replica.score(ScoreRequest(adapter, encoded, encoded["test"]))["scores"]

        scores = combine(np.stack([scores_of(adapter) for adapter in self._adapters]), self._weights)
        if self._boosters:
            boosters = np.stack([scores_of(adapter) for adapter in self._boosters])
            scores = scores + self._step * booster_scores(boosters, scores_of(self._start))
        probabilities = softmax(scores, axis=1)
        return [
            {
                "label": labels[int(row.argmax())],
                "probabilities": {label: round(float(p), 6) for label, p in zip(labels, row, strict=True)},
            }
            for row in probabilities
        ]


def read_rows(lines: Iterable[str], where: str) -> list[dict[str, Any]]:
    """JSONL of prompt fields; a line that is not a JSON object is an `InputError` that tells its number."""
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{where}, line {number}: not JSON ({error.msg})") from None
        if not isinstance(row, dict):
            raise InputError(f'{where}, line {number}: expected an object of prompt fields, such as {{"text": "…"}}')
        rows.append(row)
    return rows
