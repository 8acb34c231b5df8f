"""How the workers of one job share the steps of an adapter. No Ray here: a worker is a rank of torch's process group.

The sampler gives every worker the same rows, each with its weight and its dropout key. A worker takes a share of them and adds up
weight · loss; gradients are summed over the workers. What is then logged, checked and decided is the same on all of them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor

from ray_ensemble.config import TrainingConfig
from ray_ensemble.errors import InputError
from ray_ensemble.models import attach_adapters, load_base
from ray_ensemble.training.learner import BatchRow
from ray_ensemble.training.microbatches import TooLarge
from ray_ensemble.training.optimiser import AdapterOptimiser

Cut = Callable[[Sequence[BatchRow], int], list[list[BatchRow]]]


def check_strategy(config: TrainingConfig) -> None:
    """Refuse a strategy that cannot work here.

    Raises:
        InputError: `zero2` or `zero3` without DeepSpeed.
    """
    if config.strategy in ("zero2", "zero3") and importlib.util.find_spec("deepspeed") is None:
        raise InputError(
            f"training.strategy: {config.strategy} needs DeepSpeed, which is not installed: pip install "
            "'ray-ensemble[deepspeed]', or use fsdp2"
        )


def make_workers(config: TrainingConfig) -> Workers:
    """The workers of `training.strategy`, of which this process is one. Unless it is alone its process group is there.

    Raises:
        InputError: the strategy cannot work here.
    """
    check_strategy(config)
    if config.strategy == "fsdp2":
        from ray_ensemble.training.fsdp import Fsdp2

        return Fsdp2(config)
    if config.strategy in ("zero2", "zero3"):
        from ray_ensemble.training.zero import Zero

        return Zero(config)
    return Workers(config)


class Workers:
    """`strategy: none`, and what the others build on: every worker holds the whole base and the whole adapter.

    Args:
        config: how to train.
    """

    # Whether a pass through the model is itself a collective. Then all workers make as many, and one that runs out of memory
    # cannot try again: the others wait for it in the middle of a pass.
    lockstep = False

    def __init__(self, config: TrainingConfig) -> None:
        self.config = config
        self.count = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if self.count > 1 else 0

    # --- the model ----------------------------------------------------------------------------------------------------

    def load(self, folder: Path, quantization: str, adapter: Path, device: torch.device) -> PeftModel:
        """The base in `folder`, or this worker's part of it, with the adapter in `adapter` to train. It runs on `device`."""
        return attach_adapters(load_base(folder, quantization, device), {"default": adapter}, trainable="default")

    def optimiser(self, model: PeftModel, parameters: Mapping[str, torch.nn.Parameter]) -> AdapterOptimiser:
        """The optimiser of the adapter `parameters` of `model`."""
        return AdapterOptimiser(parameters, self.config, self.add_up if self.count > 1 else None)

    def forward(self, model: PeftModel) -> torch.nn.Module:
        """What passes go through in place of `model`."""
        module: torch.nn.Module = model
        return module

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradient of `loss` () to this worker's; `last` says that it is the step's last."""
        loss.backward()  # type: ignore[no-untyped-call]

    @contextmanager
    def whole_adapter(self, model: PeftModel) -> Iterator[None]:
        """Let every worker hold the whole adapter within the block, which all of them enter."""
        yield

    # --- rows ---------------------------------------------------------------------------------------------------------

    def parts(self, rows: Sequence[BatchRow], budget: int, cut: Cut) -> list[list[BatchRow]]:
        """This worker's micro-batches of a step.

        Where passes are collective, all workers get as many: their largest are halved, and who has none to halve passes a row of
        weight zero.

        Args:
            rows: all rows of the step, the same for every worker.
            budget: padded tokens of a micro-batch.
            cut: cuts rows into micro-batches.
        """
        shares = share(rows, self.count)
        parts = cut(shares[self.rank], budget)
        if self.lockstep:
            passes = max(len(cut(other, budget)) for other in shares)
            spare = replace(min(rows, key=lambda row: row.length), weight=0.0)
            while len(parts) < passes:
                largest = max(parts, key=len, default=[])
                if len(largest) > 1:
                    parts.remove(largest)
                    parts += [largest[: len(largest) // 2], largest[len(largest) // 2 :]]
                else:
                    parts.append([spare])
        return parts

    def gather(
        self, rows: Sequence[BatchRow], done: Sequence[tuple[list[BatchRow], Tensor]], device: torch.device
    ) -> Tensor:
        """The losses (N,) of all rows of a step, in their order, from each worker's micro-batches and their losses."""
        places = {id(row): place for place, row in enumerate(rows)}
        losses = torch.zeros(len(rows), device=device)
        for part, found in done:
            if id(part[0]) in places:  # not the spare row
                losses[[places[id(row)] for row in part]] = found.float()
        self.add_up(losses)
        return losses

    # --- agreement ----------------------------------------------------------------------------------------------------

    def add_up(self, tensor: Tensor) -> None:
        """Sum `tensor` over the workers, in place."""
        if self.count > 1:
            dist.all_reduce(tensor)

    def most(self, value: int, device: torch.device) -> int:
        """The largest of the workers' values."""
        largest = torch.tensor(value, device=device)
        if self.count > 1:
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def worst(self, failed: TooLarge | None, device: torch.device) -> TooLarge | None:
        """Of the micro-batches that did not fit on some worker the one to halve; None if all fitted. One of a row comes first."""
        if self.count == 1 or self.lockstep:
            return failed
        mine = torch.tensor([failed.rows, failed.tokens] if failed else [0, 0], device=device)
        everyone = [torch.empty_like(mine) for _ in range(self.count)]
        dist.all_gather(everyone, mine)
        told = [TooLarge(*pair) for pair in torch.stack(everyone).tolist() if pair[0]]
        return min(told, key=lambda part: (part.rows > 1, part.tokens), default=None)


def share(rows: Sequence[BatchRow], workers: int) -> list[list[BatchRow]]:
    """Rows of each worker, by tokens about as many each: the longest first, each to whoever has least (Graham's rule).

    It depends on the rows alone, so that workers need not tell each other. No worker is without a row while there are enough.
    """
    loads = [0] * workers
    places: list[list[int]] = [[] for _ in loads]
    for place in sorted(range(len(rows)), key=lambda place: (-rows[place].length, place)):
        least = loads.index(min(loads))
        places[least].append(place)
        loads[least] += rows[place].length
    return [[rows[place] for place in sorted(mine)] for mine in places]
