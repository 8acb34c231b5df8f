"""A base planned without its weights: the same θ₀, and a miniature that passes and fails the checks that the base does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from tiny_families import CPU, FAMILIES, OTHERS, write

from ray_ensemble.config import AdapterConfig
from ray_ensemble.errors import InputError
from ray_ensemble.models import (
    backbone_parameters,
    check_scores,
    check_shards,
    draw_initial_adapter,
    load_base,
    load_miniature,
    load_shapes,
)


def written(folder: Path) -> tuple[bytes, dict]:
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["target_modules"].sort()  # PEFT writes a set
    return (folder / "adapter_model.safetensors").read_bytes(), settings


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in ("llama", "gpt2") else pytest.mark.slow) for name in FAMILIES]
)
def test_the_start_is_drawn_from_shapes_as_from_the_base(name, tmp_path):
    kind, extra, attention = FAMILIES[name]
    folder = write(kind, extra, tmp_path / "model")
    base, shapes = load_base(folder, "none", CPU), load_shapes(folder, CPU)
    assert backbone_parameters(shapes) == backbone_parameters(base)
    assert sum(p.untyped_storage().nbytes() for p in shapes.parameters()) == 4 * len(list(base.parameters()))
    for targets in (attention, ["all-linear"]):
        config = AdapterConfig(rank=3, dropout=0.1, target_modules=targets, seed=4)
        draw_initial_adapter(base, config, tmp_path / "base")
        draw_initial_adapter(shapes, config, tmp_path / "shapes")
        assert written(tmp_path / "shapes") == written(tmp_path / "base")


def test_the_start_of_a_base_in_bf16_is_drawn_in_bf16(tiny_model, tmp_path):
    """As on a GPU, whose base is bf16: what PEFT draws is rounded to the base's type."""
    draw_initial_adapter(load_base(tiny_model, "none", CPU).to(torch.bfloat16), AdapterConfig(), tmp_path / "base")
    draw_initial_adapter(load_shapes(tiny_model, torch.device("cuda")), AdapterConfig(), tmp_path / "shapes")
    assert written(tmp_path / "shapes") == written(tmp_path / "base")
    draw_initial_adapter(load_shapes(tiny_model, CPU), AdapterConfig(), tmp_path / "exact")
    assert written(tmp_path / "exact") != written(tmp_path / "base")


def test_a_checkpoint_without_a_head_is_refused_by_its_shapes(tmp_path):
    folder = write("LlamaConfig", {}, tmp_path / "model", transformers.LlamaForSequenceClassification)
    with pytest.raises(InputError, match=r"no weights for lm_head\.weight"):
        load_shapes(folder, CPU)


def miniature(folder: Path, kind: str, **extra: object) -> torch.nn.Module:
    """The miniature of a base of which there is only the config."""
    getattr(transformers, kind)(**extra).save_pretrained(folder)
    return load_miniature(folder)


# Sizes that these families really come in: most configs' own defaults, and bases with grouped heads.
SIZES = {
    "LlamaConfig": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
                    "num_key_value_heads": 8, "vocab_size": 128256, "pad_token_id": 128001,
                    "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
                                        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}},
    "Qwen2Config": {"num_key_value_heads": 8},
    "Qwen3Config": {},
    "GemmaConfig": {},
    "Gemma2Config": {},
    "Gemma3TextConfig": {},
    "MistralConfig": {},
    "MixtralConfig": {"num_hidden_layers": 4},
    "GPT2Config": {},
    "GPTNeoXConfig": {},
    "OPTConfig": {"hidden_size": 1024, "word_embed_proj_dim": 512, "num_attention_heads": 16},
    "FalconConfig": {"new_decoder_architecture": True, "num_kv_heads": 8},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", SIZES)
def test_families_pass_in_small_at_the_sizes_that_they_come_in(kind, tmp_path):
    model = miniature(tmp_path / "model", kind, **SIZES[kind])
    assert (
        model.config.num_hidden_layers == transformers.AutoConfig.from_pretrained(tmp_path / "model").num_hidden_layers
    )
    assert sum(p.numel() for p in model.parameters()) < 1e8
    check_scores(model, branching=True, width=64)
    check_shards(model, 3)


@pytest.mark.parametrize("kind", ["LlamaConfig", "GPT2Config"])
def test_a_large_base_is_tried_in_small(kind, tmp_path):
    extra = {**SIZES[kind], "num_hidden_layers": 7}
    model = miniature(tmp_path / "model", kind, **extra)
    assert sum(p.numel() for p in model.parameters()) < 1e7
    check_scores(model, branching=True, width=64)
    check_shards(model, 3)
    with pytest.raises(InputError, match="7 layers, so it cannot be split into 8"):
        check_shards(model, 8)
    with pytest.raises(InputError, match=r"limits\.max_tokens"):
        check_scores(model, branching=True, width=10**6)


class Blind:
    """Undoes a model's view of its batch, as families do that ignore what they are told."""

    def __init__(self, model: torch.nn.Module, key: str) -> None:
        self._handle = model.model.layers[0].register_forward_pre_hook(self._drop, with_kwargs=True)
        self._key = key

    def _drop(self, _, args, kwargs):
        return args, {**kwargs, self._key: None}


def test_a_miniature_notices_an_attention_mask_that_is_not_kept_to(tmp_path):
    """In one layer of 80: the faults that the check looks for must not drown in a random model."""
    model = miniature(tmp_path / "model", "LlamaConfig", **SIZES["LlamaConfig"])
    Blind(model, "attention_mask")
    with pytest.raises(InputError, match="padded on the left"):
        check_scores(model, branching=False, width=64)


@pytest.mark.parametrize("name", ["rwkv", "roberta"])
def test_what_takes_no_padding_on_the_left_is_found_in_small(tmp_path, name):
    folder = write(*OTHERS[name], tmp_path / "model")
    with pytest.raises(InputError, match="padded on the left"):
        check_scores(load_miniature(folder), branching=False, width=20)


@pytest.mark.parametrize("name", ["bloom", "mpt", "falcon-alibi", "openai-gpt", "gpt_neo", "mamba"])
def test_what_cannot_branch_is_found_in_small(tmp_path, name):
    model = load_miniature(write(*OTHERS[name], tmp_path / "model"))
    check_scores(model, branching=False, width=20)
    with pytest.raises(InputError, match="several labels of more than one token"):
        check_scores(model, branching=True, width=20)


def test_layers_that_use_more_than_the_layer_before_are_found_in_small(tmp_path):
    model = load_miniature(write(*OTHERS["gemma3n"], tmp_path / "model"))
    with pytest.raises(InputError, match="cannot be sharded; use shards: 1"):
        check_shards(model, 2)


def test_a_family_of_which_no_miniature_can_be_made_is_told(tmp_path):
    transformers.Mamba2Config().save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match=r"no small model of Mamba2ForCausalLM .*; use shards: 1"):
        load_miniature(tmp_path / "model")
