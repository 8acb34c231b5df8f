"""A shard of a base: some consecutive layers of it, loaded without the others, that run as one stage of a pipeline.

The model's own code runs in every shard, so that masks, rotary embeddings and whatever else a family computes before its
layers are right for all of them: layers that live elsewhere are replaced by pass-through modules and keep their places, the
hidden states that arrive replace the input of the first own layer, and those that leave are taken off the last one.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from ray_ensemble.errors import InputError
from ray_ensemble.models.base import load_pretrained
from ray_ensemble.models.families import bare, causal_class, read_config, text_config
from ray_ensemble.models.scoring import Batch, model_inputs


class _PassThrough(torch.nn.Module):
    """Stands where a layer of another shard would."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        # Where layers return tuples, the model takes our output's first row for them. What passes through here comes before
        # a shard's own layers or after them, where only the shape matters.
        return hidden_states if hidden_states.dim() > 2 else hidden_states[None]


class _NoEmbedding(torch.nn.Module):
    """Stands where the token embedding would, in shards that get hidden states from another one."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self._width, self._dtype = width, dtype

    def forward(self, input_ids: Tensor) -> Tensor:
        return torch.zeros(*input_ids.shape, self._width, dtype=self._dtype, device=input_ids.device)


def split_layers(layers: int, shards: int) -> list[range]:
    """Consecutive runs of layers, one a shard, whose lengths differ by one at most; the first ones are the longer.

    The last shard has the vocabulary matrix besides and the first has no backward pass below its first adapted layer.

    Raises:
        InputError: there are more shards than layers.
    """
    if shards > layers:
        raise InputError(f"gradients.shards: the base has {layers} layers, so it cannot be split into {shards} shards")
    sizes = [layers // shards + (shard < layers % shards) for shard in range(shards)]
    starts = [sum(sizes[:shard]) for shard in range(shards)]
    return [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]


def layer_count(folder: Path) -> int:
    """Decoder layers of a materialised model."""
    return int(text_config(read_config(folder)).num_hidden_layers)


def load_shard(folder: Path, quantization: str, device: torch.device, layers: range) -> PreTrainedModel:
    """The base with `layers` alone, frozen and in eval mode; the weights of other layers are never read.

    The first shard has the token embedding, the last one the vocabulary matrix.

    Raises:
        InputError: the folder holds no causal language model, or one whose layers are not a single list.
    """
    config = copy.deepcopy(read_config(folder))
    first, last = layers.start == 0, layers.stop == text_config(config).num_hidden_layers
    tied = bool(getattr(text_config(config), "tie_word_embeddings", False))
    if not last:
        # Without the vocabulary matrix there is nothing to tie.
        config.tie_word_embeddings = text_config(config).tie_word_embeddings = False
    whole = causal_class(config, folder)

    class Shard(whole):  # type: ignore[misc, valid-type]
        """The model's class, cut before any weight is read, so that loading reads and quantises what is left alone."""

        def __init__(self, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            _cut(self, layers, embedding=first or (last and tied))
            if not last:
                self.set_output_embeddings(torch.nn.Identity())

    # transformers renames and converts what old checkpoints hold, but only for classes of its own.
    Shard.__name__ = Shard.__qualname__ = whole.__name__
    Shard.__module__ = whole.__module__
    try:
        return load_pretrained(Shard, folder, quantization, device, config=config)
    except AttributeError as error:  # heads that are more than a matrix, such as those of BERT's kin
        raise InputError(
            f"gradients.shards: {whole.__name__} cannot be cut into shards ({error}); use shards: 1"
        ) from None


def _cut(model: PreTrainedModel, layers: range, embedding: bool) -> None:
    """Replace the layers that are not a shard's own, and the token embedding unless the shard has it."""
    stack = decoder_layers(model)
    for place in range(len(stack)):
        if place not in layers:
            stack[place] = _PassThrough()
    if not embedding:
        weight = model.get_input_embeddings().weight
        model.set_input_embeddings(_NoEmbedding(weight.shape[1], weight.dtype))


@contextmanager
def as_shard(model: PreTrainedModel, layers: range) -> Iterator[ShardRun]:
    """A whole model that runs as the shard of some of its layers would, within this block."""
    stack, embedding = decoder_layers(model), model.get_input_embeddings()
    before = list(stack)
    _cut(model, layers, embedding=layers.start == 0)
    try:
        yield ShardRun(model, layers)
    finally:
        for place, layer in enumerate(before):
            stack[place] = layer
        model.set_input_embeddings(embedding)


def decoder_layers(
    model: torch.nn.Module, key: str = "gradients.shards", instead: str = "shards: 1"
) -> torch.nn.ModuleList:
    """The list of a model's decoder layers; `key` of the job asks for it, and `instead` does without.

    Raises:
        InputError: there is no single list of as many modules as the config has layers.
    """
    count = int(text_config(model.config).num_hidden_layers)
    found = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count]
    # Lists within the layers themselves, of experts for instance, may happen to be as long.
    inner = set(found[0].modules()) if found else set()
    if not found or any(m not in inner for m in found):
        raise InputError(
            f"{key}: {type(model).__name__} does not keep its {count} layers in one list, so it cannot be sharded; "
            f"use {instead}"
        )
    return found[0]


class ShardRun:
    """One shard's part of a forward pass.

    Args:
        model: the shard, with its adapter or without.
        layers: the layers that it holds.
    """

    def __init__(self, model: PeftModel | PreTrainedModel, layers: range) -> None:
        self._base: Any = bare(model)
        stack = decoder_layers(self._base)
        self._entry, self._exit = stack[layers.start], stack[layers.stop - 1]
        self.first, self.last = layers.start == 0, layers.stop == len(stack)

    def __call__(self, batch: Batch, hidden: Tensor | None) -> Tensor:
        """Run the shard.

        Args:
            batch: the batch, the same in every shard.
            hidden: (N, T, H) hidden states from the shard before; None in the first.

        Returns:
            (N, T, H) hidden states for the next shard; the last shard's logits (N, keep, V).
        """
        inputs = model_inputs(self._base, batch)
        with self._joined(hidden) as left:
            if self.last:
                logits: Tensor = self._base(**inputs, logits_to_keep=batch.keep).logits
                return logits
            # The bare decoder: the last layers' norm and head are another shard's.
            self._base.base_model(**inputs)
            return left[0]

    @contextmanager
    def _joined(self, hidden: Tensor | None) -> Iterator[list[Tensor]]:
        left: list[Tensor] = []

        def enter(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            if "hidden_states" in kwargs:
                return args, {**kwargs, "hidden_states": hidden}
            return (hidden, *args[1:]), kwargs

        def leave(_: torch.nn.Module, __: Any, output: Any) -> None:
            left.append(output[0] if isinstance(output, tuple) else output)

        handles = [self._exit.register_forward_hook(leave)]
        if hidden is not None:
            handles.append(self._entry.register_forward_pre_hook(enter, with_kwargs=True))
        try:
            yield left
        finally:
            for handle in handles:
                handle.remove()
