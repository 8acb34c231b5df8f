"""The training loop: AdamW on label losses, resumable to the last bit on a CPU. No Ray here.

The sampler is a function of (seed, step), so a checkpoint of the adapter, the optimiser, the random state and the step is
all that a resumed run needs to end where an undisturbed one does. One adapter and several on one base (`together`) go
through the same loop; what they share is the forward pass.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from ray_ensemble.config import TrainingConfig
from ray_ensemble.errors import RunError
from ray_ensemble.models.scoring import label_scores, length_sorted_batches, make_batch, score_loss
from ray_ensemble.tasks import EncodedTask
from ray_ensemble.training.learner import BatchRow, Learner, TrainingState
from ray_ensemble.training.microbatches import TokenBudget, cut, is_out_of_memory
from ray_ensemble.training.numerics import DropoutRows, activation_checkpointing, autocast, row_dropout

Route = Callable[[Sequence[int], torch.device], None]  # told which learner each row of the next batch belongs to
OnStep = Callable[[Learner, dict[str, Any]], None]
OnCheckpoint = Callable[[int, Callable[[Path], None]], None]


def train_adapter(
    model: PeftModel,
    tasks: Sequence[EncodedTask],
    config: TrainingConfig,
    steps: int,
    seed: int,
    pad_id: int,
    *,
    resume: Path | None = None,
    on_step: Callable[[dict[str, Any]], None] = lambda row: None,
    on_checkpoint: OnCheckpoint = lambda step, save: None,
) -> TrainingState:
    """Train the one trainable adapter of `model` on the training splits of `tasks`.

    Args:
        model: a PEFT model whose trainable parameters are the active adapter's.
        tasks: the group's members, in the job's order.
        config: batch size, learning rate, schedule, clipping, sampling, precision, early stop, checkpoint interval.
        steps: optimiser steps in all; early stop may make fewer.
        seed: of the sampler and of dropout.
        pad_id: any token id.
        resume: a folder that an earlier run's checkpoint was saved to.
        on_step: called after each step with {"step", "loss", "learning_rate", "gradient_norm", "tokens", "seconds"}, with
            "validation_loss" where it was evaluated, and "batch_tokens" where memory made the budget of a micro-batch smaller.
        on_checkpoint: called with the step and a function that saves the checkpoint into a folder.

    Returns:
        The final state. With early stop the adapter is that of its `best_step`, else that of the last step.

    Raises:
        RunError: the loss or the gradient became NaN or infinite (the step and its examples are named), or memory ran out.
        InputError: the checkpoint is damaged, or this device cannot do what the config asks for.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    device = next(iter(parameters.values())).device
    torch.manual_seed(seed)
    learner = Learner(0, parameters, tasks, config, steps, seed)
    if resume is not None:
        learner.load(resume)
    with ExitStack() as stack:
        loop = Loop(model, [learner], config, pad_id, device, stack, model.active_adapters)
        loop.run(lambda _, row: on_step(row), lambda step, save: on_checkpoint(step, lambda at: save(at, learner)))
    if learner.state.failed:
        raise RunError(learner.state.failed)
    return learner.state


@dataclass
class _Passed:
    """Rows that went through the model, and their losses, in the same order."""

    rows: list[BatchRow]
    losses: list[Tensor]


class Loop:
    """The steps of one or several learners whose rows go through the model together.

    Args:
        model: the base with the learners' adapters on it.
        learners: adapters to train; each makes its own steps, and drops out when it has made them.
        config: how to train, the same for all.
        pad_id: any token id.
        device: where the model is.
        stack: what the loop changes in the model is undone when this closes.
        adapters: names of the learners' adapters in the model.
        route: told before each pass which learner each of its rows belongs to.
    """

    def __init__(
        self,
        model: PeftModel,
        learners: Sequence[Learner],
        config: TrainingConfig,
        pad_id: int,
        device: torch.device,
        stack: ExitStack,
        adapters: Sequence[str],
        route: Route = lambda learners, device: None,
    ) -> None:
        self.model = model
        self.learners = list(learners)
        self.config = config
        self.pad_id = pad_id
        self.device = device
        self.route = route
        self._autocast: Callable[[], AbstractContextManager[Any]] = autocast(config, device)
        self._dropout: DropoutRows = stack.enter_context(row_dropout(model, adapters))
        stack.enter_context(activation_checkpointing(model, config.activation_checkpointing))
        lowered = [learner.state.batch_tokens for learner in learners if learner.state.batch_tokens is not None]
        self._budget = TokenBudget(min([config.batch_tokens, *lowered]), device)

    def run(self, on_step: OnStep, on_checkpoint: Callable[[int, Callable[[Path, Learner], None]], None]) -> None:
        """Make all steps of all learners. A learner whose loss is not finite fails alone; its state tells why."""
        self.model.train()
        step = max(learner.state.step for learner in self.learners)
        while active := [learner for learner in self.learners if not learner.done]:
            self._step(active, on_step)
            step += 1
            ended = any(learner.done and not learner.state.failed for learner in active)
            if step % self.config.checkpoint_every == 0 or ended:
                on_checkpoint(step, lambda folder, learner: learner.save(folder))
        for learner in self.learners:
            learner.restore_best()
        self.model.eval()

    def _step(self, active: Sequence[Learner], on_step: OnStep) -> None:
        """One step of every learner that has one left."""
        started = time.perf_counter()
        batches = {learner.place: learner.draw() for learner in active}
        rows = [row for batch in batches.values() for row in batch]
        done = self._gradients(active, rows)
        # One copy to the host for everything that is logged and checked.
        norms = [learner.clip() for learner in active]
        numbers = torch.cat([*done.losses, torch.stack(norms).to(torch.float32)]).tolist()
        losses = dict(zip((id(row) for row in done.rows), numbers[: len(rows)], strict=True))
        logged = []
        for learner, norm in zip(active, numbers[len(rows) :], strict=True):
            batch = batches[learner.place]
            tokens = sum(row.length for row in batch)
            try:
                line = learner.update(batch, [losses[id(row)] for row in batch], norm, tokens)
            except RunError:
                continue  # the learner's state tells; the others go on
            if learner.wants_validation:
                line["validation_loss"] = learner.validated(*self._evaluate(learner.validation, line["step"]))
            logged.append((learner, line))
        for learner, line in logged:
            line["seconds"] = time.perf_counter() - started
            if self._budget.tokens < self.config.batch_tokens:
                line["batch_tokens"] = self._budget.tokens
                learner.state = replace(learner.state, batch_tokens=self._budget.tokens)
            on_step(learner, line)

    def _gradients(self, active: Sequence[Learner], rows: Sequence[BatchRow]) -> _Passed:
        """Gradients of every learner's mean loss, by micro-batches that fit into memory."""
        random = torch.get_rng_state()
        while True:
            done = _Passed([], [])
            for part in cut(rows, self._budget.tokens):
                try:
                    done.losses.append(self._backward(part))
                    done.rows += part
                    continue
                except (MemoryError, RuntimeError) as error:
                    if not is_out_of_memory(error):
                        raise
                # Only here is the error gone, and with it the tensors that its traceback held.
                for learner in active:
                    learner.forget_gradient()
                self._budget.halve(part, active[0].state.step)
                torch.set_rng_state(random)
                break
            else:
                return done

    def _backward(self, part: Sequence[BatchRow]) -> Tensor:
        """Add a micro-batch's share to the gradients; the losses (N,) of its rows."""
        losses = self._losses(part)
        weights = torch.tensor([row.weight for row in part], device=losses.device)
        (losses * weights).sum().backward()  # type: ignore[no-untyped-call]
        return losses.detach()

    def _losses(self, rows: Sequence[BatchRow]) -> Tensor:
        """Losses (N,) of the label words, in nats."""
        classes = max(len(row.task.labels) for row in rows)
        batch = make_batch([r.example for r in rows], [r.tree for r in rows], classes, self.pad_id, self.device)
        self.route([row.learner for row in rows], self.device)
        self._dropout.keys, self._dropout.lengths = [row.key for row in rows], [row.length for row in rows]
        with self._autocast():
            scores = label_scores(self.model, batch)
        if any(row.example.offsets for row in rows):
            offsets = [(*row.example.offsets, *[0.0] * (classes - len(row.example.offsets))) for row in rows]
            scores = scores + torch.tensor(offsets, device=scores.device)
        return score_loss(scores, batch.labels)

    def _evaluate(self, rows: Sequence[BatchRow], step: int) -> tuple[list[float], int]:
        """Losses of `rows`, all of one learner, without dropout or gradient; and the tokens that were read."""
        losses = [0.0] * len(rows)
        self.model.eval()
        waiting = [[rows[i] for i in part] for part in self._evaluation_batches(rows)]
        places = {id(row): i for i, row in enumerate(rows)}
        while waiting:
            part = waiting.pop()
            try:
                with torch.no_grad():
                    found = self._losses(part).tolist()
                for row, loss in zip(part, found, strict=True):
                    losses[places[id(row)]] = loss
                continue
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
            self._budget.halve(part, step, "validating")
            left = [row for batch in [*waiting, part] for row in batch]
            waiting = [[left[i] for i in batch] for batch in self._evaluation_batches(left)]
        self.model.train()
        return losses, sum(row.length for row in rows)

    def _evaluation_batches(self, rows: Sequence[BatchRow]) -> list[list[int]]:
        return length_sorted_batches([row.length for row in rows], self._budget.tokens)
