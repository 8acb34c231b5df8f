"""Rows of data (JSON lines, data set rows) as `Example`s: label values become indices, scalars become prompt fields."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_ensemble.config import TaskConfig
from ray_ensemble.errors import InputError, nearest
from ray_ensemble.tasks.task import Example
from ray_ensemble.tasks.template import checked_prompt, prompt_fields


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, object) for every line that is not blank.

    Raises:
        InputError: the file cannot be read as UTF-8, or a line is no JSON object; names file and line.
    """
    try:
        with path.open("rb") as stream:
            yield from parse_lines(stream, str(path))
    except OSError as error:
        raise InputError(f"{path}: cannot read the file ({error.strerror})") from None


def parse_lines(lines: Iterable[bytes], where: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """`read_jsonl` of lines that are already open; `where` stands for the path in errors."""
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield number, _parse(line, f"{where}:{number}")


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8-sig"))
        if b"\\ud" in line.lower():
            # Half of an escaped surrogate pair is legal JSON but no text, and tokenizers fail on it.
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeError:
        raise InputError(f"{where}: not UTF-8 text") from None
    except ValueError as error:
        raise InputError(f"{where}: not a JSON object ({error})") from None
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected a JSON object, got {_short(row)}")
    return row


@dataclass(frozen=True)
class Schema:
    """What turns rows into examples: the template, the label words, and the data's own value for each label."""

    prompt: str
    labels: tuple[str, ...]
    answers: tuple[str, ...] | None
    label_field: str

    @classmethod
    def make(cls, prompt: str | None, labels: list[str] | None, config: TaskConfig, where: str) -> Schema:
        """Check a task's prompt, labels and `config.answers`; `where` begins every error.

        Raises:
            InputError: no prompt or none with a field; fewer than two labels; blank, padded or equal labels; answers
                that are not one per label, or equal.
        """
        prompt = checked_prompt(prompt, where)
        if labels is None:
            raise InputError(f"{where}: 'labels' is missing (the words that the model is to answer with)")
        if len(labels) < 2:
            raise InputError(f"{where}: a task needs at least two labels, got {labels}")
        for label in labels:
            if label != label.strip() or not label:
                raise InputError(f"{where}: label {label!r} is blank or has blanks around it")
        _check_distinct(labels, f"{where}: label")
        answers = None if config.answers is None else tuple(_normal(answer) for answer in config.answers)
        if answers is not None:
            if len(answers) != len(labels):
                raise InputError(f"{where}: {len(answers)} answers for {len(labels)} labels; each label needs one")
            _check_distinct(answers, f"{where}: answer")
        return cls(prompt, tuple(labels), answers, config.label_field)

    def fields(self, row: Mapping[str, Any]) -> dict[str, str]:
        """The fields that a prompt may name: every string and number of the row but the label."""
        return {
            key: value if isinstance(value, str) else str(value)
            for key, value in row.items()
            if key != self.label_field and isinstance(value, str | int | float)
        }

    def example(self, fields: Mapping[str, str], label: int, where: str) -> Example:
        """An example whose fields hold all that the prompt names.

        Raises:
            InputError: a field of the prompt is not there; lists those that are.
        """
        for name in prompt_fields(self.prompt):
            if name not in fields:
                known = f"(known fields: {', '.join(fields) or 'none'})"
                raise InputError(f"{where}: no field '{name}' for the prompt{nearest(name, fields)} {known}")
        return Example(fields, label)

    def row_example(self, row: Mapping[str, Any], where: str) -> Example:
        """A row with its label under `label_field`: an integer is an index (without `answers`), all else an answer.

        Raises:
            InputError: no such label field, a label out of range or unknown, or a field that is not there.
        """
        if self.label_field not in row:
            known = ", ".join(row) or "none"
            raise InputError(f"{where}: no field '{self.label_field}' for the label (known fields: {known})")
        value = row[self.label_field]
        if self.answers is None and isinstance(value, int) and not isinstance(value, bool):
            label = self._checked_index(value, where)
        else:
            label = self.answer_index(value, where)
        return self.example(self.fields(row), label, where)

    def answer_index(self, value: Any, where: str) -> int:
        """The index of the label whose answer (or, without `answers`, word) is `value`, compared as stripped text.

        Raises:
            InputError: no such answer; lists the known ones.
        """
        known = self.answers or self.labels
        text = _normal(value)
        if text not in known:
            answers = ", ".join(repr(answer) for answer in known)
            raise InputError(f"{where}: answer {_short(text)}{nearest(text, known)} (known answers: {answers})")
        return known.index(text)

    def _checked_index(self, value: int, where: str) -> int:
        if value == -1:
            raise InputError(
                f"{where}: label -1, the mark of an unlabelled split; name labelled ones in the task's 'splits' "
                "(those left out are drawn from train)"
            )
        if not 0 <= value < len(self.labels):
            words = ", ".join(self.labels)
            raise InputError(f"{where}: label {value} is out of range 0 to {len(self.labels) - 1} (labels: {words})")
        return value


def _check_distinct(words: list[str] | tuple[str, ...], what: str) -> None:
    for place, word in enumerate(words):
        if word in words[:place]:
            raise InputError(f"{what} '{word}' stands twice in {list(words)}")


def _normal(value: Any) -> str:
    return str(value).strip()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
