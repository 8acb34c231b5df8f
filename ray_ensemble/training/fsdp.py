"""`strategy: fsdp2`: each worker keeps a shard of the frozen base, and gathers a decoder layer at a time when it is needed.

The adapter is small and stays whole in every worker, as under `strategy: none`.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from peft import PeftModel

from ray_ensemble.models import attach_adapters, load_base
from ray_ensemble.models.shard import decoder_layers
from ray_ensemble.training.parallel import Workers


class Fsdp2(Workers):
    """Torch's `fully_shard` on the base."""

    lockstep = True

    def load(self, folder: Path, quantization: str, adapter: Path, device: torch.device) -> PeftModel:
        """Load the base whole, then keep a shard of it."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

        base = load_base(folder, quantization, device, for_sharding=True)
        model = attach_adapters(base, {"default": adapter}, trainable="default")
        adapters = {parameter for parameter in model.parameters() if parameter.requires_grad}
        for parameter in adapters:
            parameter.data = parameter.data.to(device)
        offload = CPUOffloadPolicy(pin_memory=device.type == "cuda") if self.config.offload else OffloadPolicy()
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))

        def shard(module: torch.nn.Module, reshard: bool) -> None:
            fully_shard(
                module, mesh=mesh, reshard_after_forward=reshard, ignored_params=adapters, offload_policy=offload
            )

        for layer in decoder_layers(model, "training.strategy", "strategy: none"):
            shard(layer, True)
        embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
        if embedding.weight is not head.weight:
            shard(embedding, True)
            shard(head, False)  # its backward pass comes next
        shard(model, False)
        return model
