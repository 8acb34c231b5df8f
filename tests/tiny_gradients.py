"""The tiny model with an adapter, fresh or warm, and batches of its tasks."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel

from ray_ensemble.config import AdapterConfig
from ray_ensemble.models import Batch, LabelTree, attach_adapters, draw_initial_adapter, load_base, make_batch
from ray_ensemble.tasks import EncodedTask

CPU = torch.device("cpu")


def adapted(model_folder: Path, folder: Path, quantization: str = "none", warm: bool = False) -> PeftModel:
    draw_initial_adapter(load_base(model_folder, "none", CPU), AdapterConfig(), folder / "init")
    model = attach_adapters(load_base(model_folder, quantization, CPU), {"default": folder / "init"})
    if warm:
        torch.manual_seed(3)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
    return model


def batch_of(task: EncodedTask, indices: range) -> Batch:
    tree = LabelTree.of(task.label_ids)
    examples = [task["train"][i] for i in indices]
    return make_batch(examples, [tree] * len(examples), len(task.labels), 0, CPU)
