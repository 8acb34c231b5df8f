"""Predictions of a finished run's ensembles, in this process: one base, and all adapters of all its datasets on it at once."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import log_softmax, softmax

from ray_ensemble.config import load_config
from ray_ensemble.ensemble.generation import Prompt, generate
from ray_ensemble.ensemble.weights import boosters_of, coefficients, scale_of
from ray_ensemble.errors import InputError, nearest
from ray_ensemble.files import read_json
from ray_ensemble.models import (
    LabelTree,
    MixedAdapters,
    default_device,
    label_scores,
    length_sorted_batches,
    load_base,
    load_tokenizer,
    make_batch,
    materialise,
    quiet_libraries,
)
from ray_ensemble.models.families import text_config
from ray_ensemble.storage import run_files, run_place
from ray_ensemble.tasks import EncodedExample, Example, Split, Task, encode_task, prompt_fields

Request = tuple[str, Mapping[str, Any]]


@dataclass(frozen=True)
class PredictedTask:
    """A dataset as requests see it: its prompt and the fields that the prompt names, and its label words."""

    prompt: str
    fields: tuple[str, ...]
    labels: tuple[str, ...]


@dataclass(frozen=True)
class _Prompt:
    """A request as token ids."""

    task: str
    example: EncodedExample
    tree: LabelTree


class Predictor:
    """The ensembles of a run's datasets on one copy of the base. It serves one thread at a time.

    Args:
        folder: a run folder, by path or URL, whose ensemble stage is whole.
        tasks: the datasets that requests may name; all of them by default. Only the adapters that they use are loaded.
        merged: use each dataset's merged adapter in place of its ensemble: one pass a request, equal to first order only.

    Raises:
        InputError: no such dataset, or the run is not that far.
    """

    def __init__(self, folder: str | Path, tasks: Sequence[str] | None = None, merged: bool = False) -> None:
        run = run_files(run_place(folder), "ensemble")
        known = {entry["name"]: entry for entry in read_json(run / "tasks.json", "list of tasks")["tasks"]}
        for task in known if tasks is None else tasks:
            if task not in known:
                raise InputError(f"{folder}: no task '{task}'{nearest(task, known)} (tasks: {', '.join(known)})")
        ensemble = read_json(run / "ensemble.json", "ensemble")
        model = read_json(run / "plan.json", "plan")["model"]
        self._config = load_config(run / "config.yaml")
        self.tasks: dict[str, PredictedTask] = {
            name: PredictedTask(entry["prompt"], prompt_fields(entry["prompt"]), tuple(entry["labels"]))
            for name, entry in known.items()
            if tasks is None or name in tasks
        }
        warm = self._config.gradients.start == "meta"
        # Adapter -> c_a, by task: the score of a label is β Σ c_a s_a. None is the bare base.
        self._parts: dict[str, dict[str | None, float]] = {
            name: {f"merged/{name}": 1.0} if merged else ensemble_parts(ensemble, name, warm) for name in self.tasks
        }
        self._scales = {name: scale_of(ensemble, name) for name in self.tasks}
        used = {part for parts in self._parts.values() for part in parts if part is not None}
        quiet_libraries()
        source = materialise(self._config.model.source)
        self._tokenizer = load_tokenizer(source)
        self._device = default_device()
        self._model = load_base(source, model["quantization"], self._device)
        self._adapters = MixedAdapters(self._model, {part: run / part for part in sorted(used)})
        self._pad_id = int(model["pad_id"])

    def predict(self, requests: Sequence[Request]) -> list[dict[str, Any]]:
        """`{"label": word, "probabilities": {word: p}}` for every request, in their order; p has six digits.

        The rows of all requests, once for each adapter that their datasets use, go through the base together, longest first, in
        batches of at most `gradients.batch_tokens` padded tokens. What else is in a call changes a prediction by rounding alone.

        Args:
            requests: (name of a dataset, fields of its prompt), datasets in any mix.

        Raises:
            InputError: an unknown dataset, a field that is missing or neither text nor number, or a prompt that does not fit; the
                request's number, from 1, is told.
        """
        prompts = self._encode(requests)
        rows = [(number, part) for number, prompt in enumerate(prompts) for part in self._parts[prompt.task]]
        lengths = [len(prompts[n].example.prompt_ids) + len(prompts[n].tree.tokens) for n, _ in rows]
        scores = [np.zeros(len(self.tasks[prompt.task].labels)) for prompt in prompts]
        for places in length_sorted_batches(lengths, self._config.gradients.batch_tokens):
            batch = [rows[place] for place in places]
            batch = [batch[place] for place in self._adapters.order([part for _, part in batch])]
            for (number, part), found in zip(batch, self._scores(prompts, batch), strict=True):
                share = self._parts[prompts[number].task][part]
                scores[number] += share * log_softmax(found[: len(scores[number])].astype(np.float64))
        return [
            _prediction(self.tasks[prompt.task].labels, softmax(self._scales[prompt.task] * found))
            for prompt, found in zip(prompts, scores, strict=True)
        ]

    def generate(self, requests: Sequence[Request], max_new_tokens: int) -> list[dict[str, Any]]:
        """The most likely next token, again and again, by the mean of a dataset's adapters (`ensemble.generation`).

        The scale of a dataset's scores, which is of label words, plays no part.

        Args:
            requests: as for `predict`; label words play no part.
            max_new_tokens: where a text that does not end is cut.

        Returns:
            For every request, in their order, `{"text": str, "token_ids": [int], "log_probability": nats, "ended": bool}`, the
            last of which tells that the model ended the text itself.

        Raises:
            InputError: as `predict`; or prompt and new tokens are more than the base has positions for.
        """
        if max_new_tokens < 1:
            raise InputError(f"{max_new_tokens} new tokens: at least one must be asked for")
        prompts = [Prompt(prompt.example.prompt_ids, self._parts[prompt.task]) for prompt in self._encode(requests)]
        window = getattr(text_config(self._model.config), "max_position_embeddings", None)
        for number, prompt in enumerate(prompts, start=1):
            if window is not None and len(prompt.ids) + max_new_tokens > window:
                raise InputError(
                    f"request {number}: a prompt of {len(prompt.ids)} tokens and {max_new_tokens} new ones are more than the "
                    f"{window} that the base takes; ask for at most {window - len(prompt.ids)}"
                )
        found = generate(self._model, self._adapters, prompts, max_new_tokens, self._end_ids(), self._pad_id)
        return [
            {
                "text": self._tokenizer.decode(text.ids, skip_special_tokens=True),
                "token_ids": text.ids,
                "log_probability": text.log_probability,
                "ended": text.ended,
            }
            for text in found
        ]

    def _end_ids(self) -> set[int]:
        """Tokens that end a text: the tokenizer's, and those that the base names for generation, such as the end of a turn."""
        named = getattr(self._model.generation_config, "eos_token_id", None)
        listed = named if isinstance(named, list) else [named]
        return {int(token) for token in (*listed, self._tokenizer.eos_token_id) if token is not None}

    def _scores(self, prompts: Sequence[_Prompt], rows: Sequence[tuple[int, str | None]]) -> NDArray[np.float32]:
        """Raw label scores (N, K) of rows (number of the prompt, adapter) that are in order."""
        chosen = [prompts[number] for number, _ in rows]
        classes = max(len(self.tasks[prompt.task].labels) for prompt in chosen)
        batch = make_batch(
            [prompt.example for prompt in chosen],
            [prompt.tree for prompt in chosen],
            classes,
            self._pad_id,
            self._device,
        )
        with torch.inference_mode(), self._adapters.rows([part for _, part in rows]):
            found: NDArray[np.float32] = label_scores(self._model, batch).cpu().numpy()
        return found

    def _encode(self, requests: Sequence[Request]) -> list[_Prompt]:
        """Requests as token ids, in their order."""
        examples = [self._example(number, *request) for number, request in enumerate(requests, start=1)]
        found: dict[int, _Prompt] = {}
        for name in dict.fromkeys(task for task, _ in requests):
            numbers = [number for number, (task, _) in enumerate(requests) if task == name]
            try:
                encoded = self._tokenise(name, [examples[number] for number in numbers])
            except InputError:
                for number in numbers:  # which of them it was
                    try:
                        self._tokenise(name, [examples[number]])
                    except InputError as error:
                        raise InputError(f"request {number + 1}: {error}") from None
                raise
            found |= dict(zip(numbers, encoded, strict=True))
        return [found[number] for number in range(len(requests))]

    def _example(self, number: int, task: str, row: Mapping[str, Any]) -> Example:
        if task not in self.tasks:
            raise InputError(
                f"request {number}: no task '{task}'{nearest(task, self.tasks)} (tasks: {', '.join(self.tasks)})"
            )
        fields = self.tasks[task].fields
        for field in fields:
            if field not in row:
                raise InputError(f"request {number}: no field '{field}' (the prompt names {', '.join(fields)})")
            if not isinstance(row[field], str | int | float):
                raise InputError(
                    f"request {number}: field '{field}' is neither text nor a number, but {json.dumps(row[field])[:60]}"
                )
        return Example({field: str(row[field]) for field in fields}, 0)

    def _tokenise(self, name: str, examples: Sequence[Example]) -> list[_Prompt]:
        described = self.tasks[name]
        splits: dict[Split, tuple[Example, ...]] = {"train": (), "validation": (), "test": tuple(examples)}
        task = Task(name, described.prompt, described.labels, splits)
        encoded = encode_task(task, self._tokenizer, self._config.limits.max_tokens, self._config.model.chat)
        tree = LabelTree.of(encoded.label_ids)
        return [_Prompt(name, example, tree) for example in encoded["test"]]


def ensemble_parts(ensemble: Mapping[str, Any], task: str, warm: bool) -> dict[str | None, float]:
    """Folders in the run of the adapters that a dataset's ensemble uses, and the coefficient of each at scale 1.

    They are those of `weights.coefficients` over the dataset's scale. Where θ₀ was trained (`warm`) its adapter is one of them,
    else the bare base, None.
    """
    boosters, _ = boosters_of(ensemble["boosting"], task)

    def folder(name: str) -> str | None:
        if name == "start":
            return "start" if warm else None
        return f"{'boosters' if name in boosters else 'adapters'}/{name}"

    scale = scale_of(ensemble, task)
    return {folder(name): share / scale for name, share in coefficients(ensemble, task).items()}


def _prediction(labels: Sequence[str], probabilities: NDArray[np.float64]) -> dict[str, Any]:
    shown = {label: float(f"{p:.6g}") for label, p in zip(labels, probabilities, strict=True)}
    return {"label": labels[int(probabilities.argmax())], "probabilities": shown}
