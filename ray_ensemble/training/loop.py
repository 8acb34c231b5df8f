"""The training loop of one adapter: AdamW on label losses, resumable to the last bit. No Ray here.

The sampler is a function of (seed, step), so a checkpoint of the adapter, the optimiser, the random state and the step is
all that a resumed run needs to end where an undisturbed one does.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ray_ensemble.config import TrainingConfig
from ray_ensemble.errors import InputError, RunError
from ray_ensemble.models.scoring import LabelTree, label_scores, make_batch, score_loss
from ray_ensemble.tasks import EncodedExample, EncodedTask

_TENSORS = "state.safetensors"
_STATE = "state.json"
_MICRO_TOKENS = 16  # a longer micro-batch is split where that saves this many padded tokens a row


@dataclass(frozen=True)
class TrainingState:
    """What a run has counted so far: optimiser steps, and tokens that were not padding."""

    step: int = 0
    tokens: int = 0


def sample_batch(step: int, examples: int, batch_size: int, seed: int) -> NDArray[np.int64]:
    """Indices (batch_size,) of the examples of one step.

    The sampler goes through all examples in a fresh random order each epoch and lets batches straddle epochs, so every
    example is drawn equally often: the estimate weighs examples in the same way (DESIGN section 2.3).
    """
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    orders: dict[int, NDArray[np.int64]] = {}
    indices = []
    for position in positions:
        epoch, place = divmod(int(position), examples)
        if epoch not in orders:
            orders[epoch] = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(examples)
        indices.append(orders[epoch][place])
    return np.array(indices, dtype=np.int64)


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
    on_checkpoint: Callable[[int, Callable[[Path], None]], None] = lambda step, save: None,
) -> TrainingState:
    """Train the one trainable adapter of `model` on the training splits of `tasks`.

    Args:
        model: a PEFT model whose trainable parameters are the adapter's.
        tasks: the group's members, in the job's order.
        config: batch size, learning rate, schedule, clipping, checkpoint interval.
        steps: optimiser steps in all.
        seed: of the sampler and of dropout.
        pad_id: any token id.
        resume: a folder that an earlier run's checkpoint was saved to.
        on_step: called with {"step", "loss", "learning_rate", "tokens"} after each step.
        on_checkpoint: called with the step and a function that saves the checkpoint into a folder.

    Returns:
        The final state: steps made and tokens seen.

    Raises:
        RunError: the loss became NaN or infinite; the step and its examples are named.
    """
    pool = [(task, example) for task in tasks for example in task["train"]]
    trees = {task.name: LabelTree.of(task.label_ids) for task in tasks}
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimiser = torch.optim.AdamW(parameters.values(), lr=config.learning_rate, weight_decay=config.weight_decay)
    device = next(iter(parameters.values())).device
    torch.manual_seed(seed)
    state = TrainingState() if resume is None else _load(resume, parameters, optimiser)
    model.train()
    for step in range(state.step, steps):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps, config)
        chosen = [pool[i] for i in sample_batch(step, len(pool), config.batch_size, seed)]
        loss_sum, tokens = 0.0, 0
        for part in _micro_batches(chosen):
            examples = [example for _, example in part]
            classes = max(len(task.labels) for task, _ in part)
            batch = make_batch(examples, [trees[task.name] for task, _ in part], classes, pad_id, device)
            loss = score_loss(label_scores(model, batch), batch.labels).sum() / len(chosen)
            loss.backward()  # type: ignore[no-untyped-call]
            loss_sum += float(loss.detach())
            tokens += batch.tokens
        if not math.isfinite(loss_sum):
            raise RunError(
                f"the loss is {loss_sum} at step {step} (tasks of the batch: {', '.join(t.name for t, _ in chosen)}); "
                f"lower training.learning_rate (now {config.learning_rate})"
            )
        torch.nn.utils.clip_grad_norm_(parameters.values(), config.max_grad_norm)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        state = TrainingState(step + 1, state.tokens + tokens)
        on_step({"step": step, "loss": loss_sum, "learning_rate": optimiser.param_groups[0]["lr"], "tokens": tokens})
        if state.step % config.checkpoint_every == 0 or state.step == steps:
            current = state
            on_checkpoint(state.step, lambda folder, s=current: _save(folder, parameters, optimiser, s))  # type: ignore[misc]
    model.eval()
    return state


def _micro_batches(
    chosen: list[tuple[EncodedTask, EncodedExample]],
) -> list[list[tuple[EncodedTask, EncodedExample]]]:
    """Cut a step's examples into parts of like length, since padding costs as much as text and a step's loss is a sum."""
    ordered = sorted(chosen, key=lambda pair: len(pair[1].prompt_ids))
    parts = [[ordered[0]]]
    for pair in ordered[1:]:
        shortest = len(parts[-1][0][1].prompt_ids)
        if len(pair[1].prompt_ids) - shortest > max(_MICRO_TOKENS, shortest // 2):
            parts.append([])
        parts[-1].append(pair)
    return parts


def _save(
    folder: Path, parameters: dict[str, torch.nn.Parameter], optimiser: torch.optim.Optimizer, state: TrainingState
) -> None:
    tensors = {"random": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["random_cuda"] = torch.cuda.get_rng_state()
    for name, parameter in parameters.items():
        tensors[f"parameter/{name}"] = parameter.detach().cpu().contiguous()
        for key, value in optimiser.state[parameter].items():
            tensors[f"optimiser/{key}/{name}"] = value.detach().cpu().contiguous()
    save_file(tensors, folder / _TENSORS)
    (folder / _STATE).write_text(json.dumps({"step": state.step, "tokens": state.tokens}))


def _load(folder: Path, parameters: dict[str, torch.nn.Parameter], optimiser: torch.optim.Optimizer) -> TrainingState:
    try:
        state = TrainingState(**json.loads((folder / _STATE).read_text()))
        tensors = load_file(folder / _TENSORS)
        torch.set_rng_state(tensors["random"])
        if "random_cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["random_cuda"])
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(tensors[f"parameter/{name}"])
                keys = [k for k in ("step", "exp_avg", "exp_avg_sq") if f"optimiser/{k}/{name}" in tensors]
                optimiser.state[parameter] = {
                    # AdamW keeps its step count on the CPU and its moments beside the parameter.
                    k: tensors[f"optimiser/{k}/{name}"].to("cpu" if k == "step" else parameter.device)
                    for k in keys
                }
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{folder}: cannot go on from this checkpoint ({error})") from None
    return state
