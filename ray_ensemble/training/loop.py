"""The training loop: AdamW on label losses, resumable to the last bit on a CPU. No Ray here.

The sampler is a function of (seed, step), so a checkpoint of the adapter, the optimiser, the random state and the step is
all that a resumed run needs to end where an undisturbed one does. One adapter and several on one base (`together`) go
through the same loop; what they share is the forward pass.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from ray_ensemble.config import TrainingConfig
from ray_ensemble.errors import RunError
from ray_ensemble.models.scoring import length_sorted_batches, make_batch, model_inputs, score_loss, scores_of_logits
from ray_ensemble.tasks import EncodedTask
from ray_ensemble.training.learner import BatchRow, Learner, TrainingState
from ray_ensemble.training.microbatches import TokenBudget, TooLarge, cut, is_out_of_memory
from ray_ensemble.training.numerics import DropoutRows, activation_checkpointing, autocast, row_dropout
from ray_ensemble.training.pack import StepLost
from ray_ensemble.training.parallel import Cut, Workers

Route = Callable[[Sequence[int], torch.device], None]  # told which learner each row of the next batch belongs to
OnStep = Callable[[Learner, dict[str, Any]], None]
OnCheckpoint = Callable[[int, Callable[[Path], None]], None]

_STARTS_AGAIN = (
    "; with training.strategy zero2, zero3 or fsdp2 a job starts again for that, training.max_failures times"
)


def train_adapter(
    model: PeftModel,
    tasks: Sequence[EncodedTask],
    config: TrainingConfig,
    steps: int,
    seed: int,
    pad_id: int,
    *,
    workers: Workers | None = None,
    resume: Path | None = None,
    on_step: Callable[[dict[str, Any]], None] = lambda row: None,
    on_checkpoint: OnCheckpoint = lambda step, save: None,
    preempted: Callable[[], bool] = lambda: False,
) -> TrainingState:
    """Train the one trainable adapter of `model` on the training splits of `tasks`.

    Args:
        model: a PEFT model whose trainable parameters are the active adapter's.
        tasks: the group's members, in the job's order.
        config: batch size, learning rate, schedule, clipping, sampling, precision, early stop, checkpoint interval.
        steps: optimiser steps in all; early stop may make fewer.
        seed: of the sampler and of dropout.
        pad_id: any token id.
        workers: those of the job, which all call this with a model that they loaded; without, this process is the only one.
        resume: a folder that an earlier run's checkpoint was saved to, by any number of workers under any strategy.
        on_step: called after each step with {"step", "loss", "learning_rate", "gradient_norm", "tokens", "seconds"}, with
            "validation_loss" where it was evaluated, and "batch_tokens" where memory made the budget of a micro-batch smaller;
            the same on all workers, but for the seconds.
        on_checkpoint: called with the step and a function that saves the checkpoint into a folder. All workers have to call it;
            the first one writes.
        preempted: asked after each step, with the same answer on all workers; when it first says yes, a checkpoint follows.

    Returns:
        The final state. With early stop the adapter is that of its `best_step`, else that of the last step.

    Raises:
        RunError: the loss or the gradient became NaN or infinite (the step and its examples are named), or memory ran out.
        InputError: the checkpoint is damaged, or this device cannot do what the config asks for.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    device = next(iter(parameters.values())).device
    torch.manual_seed(seed)
    workers = workers or Workers(config)
    learner = Learner(0, workers.optimiser(model, parameters), tasks, config, steps, seed)
    if resume is not None:
        learner.load(resume)
    with ExitStack() as stack:
        loop = Loop(model, [learner], config, pad_id, device, stack, model.active_adapters, workers)
        loop.run(
            lambda _, row: on_step(row), lambda step, save: on_checkpoint(step, lambda at: save(at, learner)), preempted
        )
    if learner.state.failed:
        raise RunError(learner.state.failed)
    return learner.state


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
        workers: those that share each step.
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
        workers: Workers,
        route: Route = lambda learners, device: None,
    ) -> None:
        self.model = model
        self.learners = list(learners)
        self.config = config
        self.pad_id = pad_id
        self.device = device
        self.route = route
        self.workers = workers
        self._forward = workers.forward(model)
        self._autocast: Callable[[], AbstractContextManager[Any]] = autocast(config, device)
        self._dropout: DropoutRows = stack.enter_context(row_dropout(model, adapters))
        stack.enter_context(activation_checkpointing(model, config.activation_checkpointing))
        lowered = [learner.state.batch_tokens for learner in learners if learner.state.batch_tokens is not None]
        self._most = config.tokens_of(device.type)
        self._budget = TokenBudget(min([self._most, *lowered]), device)

    def run(
        self,
        on_step: OnStep,
        on_checkpoint: Callable[[int, Callable[[Path, Learner], None]], None],
        preempted: Callable[[], bool],
    ) -> None:
        """Make all steps of all learners. A learner whose loss is not finite fails alone; its state tells why."""
        self.model.train()
        step = max(learner.state.step for learner in self.learners)
        warned = False
        while active := [learner for learner in self.learners if not learner.done]:
            self._step(active, on_step)
            step += 1
            ended = any(learner.done and not learner.state.failed for learner in active)
            notice = not warned and preempted()
            warned = warned or notice
            if step % self.config.checkpoint_every == 0 or ended or notice:
                on_checkpoint(step, lambda folder, learner: learner.save(folder, self.workers.rank == 0))
        for learner in self.learners:
            learner.restore_best()
        self.model.eval()

    def _step(self, active: Sequence[Learner], on_step: OnStep) -> None:
        """One step of every learner that has one left."""
        started = time.perf_counter()
        batches = {learner.place: learner.draw() for learner in active}
        rows = [row for batch in batches.values() for row in batch]
        found = self._gradients(active, rows)
        # One copy to the host for everything that is logged and checked.
        norms = [learner.reduce() for learner in active]
        numbers = torch.cat([found, torch.stack(norms).to(torch.float32)]).tolist()
        losses = dict(zip((id(row) for row in rows), numbers[: len(rows)], strict=True))
        logged = []
        for learner, norm in zip(active, numbers[len(rows) :], strict=True):
            batch = batches[learner.place]
            tokens = sum(row.length for row in batch)
            try:
                line = learner.update(batch, [losses[id(row)] for row in batch], norm, tokens)
            except RunError:
                continue  # the learner's state tells; the others go on
            if learner.wants_validation:
                loss = learner.validated(*self._evaluate(learner.validation, line["step"]))
                if not learner.state.failed:
                    line["validation_loss"] = loss
            logged.append((learner, line))
        for learner, line in logged:
            line["seconds"] = time.perf_counter() - started
            if self._budget.tokens < self._most:
                line["batch_tokens"] = self._budget.tokens
                learner.state = replace(learner.state, batch_tokens=self._budget.tokens)
            on_step(learner, line)

    def _gradients(self, active: Sequence[Learner], rows: Sequence[BatchRow]) -> Tensor:
        """Add up the gradients of every learner's mean loss; the losses (N,) of all workers' rows."""
        random = torch.get_rng_state()

        def again() -> None:
            for learner in active:
                learner.optimiser.forget()
            torch.set_rng_state(random)

        return self._passes(rows, cut, self._backward, again, active[0].state.step, "training")

    def _passes(
        self,
        rows: Sequence[BatchRow],
        cutter: Cut,
        run: Callable[[Sequence[BatchRow], bool], Tensor],
        again: Callable[[], None],
        step: int,
        doing: str,
    ) -> Tensor:
        """Losses (N,) of `rows`, each worker having run its share of them by micro-batches that fit into every worker's memory.

        `run` is given a micro-batch and whether it is the last one; `again` is called before a smaller budget is tried.
        """
        while True:
            done: list[tuple[list[BatchRow], Tensor]] = []
            failed: TooLarge | None = None
            parts = self.workers.parts(rows, self._budget.tokens, cutter)
            for part in parts:
                try:
                    done.append((part, run(part, len(done) + 1 == len(parts))))
                    continue
                except (MemoryError, RuntimeError) as error:
                    if not is_out_of_memory(error):
                        raise
                    failed = TooLarge.of(part)
                # Only here is the error gone, and with it the tensors that its traceback held.
                if self.workers.lockstep:
                    told = self._budget.given_up(failed, step, doing, _STARTS_AGAIN if failed.rows > 1 else "")
                    raise StepLost(str(told), failed.tokens if failed.rows > 1 else 0)
                break
            failed = self.workers.worst(failed, self.device)
            if failed is None:
                return self.workers.gather(rows, done, self.device)
            again()
            self._budget.halve(failed, step, doing)

    def _backward(self, part: Sequence[BatchRow], last: bool) -> Tensor:
        """Add a micro-batch's share to the gradients; the losses (N,) of its rows."""
        losses = self._losses(part)
        weights = torch.tensor([row.weight for row in part], device=losses.device)
        self.workers.backward((losses * weights).sum(), last)
        return losses.detach()

    def _losses(self, rows: Sequence[BatchRow]) -> Tensor:
        """Losses (N,) of the label words, in nats."""
        classes = max(len(row.task.labels) for row in rows)
        batch = make_batch([r.example for r in rows], [r.tree for r in rows], classes, self.pad_id, self.device)
        self.route([row.learner for row in rows], self.device)
        self._dropout.keys, self._dropout.lengths = [row.key for row in rows], [row.length for row in rows]
        inputs = model_inputs(self.model, batch)
        with self._autocast():
            logits = self._forward(**inputs, logits_to_keep=batch.keep).logits  # (N, keep, V)
        scores = scores_of_logits(logits, batch)
        if any(row.example.offsets for row in rows):
            offsets = [(*row.example.offsets, *[0.0] * (classes - len(row.example.offsets))) for row in rows]
            scores = scores + torch.tensor(offsets, device=scores.device)
        return score_loss(scores, batch.labels)

    def _evaluate(self, rows: Sequence[BatchRow], step: int) -> tuple[list[float], int]:
        """Losses of `rows`, all of one learner, without dropout or gradient; and the tokens that were read."""
        self.model.eval()
        with torch.no_grad():
            losses = self._passes(
                rows, _cut_to_read, lambda part, last: self._losses(part), lambda: None, step, "validating"
            )
        self.model.train()
        return losses.tolist(), sum(row.length for row in rows)


def _cut_to_read(rows: Sequence[BatchRow], token_budget: int) -> list[list[BatchRow]]:
    parts = length_sorted_batches([row.length for row in rows], token_budget)
    return [[rows[i] for i in part] for part in parts]
