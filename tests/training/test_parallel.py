"""Several workers train the adapter that one would, under every strategy, and any number of them goes on from any checkpoint."""

from __future__ import annotations

import importlib.util
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from crew import Crew, Trained, Training
from safetensors.torch import load_file
from test_loop import CPU

from ray_ensemble.config import AdapterConfig, LimitsConfig, TaskConfig, TrainingConfig, load_config
from ray_ensemble.errors import InputError
from ray_ensemble.files import read_json
from ray_ensemble.models import attach_adapters, draw_initial_adapter, load_base, load_tokenizer, save_adapter
from ray_ensemble.tasks import EncodedTask, encode_task, load_tasks
from ray_ensemble.training import train_adapter
from ray_ensemble.training.learner import Learner
from ray_ensemble.training.microbatches import cut
from ray_ensemble.training.optimiser import AdapterOptimiser
from ray_ensemble.training.parallel import Workers, check_strategy, share

# Rows of several lengths, several micro-batches a step, dropout, validation: whatever could depend on who has which row.
CONFIG = TrainingConfig(
    batch_size=6, learning_rate=5e-3, checkpoint_every=4, batch_tokens=60, early_stop={"every": 3, "patience": 9}
)
STRATEGIES = ("none", "zero2", "zero3", "fsdp2")
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed")


@pytest.fixture(scope="module")
def tasks(tiny_model: Path, task_folder: Path) -> list[EncodedTask]:
    tokenizer = load_tokenizer(tiny_model)
    loaded = load_tasks([TaskConfig(source=str(task_folder))], LimitsConfig(), task_folder)
    return [encode_task(task, tokenizer, 64) for task in loaded if task.name in ("films", "options")]


@pytest.fixture(scope="module")
def initial(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parallel") / "init"
    draw_initial_adapter(load_base(tiny_model, "none", CPU), AdapterConfig(dropout=0.1), folder)
    return folder


@pytest.fixture(scope="module")
def alone(tiny_model, initial, tasks, tmp_path_factory) -> tuple[Trained, Path]:
    """What one worker makes of it, and the folder of its adapter."""
    model = attach_adapters(load_base(tiny_model, "none", CPU), {"default": initial}, trainable="default")
    rows: list[dict] = []
    state = train_adapter(model, tasks, CONFIG, 8, 3, 0, on_step=rows.append)
    folder = tmp_path_factory.mktemp("alone")
    save_adapter(model, folder, "default")
    adapter = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    return Trained(rows, adapter, state, [], _weights(tiny_model)), folder


@pytest.fixture(scope="module")
def pair() -> Iterator[Crew]:
    with Crew(2) as crew:
        yield crew


@pytest.fixture(scope="module")
def single() -> Iterator[Crew]:
    with Crew(1) as crew:
        yield crew


def _weights(tiny_model: Path) -> int:
    return sum(p.numel() * p.element_size() for p in load_base(tiny_model, "none", CPU).parameters())


def of(strategy: str, workers: int, **changes: object) -> TrainingConfig:
    return TrainingConfig.model_validate({**CONFIG.model_dump(), "strategy": strategy, "workers": workers, **changes})


def assert_equal(said: list[Trained], wanted: Trained, tolerance: float, first: int = 0) -> None:
    """Every worker tells of the same steps and ends with the same adapter, and both are the wanted ones."""
    assert [one.error for one in said] == [""] * len(said)
    for one in said:
        assert len(one.rows) == len(wanted.rows) - first
        for a, b in zip(one.rows, wanted.rows[first:], strict=True):
            assert (a["step"], a["tokens"], a["learning_rate"]) == (b["step"], b["tokens"], b["learning_rate"])
            for key in ("loss", "gradient_norm", "validation_loss"):
                assert (key in a) == (key in b)
                assert key not in a or math.isclose(a[key], b[key], rel_tol=tolerance)
        assert one.adapter.keys() == wanted.adapter.keys()
        for name, value in wanted.adapter.items():
            assert one.adapter[name].dtype == value.dtype
            assert torch.allclose(one.adapter[name], value, atol=1e-5)
            assert torch.equal(one.adapter[name], said[0].adapter[name])
        counted = ("step", "tokens", "validation_tokens", "best_step", "waited", "stopped", "batch_tokens")
        assert [getattr(one.state, c) for c in counted] == [getattr(wanted.state, c) for c in counted]


# --- without processes ------------------------------------------------------------------------------------------------------


def rows_of(tasks, config, step=0):
    parameters = {"a": torch.nn.Parameter(torch.zeros(1))}
    learner = Learner(0, AdapterOptimiser(parameters, config), tasks, config, 50, 3)
    learner.state = type(learner.state)(step=step)
    return learner.draw(), learner.validation


@pytest.mark.parametrize("workers", [1, 2, 3, 6, 9])
@pytest.mark.parametrize("lockstep", [False, True])
def test_every_row_has_one_worker_and_collective_passes_are_as_many_on_all(tasks, workers, lockstep):
    for step in range(6):
        for rows in rows_of(tasks, CONFIG, step):
            shares = share(rows, workers)
            assert sorted(map(id, rows)) == sorted(id(row) for mine in shares for row in mine)
            assert len(rows) < workers or all(shares)
            tokens = [sum(row.length for row in mine) for mine in shares]
            assert max(tokens) - min(tokens) <= max(row.length for row in rows)
            taken, passes = [], []
            for rank in range(workers):
                one = Workers(CONFIG)
                one.count, one.rank, one.lockstep = workers, rank, lockstep
                parts = one.parts(rows, 60, cut)
                passes.append(len(parts))
                taken += [row for part in parts for row in part if row.weight]
            assert sorted(map(id, rows)) == sorted(map(id, taken))
            assert not lockstep or len(set(passes)) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"offload": True}, "needs strategy zero2, zero3 or fsdp2"),
        ({"strategy": "zero2", "optimizer": "paged_adamw"}, "use adamw, with offload"),
        ({"workers": 9}, "9 workers share the 8 examples"),
        ({"workers": 2, "gpus": 0.5}, "several workers cannot share a gpu"),
        ({"strategy": "zero4"}, "'none', 'zero2', 'zero3' or 'fsdp2'"),
        ({"workers": 0}, "greater than or equal to 1"),
        ({"workers": "many"}, "'auto', or a valid integer, or a valid dictionary"),
    ],
)
def test_settings_that_cannot_go_together_are_refused_with_what_to_do(whole_job, tmp_path, changes, message):
    overrides = [f"training.{key}={value}" for key, value in changes.items()]
    with pytest.raises(InputError, match=message):
        load_config(whole_job, overrides)


def test_deepspeed_that_is_not_installed_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # Python's way to say that there is none
    for strategy in ("none", "fsdp2"):
        check_strategy(of(strategy, 1))
    for strategy in ("zero2", "zero3"):
        with pytest.raises(
            InputError, match=rf"training.strategy: {strategy} .*pip install 'ray-ensemble\[deepspeed\]'"
        ):
            check_strategy(of(strategy, 1))


# --- the same training on several workers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["none", "fsdp2"])
def test_two_workers_train_what_one_would(strategy, tiny_model, initial, tasks, alone, pair, tmp_path):
    said = pair.train(Training(tiny_model, initial, tasks, of(strategy, 2), leave=tmp_path / "left"))
    assert_equal(said, alone[0], 1e-5)
    assert_same_format(tmp_path / "left", alone[1])


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_two_workers_of_deepspeed_train_what_one_would(
    strategy, offload, tiny_model, initial, tasks, alone, pair, tmp_path
):
    config = of(strategy, 2, offload=offload)
    said = pair.train(Training(tiny_model, initial, tasks, config, leave=tmp_path / "left"))
    assert_equal(said, alone[0], 1e-3)
    assert_same_format(tmp_path / "left", alone[1])


def assert_same_format(folder: Path, wanted: Path, besides: tuple[str, ...] = ()) -> None:
    found, other = load_file(folder / "adapter_model.safetensors"), load_file(wanted / "adapter_model.safetensors")
    assert {n: (t.shape, t.dtype) for n, t in found.items()} == {n: (t.shape, t.dtype) for n, t in other.items()}
    assert all(torch.allclose(found[name], other[name], atol=1e-5) for name in other)
    settings = [read_json(at / "adapter_config.json") for at in (folder, wanted)]
    for one in settings:
        one["target_modules"].sort()  # PEFT writes a set
    assert settings[0] == settings[1]
    assert {p.name for p in folder.iterdir()} - set(besides) == {p.name for p in wanted.iterdir()}


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_three_workers_whose_parts_are_not_of_one_size_go_on_from_one_and_one_from_them(
    strategy, tiny_model, initial, tasks, alone, single, tmp_path
):
    """Three divide neither the batch's micro-batches nor the adapter's tensors evenly."""
    with Crew(3) as three:
        first = Training(tiny_model, initial, tasks, of(strategy, 3), keep=tmp_path / "three")
        assert_equal(three.train(first), alone[0], 1e-3)
        kept = sorted(path.name for path in (tmp_path / "three").iterdir())
        assert kept == ["4", "8"]
        back = Training(
            tiny_model, initial, tasks, of("none", 1), resume=tmp_path / "three" / "4", keep=tmp_path / "one"
        )
        assert_equal(single.train(back), alone[0], 1e-3, first=4)
        one = Training(tiny_model, initial, tasks, of("none", 1), keep=tmp_path / "one")
        single.train(one)
        assert_same_checkpoint(tmp_path / "three" / "4", tmp_path / "one" / "4")
        again = Training(tiny_model, initial, tasks, of(strategy, 3), resume=tmp_path / "one" / "4")
        assert_equal(three.train(again), alone[0], 1e-3, first=4)


def assert_same_checkpoint(folder: Path, wanted: Path) -> None:
    found, other = load_file(folder / "state.safetensors"), load_file(wanted / "state.safetensors")
    assert {n: (t.shape, t.dtype) for n, t in found.items()} == {n: (t.shape, t.dtype) for n, t in other.items()}
    for name, value in other.items():
        assert torch.allclose(found[name].double(), value.double(), atol=1e-5), name
    state, counted = read_json(folder / "state.json"), read_json(wanted / "state.json")
    assert state.pop("best_loss") == pytest.approx(counted.pop("best_loss"), rel=1e-4)
    assert state == counted


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.parametrize(
    ("killed", "resumed"), [("none", "zero3"), ("zero3", "fsdp2"), ("fsdp2", "zero2"), ("zero2", "none")]
)
def test_workers_killed_in_the_middle_are_gone_on_from_under_another_strategy(
    killed, resumed, tiny_model, initial, tasks, alone, pair, tmp_path
):
    with Crew(2) as crew:
        config = of(killed, 2)
        said = crew.train(Training(tiny_model, initial, tasks, config, keep=tmp_path / "kept", die_at=4))
        assert said[0].error == "died"
        assert said[1].error
    rest = Training(tiny_model, initial, tasks, of(resumed, 2), resume=tmp_path / "kept" / "4")
    assert_equal(pair.train(rest), alone[0], 1e-3, first=4)


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_early_stop_ends_all_workers_at_one_step_with_the_best_adapter(strategy, tiny_model, initial, tasks, pair):
    config = of(strategy, 2, early_stop={"every": 1, "patience": 1}, learning_rate=0.02)
    model = attach_adapters(load_base(tiny_model, "none", CPU), {"default": initial}, trainable="default")
    rows: list[dict] = []
    state = train_adapter(model, tasks, of("none", 1, **config.model_dump(include={"early_stop", "learning_rate"})),
                          30, 3, 0, on_step=rows.append)  # fmt: skip
    assert state.stopped
    wanted = Trained(rows, {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}, state, [])
    assert_equal(pair.train(Training(tiny_model, initial, tasks, config, steps=30)), wanted, 1e-3)


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_loss_that_is_no_number_fails_all_workers_alike(strategy, tiny_model, initial, tasks):
    config = of(strategy, 2, learning_rate=1e30, max_grad_norm=1e30, early_stop=None)
    with Crew(2) as crew:
        said = crew.train(Training(tiny_model, initial, tasks, config, steps=20))
    assert re.search(r"RunError: .*at step \d+ \(.*learning_rate", said[0].error)
    assert said[0].error == said[1].error
    assert all(np.isfinite(row["loss"]) and np.isfinite(row["gradient_norm"]) for one in said for row in one.rows)


# --- memory -----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_workers_agree_on_a_smaller_budget_when_one_runs_out_of_memory(
    tiny_model, initial, tasks, alone, pair, tmp_path
):
    config = of("none", 2, batch_tokens=500)
    said = pair.train(Training(tiny_model, initial, tasks, config, memory={1: 45}))
    assert {one.state.batch_tokens for one in said} == {said[0].rows[-1]["batch_tokens"]}
    assert said[0].state.batch_tokens <= 45
    wanted = Trained(alone[0].rows, alone[0].adapter, said[0].state, [])
    assert_equal(said, wanted, 1e-4)
    assert said[0].passes != said[1].passes

    said = pair.train(Training(tiny_model, initial, tasks, config, memory={0: 1}))
    assert all(re.match("RunError: out of memory at step 0.*one example.*limits.max_tokens", one.error) for one in said)


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero2", "zero3", "fsdp2"])
def test_where_passes_are_collective_a_lack_of_memory_ends_the_worker_with_what_to_lower(
    strategy, tiny_model, initial, tasks
):
    with Crew(2) as crew:
        said = crew.train(Training(tiny_model, initial, tasks, of(strategy, 2, batch_tokens=500), memory={1: 45}))
    assert re.match(r"StepLost: out of memory at step 0.*starts again.*batch_tokens", said[1].error)
    assert said[0].error  # it waited in vain
