"""Greedy text from an ensemble: at every step all adapters of a prompt say what comes next, and one token is taken for all.

The next token's distribution is the weighted mean of the adapters' log-probabilities over the vocabulary, renormalised; boosters
add to it as they add to label scores: log p = Σ c_a log p_a + constant (`ensemble_parts`). Every adapter keeps its own keys and
values of what was written so far, so a step costs one token of each row.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ray_ensemble.models import MixedAdapters
from ray_ensemble.models.families import takes_positions

CACHE_TOKENS = 16384  # of rows whose keys and values are kept at once: 2 GiB for an 8B Llama in bf16


@dataclass(frozen=True)
class Prompt:
    """Token ids of a prompt, and c_a of each adapter that continues it (None: the bare base)."""

    ids: tuple[int, ...]
    parts: Mapping[str | None, float]


@dataclass
class Generated:
    """What was written: token ids without the end token, their log-probability in nats (with it), and whether it ended."""

    ids: list[int] = field(default_factory=list)
    log_probability: float = 0.0
    ended: bool = False


def generate(
    model: PreTrainedModel,
    adapters: MixedAdapters,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    end_ids: Collection[int],
    pad_id: int,
) -> list[Generated]:
    """Continue every prompt until it ends or has `max_new_tokens` more tokens.

    Args:
        model: the base that `adapters` are on.
        adapters: all adapters that the prompts name.
        prompts: what to continue; rows of many prompts go through the base together, up to `CACHE_TOKENS`.
        max_new_tokens: at least 1.
        end_ids: tokens that end a text.
        pad_id: any token id.

    Returns:
        For each prompt, in their order, what was written.
    """
    written = [Generated() for _ in prompts]
    for places in _batches([(len(prompt.ids) + max_new_tokens, len(prompt.parts)) for prompt in prompts]):
        batch = _Batch(model, adapters, [prompts[i] for i in places], [written[i] for i in places], pad_id)
        with torch.inference_mode():
            batch.run(max_new_tokens, frozenset(end_ids))
    return written


def _batches(sizes: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Prompts of (tokens, rows), longest first, in batches of at most `CACHE_TOKENS`; one prompt is never cut."""
    batches: list[list[int]] = []
    rows = width = 0
    for place in sorted(range(len(sizes)), key=lambda i: -sizes[i][0]):
        tokens, more = sizes[place]
        if not batches or (rows + more) * width > CACHE_TOKENS:
            batches.append([])
            rows, width = 0, tokens
        batches[-1].append(place)
        rows += more
    return batches


class _Batch:
    """Prompts that are continued side by side, a row for each adapter of each."""

    def __init__(
        self,
        model: PreTrainedModel,
        adapters: MixedAdapters,
        prompts: Sequence[Prompt],
        written: list[Generated],
        pad_id: int,
    ) -> None:
        self._model, self._adapters = model, adapters
        self._written = written
        rows = [(n, part, share) for n, prompt in enumerate(prompts) for part, share in prompt.parts.items()]
        rows = [rows[place] for place in adapters.order([part for _, part, _ in rows])]
        self._names = [part for _, part, _ in rows]
        width = max(len(prompt.ids) for prompt in prompts)
        ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
        self._mask = torch.zeros_like(ids)
        shares = torch.zeros(len(prompts), len(rows))
        for row, (n, _, share) in enumerate(rows):
            prompt = prompts[n].ids
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            self._mask[row, width - len(prompt) :] = 1
            shares[n, row] = share
        self._positions = (self._mask.cumsum(1) - 1).clamp(min=0).to(model.device)
        self._ids, self._mask, self._shares = (x.to(model.device) for x in (ids, self._mask, shares))
        self._owner = torch.tensor([n for n, _, _ in rows], device=model.device)
        self._cache: Any = None

    def run(self, max_new_tokens: int, end_ids: frozenset[int]) -> None:
        """Write tokens; rows of texts that have ended leave the batch."""
        left = max_new_tokens
        while left and self._written:
            with self._adapters.rows(self._names):
                while left and not any(text.ended for text in self._written):
                    self._step(end_ids)
                    left -= 1
            if left:
                self._keep([n for n, text in enumerate(self._written) if not text.ended])

    def _step(self, end_ids: frozenset[int]) -> None:
        inputs: dict[str, Any] = {"input_ids": self._ids, "attention_mask": self._mask, "past_key_values": self._cache}
        if takes_positions(self._model):
            inputs["position_ids"] = self._positions
        out = self._model(**inputs, use_cache=True, logits_to_keep=1)
        self._cache = out.past_key_values
        each = torch.log_softmax(out.logits[:, -1].float(), dim=-1)  # (R, V)
        best = torch.log_softmax(self._shares @ each, dim=-1).max(dim=-1)  # (Q, R) @ (R, V)
        for text, token, value in zip(self._written, best.indices.tolist(), best.values.tolist(), strict=True):
            text.log_probability += value
            text.ended = token in end_ids
            if not text.ended:
                text.ids.append(token)
        self._ids = best.indices[self._owner][:, None]
        self._mask = torch.cat([self._mask, torch.ones_like(self._ids)], dim=1)
        self._positions = self._positions[:, -1:] + 1

    def _keep(self, places: list[int]) -> None:
        """Go on with the texts at `places` alone."""
        kept = torch.tensor(places, dtype=torch.int64, device=self._owner.device)
        rows: Tensor = torch.isin(self._owner, kept).nonzero()[:, 0]
        self._written = [self._written[n] for n in places]
        self._names = [self._names[row] for row in rows.tolist()]
        self._ids, self._mask, self._positions = self._ids[rows], self._mask[rows], self._positions[rows]
        self._shares = self._shares[kept][:, rows]
        self._owner = torch.searchsorted(kept, self._owner[rows])
        if places:
            self._cache.batch_select_indices(rows)
