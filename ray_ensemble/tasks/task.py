"""A dataset as the rest of the project sees it: prompts, label words and three splits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ray_ensemble.files import sha256_json

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@dataclass(frozen=True)
class Example:
    """One example before rendering: the fields that a prompt may name, and the index of its label word."""

    fields: Mapping[str, str]
    label: int


@dataclass(frozen=True)
class Task:
    """A dataset with its template: `labels[example.label]` is the word that should follow `prompt`."""

    name: str
    prompt: str
    labels: tuple[str, ...]
    splits: Mapping[Split, tuple[Example, ...]]

    def __getitem__(self, split: Split) -> tuple[Example, ...]:
        return self.splits[split]


@dataclass(frozen=True)
class EncodedExample:
    """A rendered example as token ids; `truncated` tells that fields were shortened to fit `limits.max_tokens`."""

    prompt_ids: tuple[int, ...]
    label: int
    truncated: bool


@dataclass(frozen=True)
class EncodedTask:
    """A task as one tokenizer sees it. `label_ids[k]` are the tokens of " " + labels[k]; none begins another's."""

    name: str
    labels: tuple[str, ...]
    label_ids: tuple[tuple[int, ...], ...]
    splits: Mapping[Split, tuple[EncodedExample, ...]]
    data_hash: str

    def __getitem__(self, split: Split) -> tuple[EncodedExample, ...]:
        return self.splits[split]


def split_hash(task: EncodedTask, examples: Sequence[EncodedExample]) -> str:
    """SHA-256 of what a model is shown of `examples`: token ids of prompts and label words, and the right labels."""
    return sha256_json([[[list(e.prompt_ids), e.label] for e in examples], [list(ids) for ids in task.label_ids]])
