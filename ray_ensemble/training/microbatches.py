"""A step's rows cut into micro-batches that fit in memory, and what to do when one did not.

A step's loss is a mean over its rows, so the cut does not change it: each micro-batch adds its share of the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from ray_ensemble.errors import RunError

_MICRO_TOKENS = 16  # a longer micro-batch is split where that saves this many padded tokens a row
MAX_HALVINGS = 8  # from the first micro-batch that did not fit; each repeats a step


class _Sized(Protocol):
    """A row of a batch: the tokens of its prompt, and those of the whole row with the label words' tokens."""

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt."""

    @property
    def length(self) -> int:
        """Tokens of the row."""


Row = TypeVar("Row", bound=_Sized)


def cut(rows: Sequence[Row], token_budget: int) -> list[list[Row]]:
    """Cut a step's rows, sorted by length, into micro-batches of at most `token_budget` padded tokens, or of one row.

    Rows of like length share a micro-batch, since padding costs as much as text.
    """
    ordered = sorted(rows, key=lambda row: row.prompt_length)
    parts: list[list[Row]] = []
    width = 0
    for row in ordered:
        shortest = parts[-1][0].prompt_length if parts else 0
        wider = max(width, row.length)
        if (
            not parts
            or row.prompt_length - shortest > max(_MICRO_TOKENS, shortest // 2)
            or wider * (len(parts[-1]) + 1) > token_budget
        ):
            parts.append([])
            wider = row.length
        parts[-1].append(row)
        width = wider
    return parts


@dataclass(frozen=True)
class TooLarge:
    """A micro-batch that did not fit into memory: its rows, and its tokens with padding."""

    rows: int
    tokens: int

    @classmethod
    def of(cls, rows: Sequence[Row]) -> TooLarge:
        """The micro-batch of `rows`."""
        return cls(len(rows), len(rows) * max(row.length for row in rows))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device, or the host, had no memory left."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # What torch's CPU allocator raises has no class of its own.
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


class TokenBudget:
    """Padded tokens a micro-batch may hold; halved when memory runs out, a bounded number of times.

    Args:
        tokens: the budget to begin with.
        device: where the batches go; its cache is emptied before a smaller one is tried.
    """

    def __init__(self, tokens: int, device: torch.device) -> None:
        self.tokens = tokens
        self.device = device
        self.halvings = 0

    def halve(self, failed: TooLarge, step: int, doing: str = "training") -> None:
        """Lower the budget to half of the micro-batch that did not fit, and say so.

        Raises:
            RunError: it was a single row, or the budget has been halved often enough; what to lower is told.
        """
        if failed.rows <= 1 or self.halvings >= MAX_HALVINGS:
            raise self.given_up(failed, step, doing)
        self.halvings += 1
        self.tokens = max(1, min(self.tokens, failed.tokens) // 2)
        print(
            f"out of memory at step {step}, {doing} on a micro-batch of {failed.tokens} tokens: the step is repeated with "
            f"at most {self.tokens} (training.batch_tokens)",
            flush=True,
        )
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def given_up(self, failed: TooLarge, step: int, doing: str, why: str = "") -> RunError:
        """The error of a step that is not tried again, with what to lower; `why` tells what keeps it from that."""
        what = "one example" if failed.rows <= 1 else f"{failed.rows} examples"
        return RunError(
            f"out of memory at step {step}, {doing} on a micro-batch of {what} ({failed.tokens} tokens) on {self.device}"
            f"{f', after {self.halvings} halvings' if self.halvings else ''}{why}: lower limits.max_tokens"
            f"{'' if failed.rows <= 1 else ' or training.batch_tokens'}, set training.activation_checkpointing: true or "
            "model.quantization: nf4, or give the job more memory"
        )
