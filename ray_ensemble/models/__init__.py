"""The base model, its LoRA adapters, and the label scores that everything else is computed from."""

from ray_ensemble.models.adapters import attach_adapters, draw_initial_adapter, lora_layers, save_adapter
from ray_ensemble.models.base import (
    backbone_parameters,
    default_device,
    load_base,
    load_tokenizer,
    materialise,
    model_hash,
    quiet_libraries,
    resolve_quantization,
)
from ray_ensemble.models.mixed import MixedAdapters, lora_scaling, read_plain_lora
from ray_ensemble.models.probe import check_scores, check_shards
from ray_ensemble.models.scoring import (
    Batch,
    LabelTree,
    label_scores,
    length_sorted_batches,
    make_batch,
    margins,
    score_loss,
)

__all__ = [
    "Batch",
    "LabelTree",
    "MixedAdapters",
    "attach_adapters",
    "backbone_parameters",
    "check_scores",
    "check_shards",
    "default_device",
    "draw_initial_adapter",
    "label_scores",
    "length_sorted_batches",
    "load_base",
    "load_tokenizer",
    "lora_layers",
    "lora_scaling",
    "make_batch",
    "margins",
    "materialise",
    "model_hash",
    "quiet_libraries",
    "read_plain_lora",
    "resolve_quantization",
    "save_adapter",
    "score_loss",
]
