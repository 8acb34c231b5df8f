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
    """A rendered example as token ids; `truncated` tells that fields were shortened to fit `limits.max_tokens`.

    `offsets` (K), where there are any, are added to the label scores before training takes its loss of them.
    """

    prompt_ids: tuple[int, ...]
    label: int
    truncated: bool
    offsets: tuple[float, ...] = ()


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
    """SHA-256 of what a model is shown of `examples`: token ids of prompts and label words, right labels, offsets if any."""
    shown = [[list(e.prompt_ids), e.label, *([list(e.offsets)] if e.offsets else [])] for e in examples]
    return sha256_json([shown, [list(ids) for ids in task.label_ids]])
