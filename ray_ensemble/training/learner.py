"""One adapter in training: its examples, its optimiser, its schedule, its early stop, and what a checkpoint of it holds."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ray_ensemble.config import TrainingConfig
from ray_ensemble.errors import InputError, RunError
from ray_ensemble.estimator.features import validation_halves
from ray_ensemble.models.scoring import LabelTree
from ray_ensemble.tasks import EncodedExample, EncodedTask
from ray_ensemble.training.numerics import mix
from ray_ensemble.training.optimiser import AdapterOptimiser
from ray_ensemble.training.sampling import draw

_TENSORS = "state.safetensors"
_STATE = "state.json"


@dataclass(frozen=True)
class TrainingState:
    """What a run has counted so far.

    `step` optimiser steps were made on `tokens` tokens that were not padding, and validation read `validation_tokens` more,
    forward only. `best_step` (a number of steps) had the lowest validation loss so far, `best_loss`, and `waited` evaluations
    since then were no better. `stopped`: validation ended the run. `failed`: why it cannot go on. `batch_tokens`: the
    micro-batch budget, where memory made it smaller than the config's.
    """

    step: int = 0
    tokens: int = 0
    validation_tokens: int = 0
    best_step: int | None = None
    best_loss: float | None = None
    waited: int = 0
    stopped: bool = False
    failed: str = ""
    batch_tokens: int | None = None


@dataclass(frozen=True)
class BatchRow:
    """One example on its way through the model for one adapter.

    `learner` is the adapter's place among those that are trained together, `weight` the share of the row's loss in the
    adapter's, `key` what dropout masks are drawn from.
    """

    learner: int
    task: EncodedTask
    tree: LabelTree
    index: int  # among the task's examples of its split
    example: EncodedExample
    weight: float
    key: int = 0

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt."""
        return len(self.example.prompt_ids)

    @property
    def length(self) -> int:
        """Tokens of the row: the prompt, and those of label words."""
        return len(self.example.prompt_ids) + len(self.tree.tokens)


def learning_rate(step: int, steps: int, config: TrainingConfig) -> float:
    """The learning rate of step `step` of `steps`: linear warm-up, then the schedule's decay to zero."""
    warmup = math.ceil(config.warmup * steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    if config.schedule == "linear":
        return config.learning_rate * (1 - done)
    if config.schedule == "cosine":
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
    return config.learning_rate


class Learner:
    """One adapter in training. Nothing in it depends on what is trained beside it.

    Args:
        place: its place among the adapters that are trained together.
        optimiser: of the adapter's parameters; their names are the checkpoint's.
        tasks: the group's members, in the job's order.
        config: how to train.
        steps: optimiser steps in all.
        seed: of the sampler and of dropout.

    Raises:
        InputError: early stop has no validation examples to look at.
    """

    def __init__(
        self,
        place: int,
        optimiser: AdapterOptimiser,
        tasks: Sequence[EncodedTask],
        config: TrainingConfig,
        steps: int,
        seed: int,
    ) -> None:
        self.place = place
        self.optimiser = optimiser
        self.tasks = tuple(tasks)
        self.config = config
        self.steps = steps
        self.seed = seed
        self.state = TrainingState()
        self.best: dict[str, Tensor] = {}
        self._trees = [LabelTree.of(task.label_ids) for task in self.tasks]
        self._examples = [(m, i) for m, task in enumerate(self.tasks) for i in range(len(task["train"]))]
        self.validation = self._validation_rows() if config.early_stop else []

    @property
    def done(self) -> bool:
        """Whether there is no step left to make."""
        return self.state.step >= self.steps or self.state.stopped or bool(self.state.failed)

    def draw(self) -> list[BatchRow]:
        """The rows (batch_size) of the next step."""
        size = self.config.batch_size
        sizes = [len(task["train"]) for task in self.tasks]
        chosen = draw(self.state.step, sizes, size, self.seed, self.config.sampling)
        rows = []
        for place, at in enumerate(chosen):
            m, i = self._examples[at]
            key = mix(self.seed, self.state.step, place)
            rows.append(
                BatchRow(self.place, self.tasks[m], self._trees[m], i, self.tasks[m]["train"][i], 1.0 / size, key)
            )
        return rows

    @property
    def rate(self) -> float:
        """The learning rate of the next step."""
        return learning_rate(self.state.step, self.steps, self.config)

    def reduce(self) -> Tensor:
        """Clip the gradient, summed over all workers, to the config's norm; the norm () before that."""
        return self.optimiser.reduce(self.rate)

    def update(self, rows: Sequence[BatchRow], losses: Sequence[float], norm: float, tokens: int) -> dict[str, Any]:
        """Make the optimiser's step, or fail.

        Args:
            rows: the step's rows.
            losses: loss of each, in nats.
            norm: of the gradient before clipping.
            tokens: of the rows, without padding.

        Returns:
            The row of the log.

        Raises:
            RunError: a loss or the gradient is not finite; the step and the batch's examples are named, and the adapter
                and its optimiser are left as they were before the step.
        """
        step = self.state.step
        loss = sum(loss * row.weight for loss, row in zip(losses, rows, strict=True))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.state = replace(self.state, failed=self._explain(rows, losses, loss, norm))
            self.optimiser.forget()
            raise RunError(self.state.failed)
        rate = self.rate
        self.optimiser.step(rate)
        self.state = replace(self.state, step=step + 1, tokens=self.state.tokens + tokens)
        return {"step": step, "loss": loss, "learning_rate": rate, "gradient_norm": norm, "tokens": tokens}

    @property
    def wants_validation(self) -> bool:
        """Whether the validation loss is due: every so many steps, and at the end."""
        stop = self.config.early_stop
        return stop is not None and (self.state.step % stop.every == 0 or self.state.step == self.steps)

    def validated(self, losses: Sequence[float], tokens: int) -> float:
        """Take note of the losses of `validation`'s rows: keep the adapter if it is the best so far, stop if patience is out.

        Returns:
            The validation loss in nats: the mean over tasks of the mean over their examples. Where it is no finite number the
            state tells that the learner has failed.
        """
        stop = self.config.early_stop
        assert stop is not None
        loss = sum(loss * row.weight for loss, row in zip(losses, self.validation, strict=True))
        state = replace(self.state, validation_tokens=self.state.validation_tokens + tokens)
        if not math.isfinite(loss):
            why = (
                f"the validation loss is {loss} after step {state.step - 1}; lower training.learning_rate "
                f"(now {self.config.learning_rate:g})"
            )
            self.state = replace(state, failed=why)
            return loss
        if loss < (math.inf if state.best_loss is None else state.best_loss):
            self.best = self.optimiser.values()
            self.state = replace(state, best_step=state.step, best_loss=loss, waited=0)
        else:
            self.state = replace(state, waited=state.waited + 1, stopped=state.waited + 1 >= stop.patience)
        return loss

    def restore_best(self) -> None:
        """Put back the adapter that had the lowest validation loss, if validation was asked."""
        if self.best:
            self.optimiser.write(self.best)

    def save(self, folder: Path, write: bool = True) -> None:
        """Save everything that the rest of the run depends on into `folder`, which is there.

        All workers gather it together; those that are told not to `write` leave the folder as it is.
        """
        values, moments = self.optimiser.values(), self.optimiser.moments()
        if not write:
            return
        tensors = {"random": torch.get_rng_state()}
        if torch.cuda.is_available():
            tensors["random_cuda"] = torch.cuda.get_rng_state()
        for name, value in values.items():
            tensors[f"parameter/{name}"] = value.cpu().contiguous()
        for name, kept in moments.items():
            tensors |= {f"optimiser/{key}/{name}": value for key, value in kept.items()}
        for name, value in self.best.items():
            tensors[f"best/{name}"] = value.cpu().contiguous()
        save_file(tensors, folder / _TENSORS)
        # A failure is not kept: whoever goes on from here tries the step again.
        (folder / _STATE).write_text(json.dumps(asdict(replace(self.state, failed=""))))

    def load(self, folder: Path) -> None:
        """Go on from what `save` left in `folder`.

        Raises:
            InputError: it is damaged, or another adapter's.
        """
        try:
            state = TrainingState(**json.loads((folder / _STATE).read_text()))
            tensors = load_file(folder / _TENSORS)
            torch.set_rng_state(tensors["random"])
            if "random_cuda" in tensors and torch.cuda.is_available():
                torch.cuda.set_rng_state(tensors["random_cuda"])
            parameters = self.optimiser.parameters
            self.optimiser.write({name: tensors[f"parameter/{name}"] for name in parameters})
            moments: dict[str, dict[str, Tensor]] = {}
            for name, parameter in parameters.items():
                for key in ("step", "exp_avg", "exp_avg_sq"):
                    if f"optimiser/{key}/{name}" in tensors:
                        moments.setdefault(name, {})[key] = tensors[f"optimiser/{key}/{name}"]
                if f"best/{name}" in tensors:
                    self.best[name] = tensors[f"best/{name}"].to(parameter.device)
            self.optimiser.set_moments(moments)
        except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
            raise InputError(f"{folder}: cannot go on from this checkpoint ({error})") from None
        self.state = state

    def _validation_rows(self) -> list[BatchRow]:
        """The search half of every member's validation examples (DESIGN section 2.5); each member has the same weight."""
        rows = []
        for task, tree in zip(self.tasks, self._trees, strict=True):
            if len(task["validation"]) < 2:
                raise InputError(
                    f"training.early_stop: task '{task.name}' has {len(task['validation'])} validation examples, and one "
                    "half of at least two is looked at; raise limits.validation or leave early_stop out"
                )
            half = [int(i) for i in validation_halves(len(task["validation"]))[0]]
            weight = 1.0 / (len(half) * len(self.tasks))
            rows += [BatchRow(self.place, task, tree, i, task["validation"][i], weight) for i in half]
        return rows

    def _explain(self, rows: Sequence[BatchRow], losses: Sequence[float], loss: float, norm: float) -> str:
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm}"
        shown = ", ".join(
            f"{row.task.name} {row.index}{'' if math.isfinite(found) else f' (loss {found})'}"
            for row, found in zip(rows, losses, strict=True)
        )
        return (
            f"{what} at step {self.state.step} (the batch's training examples, by task and place: {shown}); "
            f"lower training.learning_rate (now {self.config.learning_rate:g})"
        )
