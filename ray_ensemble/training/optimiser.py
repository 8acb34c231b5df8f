"""The optimiser of one adapter, and its state in a form that does not depend on which of the two it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ray_ensemble.config import TrainingConfig
from ray_ensemble.errors import InputError

_BITSANDBYTES = {"exp_avg": "state1", "exp_avg_sq": "state2"}


def make_optimiser(
    parameters: Mapping[str, torch.nn.Parameter], config: TrainingConfig, device: torch.device
) -> torch.optim.Optimizer:
    """AdamW over the adapter's parameters; `paged_adamw` lets the moments move to host memory when the GPU is full.

    bitsandbytes pages moments of 100,000 elements or more; smaller ones stay on the GPU.

    Raises:
        InputError: `paged_adamw` where there is no GPU to page from.
    """
    if config.optimizer == "paged_adamw":
        if device.type != "cuda":
            raise InputError(
                "training.optimizer: paged_adamw moves the optimiser's state between GPU and host memory, and this job "
                f"trains on {device.type}; use adamw, whose result is the same up to rounding"
            )
        return paged_adamw(parameters, config)
    return torch.optim.AdamW(parameters.values(), lr=config.learning_rate, weight_decay=config.weight_decay)


def paged_adamw(parameters: Mapping[str, torch.nn.Parameter], config: TrainingConfig) -> torch.optim.Optimizer:
    """bitsandbytes' paged AdamW with moments in fp32."""
    from bitsandbytes.optim import PagedAdamW32bit

    made: torch.optim.Optimizer = PagedAdamW32bit(
        list(parameters.values()), lr=config.learning_rate, weight_decay=config.weight_decay
    )
    return made


def moments(optimiser: torch.optim.Optimizer, parameter: torch.nn.Parameter) -> dict[str, Tensor]:
    """`step` () float32, `exp_avg` and `exp_avg_sq` of a parameter on the CPU; empty before its first step."""
    state = optimiser.state.get(parameter, {})
    if not state:
        return {}
    if "state1" in state:
        found = {key: state[name] for key, name in _BITSANDBYTES.items()}
        found["step"] = torch.tensor(float(state["step"]))
    else:
        found = {key: state[key] for key in ("step", "exp_avg", "exp_avg_sq")}
    return {key: value.detach().cpu().contiguous() for key, value in found.items()}


def set_moments(optimiser: torch.optim.Optimizer, parameter: torch.nn.Parameter, found: Mapping[str, Tensor]) -> None:
    """Put back what `moments` gave, of either optimiser."""
    if not found:
        optimiser.state.pop(parameter, None)
    elif hasattr(optimiser, "init_state"):
        # bitsandbytes makes its own buffers, which may be paged; they are filled, not replaced.
        state: dict[str, Any] = optimiser.state[parameter]
        place = next(i for i, p in enumerate(optimiser.param_groups[0]["params"]) if p is parameter)
        optimiser.init_state(optimiser.param_groups[0], parameter, 0, place)
        for key, name in _BITSANDBYTES.items():
            state[name].copy_(found[key])
        state["step"] = int(found["step"])
    else:
        optimiser.state[parameter] = {
            # AdamW keeps its step count on the CPU and its moments beside the parameter.
            key: value.clone().to("cpu" if key == "step" else parameter.device)
            for key, value in found.items()
        }
