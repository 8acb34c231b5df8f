"""Single JSONL files without splits: OpenAI evals samples, and plain lines with a label.

    {"input": [{"role": "system", "content": "..."}, {"role": "user", "content": "..."}], "ideal": "Yes"}
    {"text": "...", "label": 1}

Both become examples, repeats are dropped, and the splits are drawn with `TaskConfig.seed`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ray_ensemble.config import TaskConfig
from ray_ensemble.errors import InputError
from ray_ensemble.tasks.rows import Schema, read_jsonl
from ray_ensemble.tasks.split import TRAIN_CAP, draw_splits, drop_repeats
from ray_ensemble.tasks.task import Example, Task
from ray_ensemble.tasks.template import prompt_fields


def read_samples(path: Path, config: TaskConfig) -> Task:
    """Read one `.jsonl` file as a task, named by `config.name` or else by the file (`samples.jsonl`: by its folder).

    Raises:
        InputError: as `convert_samples`, or the file cannot be read.
    """
    name = config.name or (path.parent.name if path.stem == "samples" else path.stem)
    return convert_samples(read_jsonl(path), config, name, str(path))


def convert_samples(rows: Iterable[tuple[int, Mapping[str, Any]]], config: TaskConfig, name: str, where: str) -> Task:
    """Turn numbered rows into a task. Pure: the same rows and config give the same splits.

    A row of the evals format has the fields `input` (the last user message; `text` is the same) and `system` (the
    system messages, joined by line breaks); its `ideal`, the first if it is a list, is looked up in `config.answers`
    or else in the labels. A plain row has its strings and numbers as fields and its label under `config.label_field`.

    Examples whose prompt fields agree (without case and blanks) are kept once, and not at all where their labels
    differ; then `config.part` is taken. Validation gets a fifth (at most 500), test three tenths (at most 1,000), train
    at most 2,000.

    Raises:
        InputError: a prompt, label, answer or field does not fit; names `where` and the row's number.
    """
    schema = Schema.make(config.prompt, config.labels, config, where)
    examples = [_example(row, schema, f"{where}:{line}") for line, row in rows]
    kept = _part(drop_repeats(examples, prompt_fields(schema.prompt)), config.part, where)
    splits = draw_splits(kept, config.seed, ("validation", "test"), TRAIN_CAP)
    return Task(name, schema.prompt, schema.labels, splits)


def _part(examples: list[Example], part: str | None, where: str) -> list[Example]:
    """Every k-th example from the i-th on, for `part` i/k: parts are disjoint, also in texts, and alike in order."""
    if part is None:
        return examples
    index, count = (int(number) for number in part.split("/"))
    if index > count:
        raise InputError(f"{where}: part {part} does not exist; parts go from 1/{count} to {count}/{count}")
    return examples[index - 1 :: count]


def _example(row: Mapping[str, Any], schema: Schema, where: str) -> Example:
    if "input" in row and "ideal" in row:
        ideal = row["ideal"]
        if isinstance(ideal, list):
            if not ideal:
                raise InputError(f"{where}: 'ideal' is an empty list")
            ideal = ideal[0]
        return schema.example(_message_fields(row["input"], where), schema.answer_index(ideal, where), where)
    if schema.label_field in row:
        return schema.row_example(row, where)
    keys = ", ".join(row) or "none"
    raise InputError(f"{where}: expected 'input' and 'ideal', or a label under '{schema.label_field}' (keys: {keys})")


def _message_fields(messages: Any, where: str) -> dict[str, str]:
    if isinstance(messages, str):
        return {"input": messages, "system": "", "text": messages}
    if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
        raise InputError(f"{where}: 'input' must be a string or a list of messages with 'role' and a text as 'content'")
    system = "\n".join(message["content"] for message in messages if message["role"] == "system")
    users = [message["content"] for message in messages if message["role"] == "user"]
    # Without a user message there is no `input`: a prompt that names it is refused, one that names `system` is not.
    return {"input": users[-1], "system": system, "text": users[-1]} if users else {"system": system}


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict) and isinstance(message.get("content"), str) and isinstance(message.get("role"), str)
    )
