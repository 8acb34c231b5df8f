"""Whether a base scores label words rightly in batches: tried on a few tokens before anything is computed with it.

Families differ in what they make of left padding, positions and attention masks given in full, and a model that ignores one
of them gives wrong scores, not an error. So the scores of a padded batch are held against those of bare sequences, one a label.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ray_ensemble.errors import InputError
from ray_ensemble.models.families import bare, branching_obstacle, branching_refusal, text_config
from ray_ensemble.models.scoring import Batch, LabelTree, label_scores, make_batch, scores_of_logits
from ray_ensemble.models.shard import as_shard, decoder_layers, split_layers
from ray_ensemble.tasks import EncodedExample

_LENGTHS = (7, 3)  # of the prompts: one row is padded
# Mean error of a score, in nats: far above rounding, far below what a token seen or placed wrongly does.
_TOLERANCE, _TOLERANCE_HALF = 0.01, 0.25
_WRONG = (RuntimeError, ValueError, IndexError, KeyError, TypeError, AttributeError, AssertionError)

_Words = tuple[tuple[int, ...], ...]  # label words; their numbers stand for distinct tokens


def check_scores(model: torch.nn.Module, branching: bool, width: int) -> None:
    """Try a base on two short prompts.

    Args:
        model: the base, in eval mode, with or without adapters.
        branching: whether labels of some task share tokens and then part.
        width: tokens of the longest row that will be scored.

    Raises:
        InputError: it is not causal, or does not take padding on the left, or cannot score such labels.
    """
    name = type(bare(model)).__name__
    longest = getattr(text_config(bare(model).config), "max_position_embeddings", None)
    if longest is not None and width > longest:
        raise InputError(
            f"limits.max_tokens: the longest prompt has {width} tokens with its label words, and {name} was made for "
            f"{longest}; lower the limit by {width - longest} at least, or take another base"
        )
    if branching and (reason := branching_obstacle(model, width)) is not None:
        raise InputError(branching_refusal(model, reason))
    if not _agrees(model, ((0, 1, 2), (3,))):
        raise InputError(
            f"model.source: {name} does not score a prompt alike alone and padded on the left beside a longer one; it is "
            "not causal, or takes no padding on the left"
        )
    if branching and not _agrees(model, ((0, 1, 2), (0, 3, 4), (5,))):
        raise InputError(branching_refusal(model, "does not keep to an attention mask given in full"))


@torch.no_grad()
def check_shards(model: PreTrainedModel, shards: int) -> None:
    """Try whether a base can be cut into shards: its layers, one run after the other, must do what the whole does.

    A family fails whose layers use more than the hidden states of the layer before: the embeddings, or keys and values of
    earlier layers.

    Raises:
        InputError: it cannot be, or it has fewer layers than shards.
    """
    batch = _batch(model, ((0, 1, 2), (3,)))
    want = label_scores(model, batch)
    hidden: Tensor | None = None
    try:
        for layers in split_layers(len(decoder_layers(model)), shards):
            with as_shard(model, layers) as run:
                hidden = run(batch, hidden)
        assert hidden is not None
        same = _close(model, scores_of_logits(hidden, batch), want)
    except _WRONG as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        same = False
    if not same:
        raise InputError(
            f"gradients.shards: layers of {type(model).__name__} use more than the hidden states of the layer before, so it "
            "cannot be sharded; use shards: 1"
        )


@torch.no_grad()
def _agrees(model: torch.nn.Module, words: _Words) -> bool:
    """Whether scores in a padded batch are those of bare sequences."""
    batch = _batch(model, words)
    try:
        scores = label_scores(model, batch)
    except _WRONG as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return False
    tokens = _tokens(model)
    want = [[_alone(model, prompt, [tokens[i] for i in word]) for word in words] for prompt in _prompts(tokens)]
    return _close(model, scores, torch.tensor(want, device=scores.device))


def _close(model: torch.nn.Module, found: Tensor, want: Tensor) -> bool:
    dtype = next(p.dtype for p in model.parameters() if p.dtype.is_floating_point)
    return bool((found - want).abs().mean() < (_TOLERANCE if dtype == torch.float32 else _TOLERANCE_HALF))


def _tokens(model: torch.nn.Module) -> list[int]:
    """Distinct tokens from the upper half of the vocabulary, where special ones are rare."""
    half = int(text_config(bare(model).config).vocab_size) // 2
    return [half + i for i in range(6 + max(_LENGTHS))]


def _prompts(tokens: list[int]) -> list[tuple[int, ...]]:
    return [tuple(tokens[6 : 6 + length]) for length in _LENGTHS]


def _batch(model: torch.nn.Module, words: _Words) -> Batch:
    tokens = _tokens(model)
    labels = [tuple(tokens[i] for i in word) for word in words]
    examples = [EncodedExample(prompt, 0, False) for prompt in _prompts(tokens)]
    device = next(model.parameters()).device
    return make_batch(examples, [LabelTree.of(labels)] * len(examples), len(labels), 0, device)


def _alone(model: torch.nn.Module, prompt: tuple[int, ...], ids: list[int]) -> float:
    """The score of one label as the plainest forward pass gives it."""
    sequence = torch.tensor([[*prompt, *ids]], device=next(model.parameters()).device)
    logits = model(input_ids=sequence, use_cache=False).logits[0].float()
    log_probabilities = torch.log_softmax(logits, dim=-1)
    return sum(float(log_probabilities[len(prompt) - 1 + place, token]) for place, token in enumerate(ids))
