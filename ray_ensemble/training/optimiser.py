"""The optimiser of one adapter, and its state in a form that does not depend on which of the two it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ray_ensemble.config import TrainingConfig
from ray_ensemble.errors import InputError

_BITSANDBYTES = {"exp_avg": "state1", "exp_avg_sq": "state2"}


class AdapterOptimiser:
    """An adapter's parameters and optimiser, whole in every worker. What is read and written is whole under every strategy.

    Args:
        parameters: the adapter's, by name.
        config: how to train.
        add_up: sums a tensor over the workers, in place; None where there is one worker.

    Raises:
        InputError: the optimiser cannot work on this device.
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.nn.Parameter],
        config: TrainingConfig,
        add_up: Callable[[Tensor], None] | None = None,
    ) -> None:
        self.parameters = dict(parameters)
        self.config = config
        self._add_up = add_up
        self._adamw = make_optimiser(parameters, config, next(iter(parameters.values())).device)

    def reduce(self, rate: float) -> Tensor:
        """Sum the gradient over the workers and clip it; its norm () before that. `rate` is that of the step to come."""
        if self._add_up is not None:
            gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            self._add_up(flat)
            for gradient, summed in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
                gradient.copy_(summed.view_as(gradient))
        return torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.config.max_grad_norm)

    def step(self, rate: float) -> None:
        """Make the step whose gradient was reduced, at learning rate `rate`, and forget the gradient."""
        for group in self._adamw.param_groups:
            group["lr"] = rate
        self._adamw.step()
        self.forget()

    def forget(self) -> None:
        """Drop what has been added to the gradient."""
        self._adamw.zero_grad(set_to_none=True)

    def values(self) -> dict[str, Tensor]:
        """A copy of the parameters."""
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    def write(self, values: Mapping[str, Tensor]) -> None:
        """Give the parameters these values."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(values[name])

    def moments(self) -> dict[str, dict[str, Tensor]]:
        """What `moments` gives, of every parameter that has made a step."""
        found = {name: moments(self._adamw, parameter) for name, parameter in self.parameters.items()}
        return {name: kept for name, kept in found.items() if kept}

    def set_moments(self, found: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Put back what `moments` gave, under this strategy or another."""
        for name, parameter in self.parameters.items():
            set_moments(self._adamw, parameter, found.get(name, {}))


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
