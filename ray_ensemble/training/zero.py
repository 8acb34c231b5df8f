"""`strategy: zero2` and `zero3`: DeepSpeed cuts the adapter's optimiser state and gradients, and under `zero3` the base too.

A checkpoint of DeepSpeed's own goes on with the same number of workers only. Here it holds the whole adapter and the whole
moments, gathered from the workers, in the form that every strategy reads.
"""

from __future__ import annotations

import importlib
import logging
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor

from ray_ensemble.config import TrainingConfig
from ray_ensemble.models import attach_adapters, load_base
from ray_ensemble.models.shard import decoder_layers
from ray_ensemble.tasks import cache_dir
from ray_ensemble.training.numerics import autocast
from ray_ensemble.training.optimiser import AdapterOptimiser
from ray_ensemble.training.parallel import Workers


class Zero(Workers):
    """DeepSpeed's ZeRO, stage 2 or 3. Gradients are summed in the backward pass, so workers go in lockstep under both."""

    lockstep = True

    def __init__(self, config: TrainingConfig) -> None:
        super().__init__(config)
        self._stage = int(config.strategy[-1])
        self._engine: Any = None
        self._deepspeed: Any = None

    def load(self, folder: Path, quantization: str, adapter: Path, device: torch.device) -> PeftModel:
        """Load the base: under `zero3` as this worker's shards from the start, unless it is quantised on the way."""
        self._deepspeed = _import_deepspeed(device)
        if self._stage == 3 and quantization == "none":
            from transformers.integrations import HfDeepSpeedConfig

            sharding = HfDeepSpeedConfig(self._settings({}))  # transformers asks for it while it is there
            base = load_base(folder, quantization, device, for_sharding=True)
            del sharding
        else:
            base = load_base(folder, quantization, device)
        model = attach_adapters(base, {"default": adapter}, trainable="default")
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(device)
        return model

    def optimiser(self, model: PeftModel, parameters: Mapping[str, torch.nn.Parameter]) -> AdapterOptimiser:
        """DeepSpeed's, which takes over the model."""
        device = next(iter(parameters.values())).device
        if self._stage == 3:
            layer = sum(
                _size(parameter)
                for parameter in decoder_layers(model, "training.strategy", "strategy: none")[0].parameters()
            )
            largest = max(_size(parameter) for parameter in model.parameters())
            # By default DeepSpeed keeps up to 10⁹ parameters gathered. A base that does not fit has to be gathered a layer at
            # a time, and again in the backward pass.
            limits = {
                "stage3_param_persistence_threshold": model.config.get_text_config().hidden_size,  # norms stay whole
                "stage3_max_reuse_distance": 0,
                "stage3_prefetch_bucket_size": layer,
                "stage3_max_live_parameters": 2 * layer + largest,
            }
        else:
            limits = {}
        # The rate is the schedule's, set at every step.
        adamw = torch.optim.AdamW(list(parameters.values()), lr=0.0, weight_decay=self.config.weight_decay)
        self._engine, *_ = self._deepspeed.initialize(
            model=_InAutocast(model, self.config, device), config=self._settings(limits), optimizer=adamw
        )
        return ZeroOptimiser(parameters, self.config, self._engine, self._deepspeed, self._stage)

    def forward(self, model: PeftModel) -> torch.nn.Module:
        """DeepSpeed's engine around the model."""
        engine: torch.nn.Module = self._engine
        return engine

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add to the gradient and reduce it. DeepSpeed takes the workers' mean, where theirs is a sum."""
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * self.count)

    @contextmanager
    def whole_adapter(self, model: PeftModel) -> Iterator[None]:
        """Gather the adapter."""
        with _gathered(self._deepspeed, [p for p in model.parameters() if p.requires_grad]):
            yield

    def _settings(self, limits: dict[str, int]) -> dict[str, Any]:
        host = {"device": "cpu"}
        zero: dict[str, Any] = {"stage": self._stage, **limits}
        if self.config.offload:
            zero["offload_optimizer"] = host
            if self._stage == 3:
                zero["offload_param"] = host
        return {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,  # the loop says when a step ends
            "gradient_clipping": self.config.max_grad_norm,
            "steps_per_print": None,
            "zero_force_ds_cpu_optimizer": False,  # torch's AdamW on the host too: DeepSpeed's own is compiled first
            "zero_optimization": zero,
        }


class _InAutocast(torch.nn.Module):
    """The model in this project's autocast, which DeepSpeed would turn off around it."""

    def __init__(self, model: PeftModel, config: TrainingConfig, device: torch.device) -> None:
        super().__init__()
        self.model = model
        self._autocast = autocast(config, device)
        self._device = device.type

    def forward(self, **inputs: Any) -> Any:
        with self._autocast():
            return self.model(**inputs)


class ZeroOptimiser(AdapterOptimiser):
    """An adapter's optimiser whose state is cut over the workers.

    Args:
        parameters: the adapter's, by name.
        config: how to train.
        engine: DeepSpeed's.
        deepspeed: its module.
        stage: 2 or 3.
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.nn.Parameter],
        config: TrainingConfig,
        engine: Any,
        deepspeed: Any,
        stage: int,
    ) -> None:
        self.parameters = dict(parameters)
        self.config = config
        self._engine = engine
        self._deepspeed = deepspeed
        self._stage = stage

    def reduce(self, rate: float) -> Tensor:
        """Make the whole step: DeepSpeed clips and updates in one, and skips both where the norm is not finite."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate
        self._engine.step()
        norm = self._engine.get_global_grad_norm() if self._engine.was_step_applied() else math.nan
        return torch.as_tensor(norm, device=next(iter(self.parameters.values())).device)

    def step(self, rate: float) -> None:
        """Nothing: `reduce` has made it."""

    def forget(self) -> None:
        """Nothing: DeepSpeed has, at the step."""

    def values(self) -> dict[str, Tensor]:
        """The adapter, gathered."""
        with _gathered(self._deepspeed, list(self.parameters.values())):
            return super().values()

    def write(self, values: Mapping[str, Tensor]) -> None:
        """Write into the parameters and into the copies that DeepSpeed updates."""
        utils = self._deepspeed.utils
        with _gathered(self._deepspeed, list(self.parameters.values()), modifier_rank=0):
            super().write(values)
        for name, parameter in self.parameters.items():
            value = values[name].to(parameter.device, torch.float32)
            if self._stage == 3:
                utils.safe_set_local_fp32_param(parameter, _local(value, parameter))
            else:
                utils.safe_set_full_fp32_param(parameter, value)

    def moments(self) -> dict[str, dict[str, Tensor]]:
        """Gather them."""
        state = self._engine.optimizer.optimizer.state
        if not state:
            return {}
        step = next(iter(state.values()))["step"]
        get = self._deepspeed.utils.safe_get_full_optimizer_state
        return {
            name: {
                "step": step.detach().cpu().clone(),
                **{key: get(parameter, key).cpu().contiguous() for key in ("exp_avg", "exp_avg_sq")},
            }
            for name, parameter in self.parameters.items()
        }

    def set_moments(self, found: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Keep this worker's part of each."""
        optimiser = self._engine.optimizer
        flats = (
            optimiser.fp32_partitioned_groups_flat if self._stage == 3 else optimiser.single_partition_of_fp32_groups
        )
        step = next(iter(found.values()))["step"]
        for flat in flats:
            optimiser.optimizer.state[flat] = {
                "step": step.clone(),
                "exp_avg": torch.zeros_like(flat.data),
                "exp_avg_sq": torch.zeros_like(flat.data),
            }
        for name, parameter in self.parameters.items():
            for key in ("exp_avg", "exp_avg_sq"):
                value = found[name][key].to(parameter.device)
                if self._stage == 3:
                    local = _local(value, parameter)
                    self._deepspeed.utils.safe_set_local_optimizer_state(parameter, local, key)
                    continue
                mapping = parameter._hp_mapping  # type: ignore[attr-defined]  # None where another worker has the parameter
                if mapping is not None:
                    there, here = mapping.hp_fragment_address, mapping.lp_fragment_address
                    flat = optimiser.optimizer.state[flats[mapping.param_group_index]][key]
                    flat.narrow(0, there.start, there.numel).copy_(value.flatten().narrow(0, here.start, here.numel))


def _import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed, with what it compiles kept in this project's cache."""
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(cache_dir() / "torch_extensions"))
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    deepspeed = importlib.import_module("deepspeed")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # On a CPU it would first compile a collective that inference alone uses, for a minute and more.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _gathered(deepspeed: Any, parameters: list[torch.nn.Parameter], modifier_rank: int | None = None) -> Any:
    """A block within which `parameters` are whole in every worker; what `modifier_rank` wrote into them stays."""
    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=modifier_rank)


def _size(parameter: torch.nn.Parameter) -> int:
    """Elements of a parameter that may be cut."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _local(value: Tensor, parameter: torch.nn.Parameter) -> Tensor:
    """This worker's part of a value, as ZeRO-3 cuts it: equal parts of the flattened tensor, the last one padded."""
    size = int(parameter.ds_tensor.numel())  # type: ignore[attr-defined]
    flat = torch.zeros(size * dist.get_world_size(), device=value.device)
    flat[: value.numel()] = value.flatten()
    return flat[size * dist.get_rank() :][:size]
