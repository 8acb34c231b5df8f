"""Early stop: the best adapter is kept, on the right half of the validation examples, and a stopped run forgets nothing."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_loop import CPU, fresh, train, without_seconds

from ray_ensemble.config import EarlyStopConfig, LimitsConfig, TaskConfig, TrainingConfig
from ray_ensemble.errors import InputError, RunError
from ray_ensemble.estimator.features import validation_halves
from ray_ensemble.models import (
    LabelTree,
    attach_adapters,
    label_scores,
    load_base,
    load_tokenizer,
    make_batch,
    score_loss,
)
from ray_ensemble.tasks import EncodedTask, encode_task, load_tasks

STOP = EarlyStopConfig(every=3, patience=2)
CONFIG = TrainingConfig(batch_size=4, learning_rate=2e-2, checkpoint_every=2, early_stop=STOP)


@pytest.fixture(scope="module")
def tasks(tiny_model: Path, task_folder: Path) -> list[EncodedTask]:
    """Two tasks in the same words, one the opposite of the other: validation gets worse soon."""
    loaded = load_tasks([TaskConfig(source=str(task_folder))], LimitsConfig(), task_folder)
    tokenizer = load_tokenizer(tiny_model)
    return [encode_task(task, tokenizer, 64) for task in loaded if task.name in ("contrary", "films", "options")]


@pytest.fixture(scope="module")
def initial(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fresh(tiny_model, tmp_path_factory.mktemp("early"))


def slow_validation_loss(tiny_model, initial, tasks, parameters) -> float:
    """Mean over tasks of the mean loss of the search half, one example at a time."""
    model = attach_adapters(load_base(tiny_model, "none", CPU), {"default": initial})
    model.load_state_dict(parameters, strict=False)
    means = []
    for task in tasks:
        losses = []
        for i in validation_halves(len(task["validation"]))[0]:
            example = task["validation"][i]
            batch = make_batch([example], [LabelTree.of(task.label_ids)], len(task.labels), 0, CPU)
            with torch.no_grad():
                losses.append(float(score_loss(label_scores(model, batch), batch.labels)))
        means.append(np.mean(losses))
    return float(np.mean(means))


def test_the_best_adapter_is_kept_and_patience_ends_the_run(tiny_model, initial, tasks):
    found, rows, state = train(tiny_model, initial, tasks, CONFIG, steps=60)
    seen = {row["step"] + 1: row["validation_loss"] for row in rows if "validation_loss" in row}
    assert [step % 3 for step in seen] == [0] * len(seen)
    assert state.stopped
    assert state.step < 60
    assert state.best_step == min(seen, key=lambda step: seen[step])
    assert state.step == state.best_step + STOP.every * STOP.patience
    assert state.validation_tokens > 0
    assert slow_validation_loss(tiny_model, initial, tasks, found) == pytest.approx(seen[state.best_step], rel=1e-5)
    short, _, _ = train(tiny_model, initial, tasks, CONFIG.model_copy(update={"early_stop": None}), steps=60)
    assert not all(torch.equal(found[name], short[name]) for name in found)


def test_looking_does_not_change_the_training(tiny_model, initial, tasks):
    patient = CONFIG.model_copy(update={"early_stop": EarlyStopConfig(every=1, patience=99)})
    _, rows, state = train(tiny_model, initial, tasks, patient, steps=5)
    _, plain, _ = train(tiny_model, initial, tasks, CONFIG.model_copy(update={"early_stop": None}), steps=5)
    for row in rows:
        row.pop("validation_loss")
    assert without_seconds(rows) == without_seconds(plain)
    assert not state.stopped


def test_the_other_half_is_never_looked_at(tiny_model, initial, tasks):
    """Reversed labels in the half that is reported change nothing."""
    harmed = []
    for task in tasks:
        odd = set(validation_halves(len(task["validation"]))[1].tolist())
        held = tuple(
            replace(e, label=len(task.labels) - 1 - e.label) if i in odd else e
            for i, e in enumerate(task["validation"])
        )
        harmed.append(replace(task, splits={**task.splits, "validation": held}))
    _, rows, state = train(tiny_model, initial, tasks, CONFIG, steps=9)
    _, others, other = train(tiny_model, initial, harmed, CONFIG, steps=9)
    assert without_seconds(rows) == without_seconds(others)
    assert state == other


@pytest.mark.parametrize("at", [2, 8, "last"])
def test_a_run_resumed_anywhere_keeps_its_best_and_its_patience(tiny_model, initial, tasks, tmp_path, at):
    saved: list[int] = []

    def keep(step, save):
        (tmp_path / str(step)).mkdir()
        save(tmp_path / str(step))
        saved.append(step)

    whole, rows, state = train(tiny_model, initial, tasks, CONFIG, steps=60, on_checkpoint=keep)
    assert saved[-1] == state.step  # the stop itself is in a checkpoint
    step = saved[-1] if at == "last" else at
    resumed, rest, end = train(tiny_model, initial, tasks, CONFIG, steps=60, resume=tmp_path / str(step))
    assert end == state
    assert without_seconds(rest) == without_seconds(rows[step:])
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_the_last_step_is_looked_at_too(tiny_model, initial, tasks):
    lonely = CONFIG.model_copy(update={"early_stop": EarlyStopConfig(every=50, patience=1)})
    _, rows, state = train(tiny_model, initial, tasks, lonely, steps=4)
    assert ["validation_loss" in row for row in rows] == [False, False, False, True]
    assert state.best_step == 4
    assert math.isfinite(rows[-1]["validation_loss"])


@pytest.mark.parametrize("every", [1, 2])
def test_a_validation_loss_that_is_no_number_fails_with_a_reason(tiny_model, initial, tasks, every):
    """It is met where the training loss of the step before was a number still."""
    config = CONFIG.model_copy(update={"learning_rate": 1e30, "early_stop": EarlyStopConfig(every=every)})
    with pytest.raises(RunError, match=r"lower training.learning_rate \(now 1e\+30\)"):
        train(tiny_model, initial, tasks, config, steps=6)


def test_a_task_without_validation_examples_is_named(tiny_model, initial, tasks):
    bare = replace(tasks[0], splits={**tasks[0].splits, "validation": tasks[0]["validation"][:1]})
    with pytest.raises(InputError, match=rf"training\.early_stop: task '{bare.name}' has 1 validation examples"):
        train(tiny_model, initial, [bare], CONFIG, steps=4)
