"""Label scores: the one function that gradients, training, metrics and prediction share.

The score s_k(x) of label word k is the sum of full-vocabulary log-probabilities over the tokens of " " + word appended to
the prompt (DESIGN section 2.1). Prompts are padded on the left, so the answer positions are a batch's last columns and only
those go through the vocabulary matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ray_ensemble.tasks import EncodedExample


@dataclass(frozen=True)
class LabelRows:
    """Which token sequences must follow a prompt so that every label word can be scored.

    A label of L tokens needs the model's output after its first L − 1 tokens, so a row is a label without its last token;
    rows that begin a longer one are covered by it. Labels of one token need one row: the bare prompt.
    """

    rows: tuple[tuple[int, ...], ...]
    picks: tuple[tuple[int, int, int, int], ...]  # (label, row, tokens of the label before this one, token id)

    @classmethod
    def of(cls, label_ids: Sequence[Sequence[int]]) -> LabelRows:
        """Rows and picks for the label words `label_ids[k]`."""
        prefixes = {tuple(ids[:-1]) for ids in label_ids}
        rows = sorted(p for p in prefixes if not any(q != p and q[: len(p)] == p for q in prefixes))
        picks: list[tuple[int, int, int, int]] = []
        for label, ids in enumerate(label_ids):
            row = next(i for i, r in enumerate(rows) if r[: len(ids) - 1] == tuple(ids[:-1]))
            picks.extend((label, row, position, token) for position, token in enumerate(ids))
        return cls(tuple(rows), tuple(picks))


@dataclass(frozen=True)
class Batch:
    """A padded batch of N examples, each of which takes len(rows) rows; R rows of T tokens in all.

    `tokens` counts the tokens that are not padding, the unit of every FLOPs count.
    """

    input_ids: Tensor  # (R, T) int64
    attention_mask: Tensor  # (R, T) int64
    position_ids: Tensor  # (R, T) int64
    row_example: Tensor  # (R,) int64
    labels: Tensor  # (N,) int64
    pick_row: Tensor  # (M,) int64
    pick_column: Tensor  # (M,) int64, counted within the kept columns
    pick_token: Tensor  # (M,) int64
    pick_score: Tensor  # (M,) int64, n·K + k
    classes: int
    keep: int
    tokens: int

    @property
    def size(self) -> int:
        """N, the number of examples."""
        return int(self.labels.shape[0])


def make_batch(
    examples: Sequence[EncodedExample], label_rows: Sequence[LabelRows], classes: int, pad_id: int, device: torch.device
) -> Batch:
    """Pad examples on the left into one batch.

    Args:
        examples: N examples, of one task or of several.
        label_rows: the label rows of each example's task, N long.
        classes: K, the largest number of labels among them; scores of labels that a task lacks are −inf.
        pad_id: any token id; padded positions are masked.
        device: where the tensors go.
    """
    sequences: list[tuple[int, ...]] = []
    owners: list[int] = []
    picks: list[tuple[int, int, int, int]] = []
    keep = 1 + max(len(row) for rows in label_rows for row in rows.rows)
    for n, (example, rows) in enumerate(zip(examples, label_rows, strict=True)):
        first = len(sequences)
        for row in rows.rows:
            sequences.append(example.prompt_ids + row)
            owners.append(n)
        for label, row_index, position, token in rows.picks:
            # Left padding: column keep − 1 is the last token of the row.
            column = keep - 1 - len(rows.rows[row_index]) + position
            picks.append((first + row_index, column, token, n * classes + label))
    width = max(len(s) for s in sequences)
    input_ids = torch.full((len(sequences), width), pad_id, dtype=torch.int64)
    mask = torch.zeros_like(input_ids)
    for r, sequence in enumerate(sequences):
        input_ids[r, width - len(sequence) :] = torch.tensor(sequence, dtype=torch.int64)
        mask[r, width - len(sequence) :] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    pick = torch.tensor(picks, dtype=torch.int64).T.contiguous().to(device)
    return Batch(
        input_ids=input_ids.to(device),
        attention_mask=mask.to(device),
        position_ids=positions.to(device),
        row_example=torch.tensor(owners, dtype=torch.int64, device=device),
        labels=torch.tensor([e.label for e in examples], dtype=torch.int64, device=device),
        pick_row=pick[0],
        pick_column=pick[1],
        pick_token=pick[2],
        pick_score=pick[3],
        classes=classes,
        keep=keep,
        tokens=int(mask.sum()),
    )


def label_scores(model: torch.nn.Module, batch: Batch) -> Tensor:
    """Scores s (N, K) float32 of every label word; −inf where an example's task has fewer than K labels."""
    logits = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        logits_to_keep=batch.keep,
        use_cache=False,
    ).logits  # (R, keep, V)
    log_probabilities = torch.log_softmax(logits.float(), dim=-1)
    picked = log_probabilities[batch.pick_row, batch.pick_column, batch.pick_token]  # (M,)
    scores = torch.zeros(batch.size * batch.classes, dtype=torch.float32, device=picked.device)
    scores = scores.index_add(0, batch.pick_score, picked)
    present = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    present[batch.pick_score] = True
    return scores.masked_fill(~present, float("-inf")).view(batch.size, batch.classes)


def score_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Per-example loss −log softmax(s)_y, (N,)."""
    return torch.nn.functional.cross_entropy(scores, labels, reduction="none")


def margins(scores: Tensor, labels: Tensor) -> Tensor:
    """Margins f = s_y − logsumexp_{k≠y} s_k, (N,); loss = log(1 + e^(−f)) (DESIGN section 2.1)."""
    right = scores.gather(1, labels[:, None])[:, 0]
    others = scores.scatter(1, labels[:, None], float("-inf"))
    return right - torch.logsumexp(others, dim=1)


def length_sorted_batches(lengths: Sequence[int], rows: int, token_budget: int) -> list[list[int]]:
    """Cut examples, longest first, into batches of at most `token_budget` padded tokens (at least one example each).

    The batches depend on the lengths alone, so that any number of workers computes the same ones.

    Args:
        lengths: tokens of each example's longest row.
        rows: rows that each example takes.
        token_budget: padded tokens a batch.

    Returns:
        Lists of indices into `lengths`.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches: list[list[int]] = []
    while order:
        width = lengths[order[0]] * rows
        count = max(1, token_budget // max(width, 1))
        batches.append(order[:count])
        order = order[count:]
    return batches
