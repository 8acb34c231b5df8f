"""The training loop: the same bytes again, after a stop too; a sampler without favourites; trouble that is named."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from ray_ensemble.config import AdapterConfig, LimitsConfig, TaskConfig, TrainingConfig
from ray_ensemble.errors import InputError, RunError
from ray_ensemble.models import attach_adapters, draw_initial_adapter, load_base, load_tokenizer
from ray_ensemble.tasks import EncodedTask, encode_task, load_tasks
from ray_ensemble.training import learning_rate, sample_batch, train_adapter

CPU = torch.device("cpu")
CONFIG = TrainingConfig(batch_size=4, learning_rate=5e-3, checkpoint_every=4)


@pytest.fixture(scope="module")
def tasks(tiny_model: Path, task_folder: Path) -> list[EncodedTask]:
    loaded = load_tasks([TaskConfig(source=str(task_folder))], LimitsConfig(), task_folder)
    tokenizer = load_tokenizer(tiny_model)
    return [encode_task(task, tokenizer, 64) for task in loaded]


@pytest.fixture(scope="module")
def initial(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("init") / "init"
    draw_initial_adapter(load_base(tiny_model, "none", CPU), AdapterConfig(dropout=0.1), folder)
    return folder


def train(tiny_model, initial, tasks, config=CONFIG, steps=10, **options):
    model = attach_adapters(load_base(tiny_model, "none", CPU), {"default": initial}, trainable="default")
    rows: list[dict] = []
    state = train_adapter(model, tasks, config, steps, 3, 0, on_step=rows.append, **options)
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}, rows, state


def test_a_stopped_run_ends_as_an_undisturbed_one_to_the_last_bit(tiny_model, initial, tasks, tmp_path):
    whole, rows, state = train(tiny_model, initial, tasks)

    class Killed(Exception):
        pass

    def save_and_die(step, save):
        folder = tmp_path / str(step)
        folder.mkdir()
        save(folder)
        if step == 8:
            raise Killed

    with pytest.raises(Killed):
        train(tiny_model, initial, tasks, on_checkpoint=save_and_die)
    torch.manual_seed(99)  # whatever the new process has drawn before
    resumed, rest, end = train(tiny_model, initial, tasks, resume=tmp_path / "8")
    assert [row["step"] for row in rest] == [8, 9]
    assert rest == rows[8:]
    assert end == state
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_another_seed_or_checkpoint_interval(tiny_model, initial, tasks):
    first, rows, _ = train(tiny_model, initial, tasks, steps=3)
    again, _, _ = train(tiny_model, initial, tasks, CONFIG.model_copy(update={"checkpoint_every": 1}), steps=3)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert rows[0]["learning_rate"] <= CONFIG.learning_rate


def test_loss_falls_on_a_task_that_can_be_learned(tiny_model, initial, tasks):
    films = [task for task in tasks if task.name == "films"]
    _, rows, _ = train(tiny_model, initial, films, CONFIG.model_copy(update={"batch_size": 8}), steps=60)
    losses = [row["loss"] for row in rows]
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:5])


def test_micro_batches_do_not_change_the_loss(tiny_model, tasks, tmp_path, monkeypatch):
    from ray_ensemble.training import loop

    initial = tmp_path / "init"  # without dropout, whose draws follow the shapes
    draw_initial_adapter(load_base(tiny_model, "none", CPU), AdapterConfig(), initial)
    _, together, _ = train(tiny_model, initial, tasks, steps=3)
    monkeypatch.setattr(loop, "_micro_batches", lambda chosen: [[pair] for pair in chosen])
    _, apart, _ = train(tiny_model, initial, tasks, steps=3)
    for a, b in zip(together, apart, strict=True):
        assert math.isclose(a["loss"], b["loss"], rel_tol=1e-5)
        assert a["tokens"] == b["tokens"]


def test_a_damaged_checkpoint_is_named(tiny_model, initial, tasks, tmp_path):
    (tmp_path / "state.json").write_text('{"step": 4, "tokens": 1}')
    (tmp_path / "state.safetensors").write_bytes(b"broken")
    with pytest.raises(InputError, match=str(tmp_path)):
        train(tiny_model, initial, tasks, resume=tmp_path)


def test_a_loss_that_is_no_number_stops_with_step_and_tasks(tiny_model, initial, tasks):
    with pytest.raises(RunError, match=r"at step \d+ \(tasks of the batch: .*learning_rate"):
        train(
            tiny_model,
            initial,
            tasks,
            CONFIG.model_copy(update={"learning_rate": 1e30, "max_grad_norm": 1e30}),
            steps=20,
        )


def test_every_example_is_drawn_equally_often():
    drawn = Counter(int(i) for step in range(35) for i in sample_batch(step, 10, 4, seed=1))
    assert set(drawn.values()) == {14}
    assert drawn.keys() == set(range(10))
    epoch = [int(i) for step in range(5) for i in sample_batch(step, 10, 4, seed=1)]
    assert sorted(epoch[:10]) == sorted(epoch[10:]) == list(range(10))
    assert epoch[:10] != epoch[10:]
    assert not np.array_equal(sample_batch(0, 100, 8, seed=1), sample_batch(0, 100, 8, seed=2))


def test_learning_rate_warms_up_and_decays():
    config = TrainingConfig(learning_rate=1.0, warmup=0.25)
    rates = [learning_rate(step, 100, config) for step in range(100)]
    assert rates[0] == pytest.approx(0.04)
    assert max(rates) == rates[24] == rates[25] == 1.0
    assert rates[-1] == pytest.approx(1 / 75)
    cosine = config.model_copy(update={"schedule": "cosine"})
    assert learning_rate(25 + 75 // 2, 100, cosine) == pytest.approx(0.5, abs=0.02)
