"""Several adapters trained in one process on one copy of the base: m groups cost one base in memory.

The rows of all groups' batches go through the model together, each through its own group's adapter: the base's products are
shared, the adapters' are batched by row. PEFT's own mixed batches (`adapter_names`) are for inference: they are refused in
training mode and loop over the adapters. Everything else of an adapter (sampler, schedule, clipping, optimiser,
early stop, dropout) is its own, so that each ends as it would if trained alone, up to rounding. A base with dropout of its own
(GPT-2, OPT) is the exception: its masks are drawn for the whole batch.

Each group's loss reaches its own adapter only, so one whose loss is no number fails alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor

from ray_ensemble.config import TrainingConfig
from ray_ensemble.models import lora_layers
from ray_ensemble.tasks import EncodedTask
from ray_ensemble.training.learner import Learner, TrainingState
from ray_ensemble.training.loop import Loop, OnCheckpoint
from ray_ensemble.training.parallel import Workers


@dataclass(frozen=True)
class AdapterRun:
    """One of the adapters that are trained together: its name in the model, its group's tasks, its steps and its seed."""

    adapter: str
    tasks: tuple[EncodedTask, ...]
    steps: int
    seed: int


def train_together(
    model: PeftModel,
    runs: Sequence[AdapterRun],
    config: TrainingConfig,
    pad_id: int,
    *,
    resume: Path | None = None,
    on_step: Callable[[str, dict[str, Any]], None] = lambda adapter, row: None,
    on_checkpoint: OnCheckpoint = lambda step, save: None,
    preempted: Callable[[], bool] = lambda: False,
) -> dict[str, TrainingState]:
    """Train several adapters of one model side by side, each as `train_adapter` would train it alone.

    A step has `config.batch_size` rows of each adapter that has a step left, cut into micro-batches of at most
    `config.batch_tokens` whatever their number.

    Args:
        model: a PEFT model that holds every run's adapter, of one rank and one dropout.
        runs: what to train. Their steps may differ: an adapter that has made its own drops out.
        config: how to train, the same for all.
        pad_id: any token id.
        resume: a folder that an earlier run's checkpoint was saved to. It has a folder for each adapter in the form of
            `train_adapter`'s; a run that has none begins at its beginning.
        on_step: called with the adapter's name and what `train_adapter` gives its own `on_step`; "seconds" are those of the
            step of all adapters.
        on_checkpoint: called with the step and a function that saves the checkpoint of all of them into a folder.
        preempted: as for `train_adapter`.

    Returns:
        Name of the adapter -> its final state. `failed` is the reason where its loss was not finite; the others went on, and
        it is left as it was before that step.

    Raises:
        RunError: memory ran out.
        InputError: a checkpoint is damaged, or this device cannot do what the config asks for.
    """
    names = [run.adapter for run in runs]
    with ExitStack() as stack:
        router = stack.enter_context(routed(model, names))
        torch.manual_seed(runs[0].seed)  # nothing but a base's own dropout draws from it
        workers = Workers(config)
        parameters = [adapter_parameters(model, name) for name in names]
        learners = {
            run.adapter: Learner(place, workers.optimiser(model, found), run.tasks, config, run.steps, run.seed)
            for place, (run, found) in enumerate(zip(runs, parameters, strict=True))
        }
        for name, learner in learners.items():
            if resume is not None and (resume / name).is_dir():
                learner.load(resume / name)
        device = next(iter(parameters[0].values())).device
        loop = Loop(model, list(learners.values()), config, pad_id, device, stack, names, workers, router.route)

        def save_all(folder: Path, save: Callable[[Path, Learner], None]) -> None:
            for name, learner in learners.items():
                (folder / name).mkdir(exist_ok=True)
                save(folder / name, learner)

        loop.run(
            lambda learner, row: on_step(names[learner.place], row),
            lambda step, save: on_checkpoint(step, lambda folder: save_all(folder, save)),
            preempted,
        )
    return {name: learner.state for name, learner in learners.items()}


def adapter_parameters(model: PeftModel, adapter: str) -> dict[str, torch.nn.Parameter]:
    """The parameters of one adapter, under the names that they have where the adapter is alone and named "default"."""
    found = {}
    for name, parameter in model.named_parameters():
        module, _, half = name.removesuffix(f".{adapter}.weight").rpartition(".")
        if half in ("lora_A", "lora_B"):
            found[f"{module}.{half}.default.weight"] = parameter
    return found


class Router:
    """Applies to every row of a batch its own adapter, in place of PEFT.

    Args:
        adapters: their names; a row is routed by its adapter's place among them.
    """

    def __init__(self, adapters: Sequence[str]) -> None:
        self.adapters = list(adapters)
        self._names: list[str] = []  # of the adapters that the batch needs
        self._rows = torch.zeros(0, dtype=torch.int64)  # place among them for each row

    def route(self, rows: Sequence[int], device: torch.device) -> None:
        """Tell which adapter each row of the next batch takes, N places."""
        present = sorted(set(rows))
        self._names = [self.adapters[place] for place in present]
        self._rows = torch.tensor([present.index(place) for place in rows], device=device)

    def __call__(self, layer: LoraLayer, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        """The layer's output y (N, T, out) with s·B·A·x added: x (N, T, in), A (r, in) and B (out, r) of each row's adapter."""
        a = torch.stack([layer.lora_A[name].weight for name in self._names])  # (m, r, in)
        b = torch.stack([layer.lora_B[name].weight * layer.scaling[name] for name in self._names])  # (m, out, r)
        x = layer.lora_dropout[self._names[0]](arguments[0].to(a.dtype))
        shaped = x.reshape(len(self._rows), -1, x.shape[-1])  # some modules are given their rows flattened to (N·T, in)
        if len(self._names) == 1:
            delta = shaped @ a[0].T @ b[0].T
        else:
            # (N, T, in) @ (N, in, r) @ (N, r, out)
            delta = torch.bmm(torch.bmm(shaped, a[self._rows].transpose(1, 2)), b[self._rows].transpose(1, 2))
        added: Tensor = output + delta.view(output.shape)
        return added.to(output.dtype)


@contextmanager
def routed(model: PeftModel, adapters: Sequence[str]) -> Iterator[Router]:
    """Let rows of a batch take different adapters of `model`; all of them get gradients.

    A `ValueError` if an adapter is not there, or if ranks or dropouts differ.
    """
    layers = lora_layers(model)
    shapes = {
        (layer.r.get(name), getattr(layer.lora_dropout[name], "p", 0.0) if name in layer.lora_dropout else None)
        for layer in layers.values()
        for name in adapters
    }
    if len(shapes) != 1 or len(set(adapters)) != len(adapters):
        raise ValueError(f"adapters {', '.join(adapters)} are not different ones of one rank and one dropout: {shapes}")
    router = Router(adapters)
    handles = []
    for layer in layers.values():
        layer.enable_adapters(False)  # what is left is the base's own product
        layer.set_requires_grad(list(adapters))
        handles.append(layer.register_forward_hook(router))
    try:
        yield router
    finally:
        for handle, layer in zip(handles, layers.values(), strict=True):
            handle.remove()
            layer.enable_adapters(True)
