"""LoRA adapters: θ₀ drawn once, adapters attached by name, and the canonical names that the projection is keyed by."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from transformers import PreTrainedModel

from ray_ensemble.config import ALL_LINEAR, AdapterConfig
from ray_ensemble.errors import InputError, nearest
from ray_ensemble.files import whole_folder


def draw_initial_adapter(base: PreTrainedModel, config: AdapterConfig, folder: Path) -> None:
    """Draw θ₀ (A random, B zero) with `config.seed` and save it as a plain PEFT adapter.

    It is drawn once a run and loaded ever after, so that gradients, training and merging mean the same A
    (DESIGN section 2).

    Raises:
        InputError: the base has none of `target_modules`, or gradients of an adapter on them cannot be taken.
    """
    check_target_modules(base, config)
    # PEFT knows the shorthand as a bare string only; what it stands for is saved with the adapter.
    targets: list[str] | str = ALL_LINEAR if config.target_modules == [ALL_LINEAR] else list(config.target_modules)
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        use_rslora=config.rank_stabilized,
        target_modules=targets,
        task_type="CAUSAL_LM",
        bias="none",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        try:
            model = get_peft_model(base, lora)
        except ValueError as error:
            raise InputError(f"adapter.target_modules: {' '.join(str(error).split())[:300]}") from None
        refuse_unsupported(model, "default")
    with whole_folder(folder) as temporary:
        save_adapter(model, temporary, "default")
    model.unload()


def check_target_modules(base: PreTrainedModel, config: AdapterConfig) -> None:
    """Refuse, naming the linear modules that the base has, when one of `target_modules` matches none."""
    names = sorted(
        {name.rpartition(".")[2] for name, module in base.named_modules() if _is_linear(module)} - {"lm_head"}
    )
    if config.target_modules == [ALL_LINEAR]:
        return
    for target in config.target_modules:
        if any(name == target or name.endswith(f".{target}") for name, _ in base.named_modules()):
            continue
        raise InputError(
            f"adapter.target_modules: the base has no module '{target}'{nearest(target, names)} "
            f"(its linear modules: {', '.join(names)})"
        )


def _is_linear(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"


def attach_adapters(base: PreTrainedModel, folders: Mapping[str, Path], trainable: str | None = None) -> PeftModel:
    """Load saved adapters side by side on one base; `trainable` names the one whose parameters get gradients.

    Raises:
        InputError: an adapter folder is missing or damaged; it is named.
    """
    model: PeftModel | None = None
    for name, folder in folders.items():
        try:
            if model is None:
                model = PeftModel.from_pretrained(base, folder, adapter_name=name, is_trainable=name == trainable)
            else:
                model.load_adapter(folder, adapter_name=name, is_trainable=name == trainable)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise unloadable(folder, error) from None
    if model is None:
        raise ValueError("attach_adapters needs at least one adapter")
    model.eval()
    return model


def unloadable(folder: Path, error: BaseException) -> InputError:
    """The one line that refuses a damaged adapter."""
    return InputError(f"{folder}: cannot load this adapter ({' '.join(str(error).split())[:200]})")


def save_adapter(model: PeftModel, folder: Path, name: str) -> None:
    """Save adapter `name` flat into `folder` (adapter_config.json, adapter_model.safetensors), as PEFT and vLLM load it."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, selected_adapters=[name], safe_serialization=True)
    nested = folder / name
    if nested.is_dir():  # PEFT puts every adapter but "default" into a folder of its own
        for file in nested.iterdir():
            file.replace(folder / file.name)
        nested.rmdir()
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card


def lora_layers(model: PeftModel) -> dict[str, LoraLayer]:
    """The adapted modules by canonical name: the base's own module name, with its global layer index.

    Canonical names key the projection (DESIGN section 2.2), so they must not depend on wrapping or sharding.
    """
    base = model.get_base_model()
    layers = {name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)}
    if not layers:
        raise InputError("adapter.target_modules: no LoRA layer was made")
    return layers


def refuse_unsupported(model: PeftModel, name: str) -> None:
    """Refuse adapters whose per-example gradients are not those of plain LoRA on linear maps, saying which and why.

    Raises:
        InputError: DoRA and other variants, biases, embeddings, convolutions, or whole modules that are trained besides.
    """
    config = model.peft_config[name]
    if getattr(config, "use_dora", False):
        raise InputError("DoRA adapters are not supported: their gradients are not those of B·A alone; use plain LoRA")
    if getattr(config, "lora_bias", False):
        raise InputError("LoRA biases are not supported; use lora_bias=False")
    if getattr(config, "bias", "none") != "none":
        raise InputError(
            f"adapters that train the base's biases are not supported; use bias='none', not {config.bias!r}"
        )
    for key in ("modules_to_save", "trainable_token_indices", "target_parameters"):
        if getattr(config, key, None):
            raise InputError(
                f"adapters with {key} are not supported: only LoRA on linear modules is (a base of experts takes its "
                "attention's names in adapter.target_modules instead of all-linear)"
            )
    for module, layer in lora_layers(model).items():
        if name in getattr(layer, "lora_variant", {}):
            kind = type(layer.lora_variant[name]).__name__
            raise InputError(
                f"{module}: {kind} adapters are not supported: their gradients are not those of plain LoRA"
            )
        if name not in layer.lora_A or not isinstance(layer.lora_A[name], torch.nn.Linear):
            raise InputError(
                f"{module}: LoRA on a {type(layer.get_base_layer()).__name__} is not supported; "
                "leave it out of adapter.target_modules"
            )
