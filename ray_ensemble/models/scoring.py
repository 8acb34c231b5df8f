"""Label scores: the one function that gradients, training, metrics and prediction share.

The score s_k(x) of label word k is the sum of full-vocabulary log-probabilities over the tokens of " " + word appended to
the prompt (DESIGN section 2.1). Prompts are padded on the left, so the answer positions are a batch's last columns and only
those go through the vocabulary matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ray_ensemble.errors import InputError
from ray_ensemble.models.families import bare, branching_obstacle, branching_refusal, takes_positions, text_config
from ray_ensemble.tasks import EncodedExample

_BATCH_TOKENS = 32  # what starting a batch costs, in tokens: the price of padding is weighed against it


@dataclass(frozen=True)
class LabelTree:
    """The tokens that must follow a prompt so that every label word can be scored, shared where the words share them.

    A label of L tokens needs the model's output after the prompt and after each of its first L − 1 tokens. Beginnings that
    several labels have in common are one node, so that the prompt and every shared token are computed once. Labels of one
    token need no node: the bare prompt.
    """

    tokens: tuple[int, ...]  # of each node
    parents: tuple[int, ...]  # each node's parent, −1 for the prompt; parents come before children
    picks: tuple[tuple[int, int, int], ...]  # (label, node whose output is read or −1 for the prompt's last, token id)

    @classmethod
    def of(cls, label_ids: Sequence[Sequence[int]]) -> LabelTree:
        """The tree of the label words `label_ids[k]`."""
        nodes: dict[tuple[int, ...], int] = {}
        parents: list[int] = []
        picks: list[tuple[int, int, int]] = []
        for label, ids in enumerate(label_ids):
            at = -1
            for place, token in enumerate(ids):
                picks.append((label, at, token))
                if place + 1 < len(ids):
                    beginning = tuple(ids[: place + 1])
                    if beginning not in nodes:
                        nodes[beginning] = len(nodes)
                        parents.append(at)
                    at = nodes[beginning]
        return cls(tuple(beginning[-1] for beginning in nodes), tuple(parents), tuple(picks))

    @property
    def branches(self) -> bool:
        """Whether some node does not follow the one before it, so that causal attention alone would mix labels."""
        return any(parent != node - 1 for node, parent in enumerate(self.parents))

    def ancestors(self, node: int) -> list[int]:
        """The nodes before `node` on its label, itself included, nearest first."""
        found = []
        while node >= 0:
            found.append(node)
            node = self.parents[node]
        return found


@dataclass(frozen=True)
class Batch:
    """A padded batch of N examples, one row of T tokens each: the prompt, then the nodes of its task's label tree.

    `tokens` counts the tokens that are not padding, the unit of every FLOPs count.
    """

    input_ids: Tensor  # (N, T) int64
    attention_mask: Tensor  # (N, T) int64
    position_ids: Tensor  # (N, T) int64
    sees: Tensor | None  # (N, 1, T, T) bool: which token attends to which, where label trees branch
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
    examples: Sequence[EncodedExample], trees: Sequence[LabelTree], classes: int, pad_id: int, device: torch.device
) -> Batch:
    """Pad examples on the left into one batch.

    Args:
        examples: N examples, of one task or of several.
        trees: the label tree of each example's task, N long.
        classes: K, the largest number of labels among them; scores of labels that a task lacks are −inf.
        pad_id: any token id; padded positions are masked.
        device: where the tensors go.
    """
    sequences = [example.prompt_ids + tree.tokens for example, tree in zip(examples, trees, strict=True)]
    keep = 1 + max(len(tree.tokens) for tree in trees)
    width = max(len(s) for s in sequences)
    input_ids = torch.full((len(sequences), width), pad_id, dtype=torch.int64)
    mask = torch.zeros_like(input_ids)
    positions = torch.zeros_like(input_ids)
    picks: list[tuple[int, int, int, int]] = []
    for n, (sequence, tree) in enumerate(zip(sequences, trees, strict=True)):
        first = width - len(sequence)
        input_ids[n, first:] = torch.tensor(sequence, dtype=torch.int64)
        mask[n, first:] = 1
        prompt = len(sequence) - len(tree.tokens)
        positions[n, first : first + prompt] = torch.arange(prompt)
        for node in range(len(tree.tokens)):
            positions[n, first + prompt + node] = prompt - 1 + len(tree.ancestors(node))
        # Left padding: node j of a tree of J stands in the kept column keep − J + j, the prompt's last token before it.
        picks.extend((n, keep - len(tree.tokens) + node, token, n * classes + k) for k, node, token in tree.picks)
    pick = torch.tensor(picks, dtype=torch.int64).T.contiguous().to(device)
    sees = _visible(mask, trees) if any(tree.branches for tree in trees) else None
    return Batch(
        input_ids=input_ids.to(device),
        attention_mask=mask.to(device),
        position_ids=positions.to(device),
        sees=None if sees is None else sees.to(device),
        labels=torch.tensor([e.label for e in examples], dtype=torch.int64, device=device),
        pick_row=pick[0],
        pick_column=pick[1],
        pick_token=pick[2],
        pick_score=pick[3],
        classes=classes,
        keep=keep,
        tokens=int(mask.sum()),
    )


def _visible(mask: Tensor, trees: Sequence[LabelTree]) -> Tensor:
    """(N, 1, T, T) bool: causal attention in which a label's tokens see the prompt and their own label's tokens only."""
    size, width = mask.shape
    sees = torch.ones(width, width, dtype=torch.bool).tril().repeat(size, 1, 1)
    sees &= mask.bool()[:, None, :]
    for n, tree in enumerate(trees):
        first = width - len(tree.tokens)
        sees[n, first:, first:] = False
        for node in range(len(tree.tokens)):
            sees[n, first + node, [first + ancestor for ancestor in tree.ancestors(node)]] = True
    return sees[:, None]


def model_inputs(model: torch.nn.Module, batch: Batch) -> dict[str, Any]:
    """The keyword arguments of a forward pass over a batch.

    Raises:
        InputError: the batch's labels branch and the model cannot be told so.
    """
    inputs = {"input_ids": batch.input_ids, "attention_mask": attention(model, batch), "use_cache": False}
    # Without branches the positions are those that a model counts for itself, if it leaves out padding.
    return inputs | {"position_ids": batch.position_ids} if takes_positions(model) else inputs


def attention(model: torch.nn.Module, batch: Batch) -> Tensor | dict[str, Tensor]:
    """What the model takes as `attention_mask`: the padding mask, or one that keeps the branches of label trees apart.

    A model whose attention slides gets its window cut out of the mask too, which it leaves to the caller once the mask is
    given in full; models that mix full and sliding layers take one mask of each kind.
    """
    if batch.sees is None:
        return batch.attention_mask
    width = batch.input_ids.shape[1]
    reason = branching_obstacle(model, width)
    if reason is not None:
        raise InputError(branching_refusal(model, reason))
    config = text_config(bare(model).config)
    # An adapter's own type is not that of the hidden states.
    dtype = next(p.dtype for n, p in model.named_parameters() if p.dtype.is_floating_point and "lora_" not in n)
    full = _additive(batch.sees, dtype)
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window is None or width <= window:
        return full
    distance = batch.position_ids[:, None, :, None] - batch.position_ids[:, None, None, :]  # (N, 1, T, T)
    sliding = _additive(batch.sees & (distance < window), dtype)
    if not getattr(config, "layer_types", None):
        return sliding
    return {"full_attention": full, "sliding_attention": sliding}


def _additive(sees: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill_(~sees, torch.finfo(dtype).min)


def label_scores(model: torch.nn.Module, batch: Batch) -> Tensor:
    """Scores s (N, K) float32 of every label word; −inf where an example's task has fewer than K labels."""
    logits = model(**model_inputs(model, batch), logits_to_keep=batch.keep).logits  # (N, keep, V)
    return scores_of_logits(logits, batch)


def scores_of_logits(logits: Tensor, batch: Batch) -> Tensor:
    """Scores s (N, K) float32 from the logits (N, keep, V) of a batch's last columns."""
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


def length_sorted_batches(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Cut examples, longest first, into batches of at most `token_budget` padded tokens (at least one example each).

    Among all such cuts it takes the one with the fewest padded tokens, where a batch counts as `_BATCH_TOKENS` more, so
    that neither padding nor small batches are computed needlessly. The batches depend on the lengths alone, so that any
    number of workers computes the same ones.

    Args:
        lengths: tokens of each example's row.
        token_budget: padded tokens a batch.

    Returns:
        Lists of indices into `lengths`.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    cost = [0.0] * (len(order) + 1)  # of the examples from a place in the order on
    ends = [0] * len(order)
    for start in range(len(order) - 1, -1, -1):
        width = max(1, lengths[order[start]])
        last = min(len(order), start + max(1, token_budget // width))
        cost[start], ends[start] = min(
            ((width * (end - start) + _BATCH_TOKENS + cost[end], end) for end in range(last, start, -1)),
            key=lambda choice: choice[0],
        )
    batches: list[list[int]] = []
    start = 0
    while start < len(order):
        batches.append(order[start : ends[start]])
        start = ends[start]
    return batches
