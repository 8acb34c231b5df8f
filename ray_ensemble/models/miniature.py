"""A base without its weights: its shapes, to draw θ₀ for, and a narrow random model of its family, to try it with.

Neither takes memory to speak of, so a base that no single device can hold is planned on any machine.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from ray_ensemble.errors import InputError
from ray_ensemble.models.base import load_pretrained
from ray_ensemble.models.families import causal_class, read_config, text_config

_HEADS, _WIDTH, _VOCABULARY, _INNER = 2, 64, 512, 16
_INNER_WIDTHS = (
    "intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner",
)  # fmt: skip


def load_shapes(folder: Path, device: torch.device) -> PreTrainedModel:
    """The base with the shapes and types that its parameters have on `device`, all of them zero and in host memory.

    A parameter is a single number that is repeated. The checkpoint is read through, a tensor at a time, so that what it lacks
    is found.

    Raises:
        InputError: as for `load_base`.
    """
    causal_class(read_config(folder), folder)
    meta = {"": torch.device("meta")}
    model = load_pretrained(AutoModelForCausalLM, folder, "none", device, for_sharding=True, device_map=meta)
    hollow: dict[int, torch.nn.Parameter] = {}  # by what it stands for, so that tied weights stay tied
    kept = list(model.parameters())  # or an id might be given again
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            zero = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
            setattr(module, name, hollow.setdefault(id(parameter), torch.nn.Parameter(zero, requires_grad=False)))
    del kept
    return model


def load_miniature(folder: Path) -> PreTrainedModel:
    """A random model of the base's class and config with all of its layers, but with two heads and few dimensions, in fp32.

    Layers, kinds of attention, positions, windows and the size of a head are the base's own, since `check_scores` and
    `check_shards` ask about them. Weights are drawn so that every token that a score sees moves it far more than rounding does.

    Raises:
        InputError: no such model can be made.
    """
    config = copy.deepcopy(read_config(folder))
    model_class = causal_class(config, folder)
    try:
        _narrow(text_config(config))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: PreTrainedModel = model_class._from_config(config, dtype=torch.float32)
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        model.requires_grad_(False)
        model.eval()
        model.config.use_cache = False
        model(input_ids=torch.tensor([[1, 2, 3]]), use_cache=False)
    except (ValueError, TypeError, RuntimeError, LookupError, AttributeError, AssertionError) as error:
        raise InputError(
            f"gradients.shards: no small model of {model_class.__name__} can be made to try the base with "
            f"({' '.join(str(error).split())[:200]}); use shards: 1"
        ) from None
    return model


def _narrow(config: Any) -> None:
    """Keep two heads of the size that the base's have (one of keys, where heads share them), and little else that is wide."""
    hidden, heads = int(config.hidden_size), getattr(config, "num_attention_heads", None)
    if heads is None:  # no attention
        config.hidden_size = min(hidden, _WIDTH)
    else:
        size = getattr(config, "head_dim", None) or hidden // heads
        for key in ("num_key_value_heads", "num_kv_heads"):
            shared = getattr(config, key, None)
            if shared is not None:
                setattr(config, key, 1 if shared < heads else min(heads, _HEADS))
        config.num_attention_heads = min(heads, _HEADS)
        config.hidden_size = min(hidden, config.num_attention_heads * size)
    if getattr(config, "word_embed_proj_dim", None) is not None:
        same = config.word_embed_proj_dim == hidden
        config.word_embed_proj_dim = config.hidden_size if same else config.hidden_size // 2
    for key in _INNER_WIDTHS:
        wide = getattr(config, key, None)
        if wide is not None:
            setattr(config, key, [_INNER] * len(wide) if isinstance(wide, list) else _INNER)
    if config.vocab_size > _VOCABULARY:
        config.vocab_size = _VOCABULARY
        config.pad_token_id = None  # it may be none of the few that are left
