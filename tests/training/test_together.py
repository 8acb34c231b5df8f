"""Adapters that share a base and its batches end as those that are trained alone."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from test_loop import CPU, Memory, without_seconds

from ray_ensemble.config import AdapterConfig, EarlyStopConfig, LimitsConfig, TaskConfig, TrainingConfig
from ray_ensemble.models import attach_adapters, draw_initial_adapter, load_base, load_tokenizer, save_adapter
from ray_ensemble.tasks import EncodedTask, encode_task, load_tasks
from ray_ensemble.training import AdapterRun, train_adapter, train_together
from ray_ensemble.training.together import adapter_parameters

CONFIG = TrainingConfig(batch_size=4, learning_rate=5e-3, checkpoint_every=3)
GROUPS = (("films", "phones"), ("contrary",), ("options", "films", "contrary"), ("options",))
STEPS = (9, 4, 7, 9)


@pytest.fixture(scope="module")
def tasks(tiny_model: Path, task_folder: Path) -> dict[str, EncodedTask]:
    loaded = load_tasks([TaskConfig(source=str(task_folder))], LimitsConfig(), task_folder)
    tokenizer = load_tokenizer(tiny_model)
    return {task.name: encode_task(task, tokenizer, 64) for task in loaded}


@pytest.fixture(scope="module", params=[0.0, 0.2], ids=["plain", "dropout"])
def initial(request, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("together") / "init"
    draw_initial_adapter(load_base(tiny_model, "none", CPU), AdapterConfig(dropout=request.param), folder)
    return folder


def make_runs(tasks, m) -> list[AdapterRun]:
    return [AdapterRun(f"g{i}", tuple(tasks[name] for name in GROUPS[i]), STEPS[i], seed=i // 2) for i in range(m)]


def attach(tiny_model, initial, runs):
    return attach_adapters(load_base(tiny_model, "none", CPU), {run.adapter: initial for run in runs})


def together(tiny_model, initial, runs, config=CONFIG, **options):
    model = attach(tiny_model, initial, runs)
    rows: dict[str, list[dict]] = {run.adapter: [] for run in runs}
    states = train_together(model, runs, config, 0, on_step=lambda name, row: rows[name].append(row), **options)
    found = {
        run.adapter: {n: p.detach().clone() for n, p in adapter_parameters(model, run.adapter).items()} for run in runs
    }
    return found, rows, states


def alone(tiny_model, initial, run, config=CONFIG):
    model = attach_adapters(load_base(tiny_model, "none", CPU), {"default": initial}, trainable="default")
    rows: list[dict] = []
    state = train_adapter(model, run.tasks, config, run.steps, run.seed, 0, on_step=rows.append)
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}, rows, state


def assert_equal_to_alone(tiny_model, initial, runs, config, found, rows, states):
    for run in runs:
        wanted, lines, state = alone(tiny_model, initial, run, config)
        assert states[run.adapter] == state if not config.early_stop else states[run.adapter].step == state.step
        assert found[run.adapter].keys() == wanted.keys()
        assert max(float((found[run.adapter][n] - wanted[n]).abs().max()) for n in wanted) < 1e-4
        assert len(rows[run.adapter]) == len(lines)
        for a, b in zip(rows[run.adapter], lines, strict=True):
            assert math.isclose(a["loss"], b["loss"], rel_tol=1e-4)
            assert math.isclose(a["gradient_norm"], b["gradient_norm"], rel_tol=1e-3)
            assert (a["step"], a["tokens"], a["learning_rate"]) == (b["step"], b["tokens"], b["learning_rate"])


@pytest.mark.parametrize("m", [1, 2, 4])
def test_each_adapter_equals_its_separate_job(tiny_model, initial, tasks, m):
    """Groups of other sizes and tasks, with other seeds and steps; those that end earlier drop out."""
    runs = make_runs(tasks, m)
    assert_equal_to_alone(tiny_model, initial, runs, CONFIG, *together(tiny_model, initial, runs))


@pytest.mark.parametrize(
    "change",
    [
        {"sampling": "tasks", "max_grad_norm": 0.2, "weight_decay": 0.1},
        {"batch_tokens": 50, "activation_checkpointing": True},
        {"early_stop": EarlyStopConfig(every=2, patience=1), "learning_rate": 3e-2},
    ],
    ids=["sampling", "cut", "early stop"],
)
def test_under_every_setting(tiny_model, initial, tasks, change):
    config = CONFIG.model_copy(update=change)
    runs = make_runs(tasks, 3)
    assert_equal_to_alone(tiny_model, initial, runs, config, *together(tiny_model, initial, runs, config))


def test_stopped_together_they_go_on_together_to_the_last_bit(tiny_model, initial, tasks, tmp_path):
    runs = make_runs(tasks, 4)
    whole, rows, states = together(tiny_model, initial, runs)

    class Killed(Exception):
        pass

    def save_and_die(step, save):
        (tmp_path / str(step)).mkdir()
        save(tmp_path / str(step))
        if step == 6:
            raise Killed

    with pytest.raises(Killed):
        together(tiny_model, initial, runs, on_checkpoint=save_and_die)
    torch.manual_seed(99)
    found, rest, end = together(tiny_model, initial, runs, resume=tmp_path / "6")
    assert end == states
    for run in runs:
        name = run.adapter
        assert without_seconds(rest[name]) == without_seconds(rows[name][6:])
        assert all(torch.equal(whole[name][n], found[name][n]) for n in whole[name])

    # The form is that of a job alone, which can take one of them over.
    model = attach_adapters(load_base(tiny_model, "none", CPU), {"default": initial}, trainable="default")
    train_adapter(model, runs[0].tasks, CONFIG, runs[0].steps, runs[0].seed, 0, resume=tmp_path / "6" / "g0")
    taken = {n: p for n, p in model.named_parameters() if "lora_" in n}
    assert max(float((whole["g0"][n] - taken[n]).abs().max()) for n in taken) < 1e-4


def test_one_whose_loss_is_no_number_fails_alone(tiny_model, initial, tasks):
    runs = make_runs(tasks, 3)
    model = attach(tiny_model, initial, runs)
    with torch.no_grad():
        next(iter(adapter_parameters(model, "g1").values()))[0, 0] = math.nan
    rows: dict[str, list[dict]] = {run.adapter: [] for run in runs}
    states = train_together(model, runs, CONFIG, 0, on_step=lambda name, row: rows[name].append(row))
    assert "the loss is nan at step 0" in states["g1"].failed
    assert "contrary" in states["g1"].failed
    assert rows["g1"] == []
    sound = [run for run in runs if run.adapter != "g1"]
    found = {run.adapter: adapter_parameters(model, run.adapter) for run in sound}
    assert_equal_to_alone(tiny_model, initial, sound, CONFIG, found, rows, states)


def test_a_batch_that_does_not_fit_is_halved_for_all(tiny_model, initial, tasks, capsys):
    runs = make_runs(tasks, 2)
    model = attach(tiny_model, initial, runs)
    model.register_forward_pre_hook(Memory(60), with_kwargs=True)
    rows: dict[str, list[dict]] = {run.adapter: [] for run in runs}
    train_together(model, runs, CONFIG, 0, on_step=lambda name, row: rows[name].append(row))
    assert "out of memory at step 0" in capsys.readouterr().out
    for run in runs:
        wanted, _, _ = alone(tiny_model, initial, run)
        assert rows[run.adapter][-1]["batch_tokens"] <= 60
        found = adapter_parameters(model, run.adapter)
        assert max(float((found[n] - wanted[n]).abs().max()) for n in wanted) < 1e-4


def test_afterwards_the_model_is_an_ordinary_one(tiny_model, initial, tasks, tmp_path):
    """PEFT applies and saves the adapters as if it had trained them, and no hook is left."""
    runs = make_runs(tasks, 2)
    model = attach(tiny_model, initial, runs)
    train_together(model, runs, CONFIG, 0)
    ids = torch.arange(5, 17)[None]
    for run in runs:
        save_adapter(model, tmp_path / run.adapter, run.adapter)
        single = attach_adapters(load_base(tiny_model, "none", CPU), {"default": tmp_path / run.adapter})
        model.set_adapter(run.adapter)
        with torch.no_grad():
            assert torch.equal(model(input_ids=ids).logits, single(input_ids=ids).logits)
            with model.disable_adapter():
                bare = model(input_ids=ids).logits
            assert (bare - single(input_ids=ids).logits).abs().max() > 1e-3


def test_adapters_of_other_ranks_are_refused(tiny_model, initial, tasks, tmp_path):
    draw_initial_adapter(load_base(tiny_model, "none", CPU), AdapterConfig(rank=2), tmp_path / "init")
    runs = make_runs(tasks, 2)
    model = attach_adapters(load_base(tiny_model, "none", CPU), {"g0": initial, "g1": tmp_path / "init"})
    with pytest.raises(ValueError, match="g0, g1 are not different ones of one rank"):
        train_together(model, runs, CONFIG, 0)
