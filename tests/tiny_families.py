"""Tiny random models of many families, made on the spot, and the slowest right answer about them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from ray_ensemble.gradients.projection import Projection
from ray_ensemble.models import LabelTree, make_batch
from ray_ensemble.tasks import EncodedExample

CPU = torch.device("cpu")
WINDOW = 6

_COMMON: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {"num_key_value_heads": 1, "head_dim": 8}
_GPT2 = {"n_positions": 64, "n_inner": 24}
_SLIDING = {"sliding_window": WINDOW}

# Name -> config class, what it takes beside the common keys, and the names of its attention's linear maps.
QKV = ["q_proj", "k_proj", "v_proj"]
FAMILIES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "llama": ("LlamaConfig", _GROUPED, QKV),
    "qwen2": ("Qwen2Config", {"num_key_value_heads": 1}, QKV),
    "qwen2-sliding": (
        "Qwen2Config",
        {"num_key_value_heads": 1, "use_sliding_window": True, "max_window_layers": 1, **_SLIDING},
        QKV,
    ),
    "qwen3": ("Qwen3Config", _GROUPED, QKV),
    "gemma": ("GemmaConfig", _GROUPED, QKV),
    "gemma2": ("Gemma2Config", {**_GROUPED, **_SLIDING, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}, QKV),
    "gemma3": (
        "Gemma3TextConfig",
        {**_GROUPED, **_SLIDING, "num_hidden_layers": 3,
         "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
        QKV,
    ),
    "mistral": ("MistralConfig", {**_GROUPED, **_SLIDING}, QKV),
    "gpt2": ("GPT2Config", _GPT2, ["c_attn"]),
    "gpt_neox": ("GPTNeoXConfig", {}, ["query_key_value"]),
    "opt": ("OPTConfig", {"ffn_dim": 24, "word_embed_proj_dim": 12}, QKV),
}  # fmt: skip

# Families that take part only as far as they can.
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("BloomConfig", {}),
    "mpt": ("MptConfig", {"d_model": 16, "n_heads": 2, "n_layers": 2, "max_seq_len": 64}),
    "falcon-alibi": ("FalconConfig", {"alibi": True}),
    "openai-gpt": ("OpenAIGPTConfig", {"n_positions": 64}),
    "gpt_neo": ("GPTNeoConfig", {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW}),
    "mamba": ("MambaConfig", {}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_key_value_heads": 1}),
    "gemma3n": (
        "Gemma3nTextConfig",
        {**_GROUPED, "num_hidden_layers": 6, "num_kv_shared_layers": 2, "intermediate_size": [24] * 6,
         "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 100, "laurel_rank": 4,
         "layer_types": ["sliding_attention", "full_attention"] * 3, "activation_sparsity_pattern": [0.0] * 6},
    ),
    "rwkv": ("RwkvConfig", {"attention_hidden_size": 16}),
    "roberta": ("RobertaConfig", {"is_decoder": True}),
}  # fmt: skip


def config_of(kind: str, extra: dict[str, Any]) -> transformers.PretrainedConfig:
    return getattr(transformers, kind)(**(_COMMON | extra))


def write(kind: str, extra: dict[str, Any], folder: Path, model_class: Any = transformers.AutoModelForCausalLM) -> Path:
    """Save a random model whose every weight matters: biases and norms are random too."""
    torch.manual_seed(0)
    config = config_of(kind, extra)
    build = getattr(model_class, "from_config", None) or model_class
    model = build(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.25)
        else:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.tie_weights()
    model.save_pretrained(folder)
    return folder


# Labels: of one token each; and of several, which share their first tokens and part.
LABELS = {"single": ((30,), (31,), (33,)), "branching": ((30, 31, 40), (30, 32, 41), (30, 31, 42, 43), (33,))}


def examples_of(count: int, labels: tuple[tuple[int, ...], ...], shortest: int = 3) -> list[EncodedExample]:
    """Prompts of many lengths, most of them longer than the sliding windows."""
    generator = torch.Generator().manual_seed(1)
    return [
        EncodedExample(
            tuple(torch.randint(5, 100, (shortest + (5 * n) % 13,), generator=generator).tolist()),
            n % len(labels),
            False,
        )
        for n in range(count)
    ]


def batch_of(examples: list[EncodedExample], labels: tuple[tuple[int, ...], ...]):
    return make_batch(examples, [LabelTree.of(labels)] * len(examples), len(labels), 0, CPU)


def slow_scores(model: torch.nn.Module, prompt: tuple[int, ...], labels: tuple[tuple[int, ...], ...]) -> Tensor:
    """(K,) scores by one plain forward pass a label: no padding, no mask, no positions, no tree."""
    scores = []
    for ids in labels:
        logits = model(input_ids=torch.tensor([[*prompt, *ids]]), use_cache=False).logits[0].float()
        log_probabilities = torch.log_softmax(logits, dim=-1)
        scores.append(sum(log_probabilities[len(prompt) - 1 + place, token] for place, token in enumerate(ids)))
    return torch.stack(scores)


class Reference:
    """Pᵀ∇ by autograd on one example at a time, with P as a dense matrix."""

    def __init__(self, model: torch.nn.Module, projection: Projection) -> None:
        self._model = model
        self._parameters = {n: p for n, p in model.named_parameters() if "lora_" in n}
        names = [n.removeprefix("base_model.model.").replace(".default", "") for n in self._parameters]
        sizes = [p.numel() for p in self._parameters.values()]
        signs = [projection.signs(name, 0, size) for name, size in zip(names, sizes, strict=True)]
        self._dense = torch.cat(signs).double() / projection.dim**0.5  # (D, d)

    def __call__(self, example: EncodedExample, labels: tuple[tuple[int, ...], ...]) -> tuple[Tensor, Tensor]:
        """Scores (K,) and the margin's feature (d,)."""
        with self._differentiable():
            scores = slow_scores(self._model, example.prompt_ids, labels)
            others = [k for k in range(len(labels)) if k != example.label]
            feature = self._project(scores[example.label] - torch.logsumexp(scores[others], 0))
        return scores.detach(), feature

    def differences(self, example: EncodedExample, labels: tuple[tuple[int, ...], ...]) -> Tensor:
        """Features (K − 1, d) of the score differences s_k − s_0."""
        with self._differentiable():
            scores = slow_scores(self._model, example.prompt_ids, labels)
            return torch.stack([self._project(s - scores[0]) for s in scores[1:]])

    @contextmanager
    def _differentiable(self) -> Iterator[None]:
        for p in self._parameters.values():
            p.requires_grad_(True)
        yield
        for p in self._parameters.values():
            p.requires_grad_(False)

    def _project(self, value: Tensor) -> Tensor:
        gradients = torch.autograd.grad(value, list(self._parameters.values()), retain_graph=True)
        return (torch.cat([g.flatten() for g in gradients]).double() @ self._dense).float()
