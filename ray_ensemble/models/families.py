"""What is known of a model family before and beside its weights: whether it is a causal language model, and what it takes."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PretrainedConfig, PreTrainedModel

from ray_ensemble.errors import InputError

_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}


def read_config(folder: Path) -> PretrainedConfig:
    """The config of a materialised model.

    Raises:
        InputError: there is none that transformers can read.
    """
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder}: no model config can be read here ({' '.join(str(error).split())[:200]})") from None
    return config


def text_config(config: Any) -> Any:
    """The part of a config that describes the language model; the config itself unless it sees or hears besides."""
    return config.get_text_config()


def causal_class(config: PretrainedConfig, folder: Path) -> type[PreTrainedModel]:
    """The class that transformers loads such a model with for causal language modelling.

    Raises:
        InputError: it is an encoder, an encoder-decoder, or no language model.
    """
    kind = type(config).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(
            f"{folder}: {kind} is an encoder-decoder; label words are scored as continuations of a prompt, which takes a "
            "decoder-only causal language model"
        )
    try:
        found = AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError:
        raise InputError(f"{folder}: {kind} is not the config of a causal language model") from None
    masked = type(config) in AutoModelForMaskedLM._model_mapping.keys()  # noqa: SIM118 (a lazy mapping)
    if masked and not getattr(config, "is_decoder", False):
        raise InputError(
            f"{folder}: {kind} with is_decoder false is a bidirectional encoder; its outputs depend on the tokens that "
            "follow, so they are no probabilities of a next token"
        )
    chosen: type[PreTrainedModel] = found[0] if isinstance(found, tuple) else found
    return chosen


def bare(model: torch.nn.Module) -> torch.nn.Module:
    """The model without PEFT's wrapper."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def takes_positions(model: torch.nn.Module) -> bool:
    """Whether the model can be told each token's position; others count the columns or the tokens of the mask."""
    return "position_ids" in inspect.signature(bare(model).forward).parameters


def branching_obstacle(model: torch.nn.Module, width: int) -> str | None:
    """Why labels that share tokens and then part cannot be scored in one row of `width` tokens; None if they can.

    That takes positions and an attention mask given in full. It is what the config tells; `check_scores` finds the rest.
    """
    config: Any = text_config(bare(model).config)
    if getattr(bare(model), "_is_stateful", False):
        return "carries a state from token to token, which cannot branch"
    other = sorted(set(getattr(config, "layer_types", None) or ()) - _ATTENTION)
    if other:
        return f"has layers of another kind than attention ({', '.join(other)}), which cannot branch"
    if not takes_positions(model) or getattr(config, "alibi", False):
        return "takes no positions of tokens"
    # Windows that the attention cuts out by column, not by position or by the mask that it is given.
    windows = [getattr(config, "attention_chunk_size", None)]
    if "local" in getattr(config, "attention_layers", ()):
        windows.append(getattr(config, "window_size", None))
    if any(window is not None and width > window for window in windows):
        return f"has local attention that is shorter than the row of {width} tokens and takes no mask for it"
    return None


def branching_refusal(model: torch.nn.Module, reason: str) -> str:
    """The one line that refuses labels whose tokens branch."""
    return (
        f"model.source: {type(bare(model)).__name__} {reason}, so it cannot score several labels of more "
        "than one token; choose label words of one token each, or another base"
    )
