"""The training loop: the same bytes again, after a stop too; a sampler without favourites; trouble that is named."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ray_ensemble.config import AdapterConfig, TrainingConfig
from ray_ensemble.errors import InputError, RunError
from ray_ensemble.models import (
    LabelTree,
    attach_adapters,
    draw_initial_adapter,
    label_scores,
    load_base,
    make_batch,
    score_loss,
)
from ray_ensemble.tasks import split_hash
from ray_ensemble.training import learning_rate, sample_batch, train_adapter
from ray_ensemble.training.optimiser import make_optimiser, moments, paged_adamw, set_moments

CPU = torch.device("cpu")
CONFIG = TrainingConfig(batch_size=4, learning_rate=5e-3, checkpoint_every=4)


@pytest.fixture(scope="module")
def initial(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("init") / "init"
    draw_initial_adapter(load_base(tiny_model, "none", CPU), AdapterConfig(dropout=0.1), folder)
    return folder


def fresh(tiny_model: Path, folder: Path) -> Path:
    """A starting point without dropout."""
    draw_initial_adapter(load_base(tiny_model, "none", CPU), AdapterConfig(), folder / "init")
    return folder / "init"


def without_seconds(rows: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


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
    assert without_seconds(rest) == without_seconds(rows[8:])
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


@pytest.mark.parametrize("change", [{"batch_tokens": 1}, {"batch_tokens": 60}, {"activation_checkpointing": True}])
def test_neither_the_cut_nor_recomputed_activations_change_the_result(tiny_model, initial, tasks, change):
    """With dropout: its masks belong to a step's rows, not to the micro-batches that they come in."""
    whole, rows, _ = train(tiny_model, initial, tasks, steps=6)
    other, others, _ = train(tiny_model, initial, tasks, CONFIG.model_copy(update=change), steps=6)
    for a, b in zip(rows, others, strict=True):
        assert math.isclose(a["loss"], b["loss"], rel_tol=1e-4)
        assert math.isclose(a["gradient_norm"], b["gradient_norm"], rel_tol=1e-3)
        assert a["tokens"] == b["tokens"]
    assert max(float((whole[name] - other[name]).abs().max()) for name in whole) < 1e-4
    if "activation_checkpointing" in change:
        assert all(torch.equal(whole[name], other[name]) for name in whole)


def test_a_step_is_adamw_on_the_mean_loss_of_its_examples(tiny_model, tasks, tmp_path):
    """Two steps against plain autograd, one example at a time, and torch's own AdamW."""
    initial = fresh(tiny_model, tmp_path)
    config = CONFIG.model_copy(update={"max_grad_norm": 0.3, "weight_decay": 0.1})
    found, rows, _ = train(tiny_model, initial, tasks, config, steps=2)

    model = attach_adapters(load_base(tiny_model, "none", CPU), {"default": initial}, trainable="default")
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimiser = torch.optim.AdamW(parameters.values(), weight_decay=0.1)
    pool = [(task, example) for task in tasks for example in task["train"]]
    for step in range(2):
        optimiser.param_groups[0]["lr"] = learning_rate(step, 2, config)
        optimiser.zero_grad()
        total = 0.0
        for i in sample_batch(step, len(pool), 4, 3):
            task, example = pool[i]
            batch = make_batch([example], [LabelTree.of(task.label_ids)], len(task.labels), 0, CPU)
            loss = score_loss(label_scores(model, batch), batch.labels).mean() / 4
            loss.backward()
            total += float(loss.detach())
        norm = torch.sqrt(sum(p.grad.square().sum() for p in parameters.values()))
        assert rows[step]["loss"] == pytest.approx(total, rel=1e-5)
        assert rows[step]["gradient_norm"] == pytest.approx(float(norm), rel=1e-4)
        for p in parameters.values():
            p.grad *= min(1.0, 0.3 / float(norm))
        optimiser.step()
    assert max(float((found[n] - p.detach()).abs().max()) for n, p in parameters.items()) < 1e-5


class Memory:
    """A device that holds `tokens` tokens: a bigger batch that enters the model raises what a full GPU raises."""

    def __init__(self, tokens: int, error: Exception | None = None) -> None:
        self.tokens = tokens
        self.error = error or torch.OutOfMemoryError("CUDA out of memory")
        self.seen: list[int] = []

    def __call__(self, module, args, kwargs):
        size = kwargs["input_ids"].numel()
        self.seen.append(size)
        if size > self.tokens:
            raise self.error


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("full"), MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_a_micro_batch_that_does_not_fit_is_halved_and_told(tiny_model, initial, tasks, capsys, error):
    whole, rows, _ = train(tiny_model, initial, tasks, steps=6)
    assert all("batch_tokens" not in row for row in rows)
    model = attach_adapters(load_base(tiny_model, "none", CPU), {"default": initial}, trainable="default")
    memory = Memory(40, error)
    model.register_forward_pre_hook(memory, with_kwargs=True)
    told: list[dict] = []
    saved: list[Path] = []

    def keep(step, save):
        saved.append(initial.parent / f"oom-{type(error).__name__}-{step}")
        saved[-1].mkdir(exist_ok=True)
        save(saved[-1])

    state = train_adapter(model, tasks, CONFIG, 6, 3, 0, on_step=told.append, on_checkpoint=keep)
    text = capsys.readouterr().out
    assert "out of memory at step 0" in text
    assert "training.batch_tokens" in text
    assert max(size for size in memory.seen[-8:]) <= 40
    assert told[-1]["batch_tokens"] <= 40
    assert state.batch_tokens == told[-1]["batch_tokens"]
    for a, b in zip(rows, told, strict=True):
        assert math.isclose(a["loss"], b["loss"], rel_tol=1e-4)
        assert a["tokens"] == b["tokens"]  # a repeated step counts once
    found = {n: p for n, p in model.named_parameters() if "lora_" in n}
    assert max(float((whole[name] - found[name]).abs().max()) for name in whole) < 1e-4

    # Who goes on from the checkpoint knows what fits.
    train(tiny_model, initial, tasks, steps=6, resume=saved[0])
    assert "out of memory" not in capsys.readouterr().out


def test_memory_that_holds_no_example_ends_the_run_with_what_to_lower(tiny_model, initial, tasks):
    model = attach_adapters(load_base(tiny_model, "none", CPU), {"default": initial}, trainable="default")
    memory = Memory(0)
    model.register_forward_pre_hook(memory, with_kwargs=True)
    with pytest.raises(RunError, match=r"out of memory at step 0.*limits.max_tokens.*activation_checkpointing"):
        train_adapter(model, tasks, CONFIG, 6, 3, 0)
    assert len(memory.seen) < 20


def test_another_error_is_not_taken_for_memory(tiny_model, initial, tasks):
    model = attach_adapters(load_base(tiny_model, "none", CPU), {"default": initial}, trainable="default")
    model.register_forward_pre_hook(Memory(0, RuntimeError("shapes differ")), with_kwargs=True)
    with pytest.raises(RuntimeError, match="shapes differ"):
        train_adapter(model, tasks, CONFIG, 6, 3, 0)


def test_bf16_is_near_fp32_and_says_nothing_of_the_device_that_lacks_it(tiny_model, initial, tasks):
    _, exact, _ = train(tiny_model, initial, tasks, steps=6)
    _, auto, _ = train(tiny_model, initial, tasks, CONFIG.model_copy(update={"precision": "fp32"}), steps=6)
    assert without_seconds(auto) == without_seconds(exact)  # auto is fp32 on a CPU
    trained, rough, _ = train(tiny_model, initial, tasks, CONFIG.model_copy(update={"precision": "bf16"}), steps=6)
    for a, b in zip(exact, rough, strict=True):
        assert math.isclose(a["loss"], b["loss"], rel_tol=0.05)
    assert any(a["loss"] != b["loss"] for a, b in zip(exact, rough, strict=True))
    assert all(p.dtype == torch.float32 for p in trained.values())


def test_paged_adamw_without_a_gpu_is_refused_with_what_to_use(tiny_model, initial, tasks):
    with pytest.raises(InputError, match=r"training\.optimizer: paged_adamw .*cpu; use adamw"):
        train(tiny_model, initial, tasks, CONFIG.model_copy(update={"optimizer": "paged_adamw"}))


def test_moments_move_between_the_two_optimisers():
    """bitsandbytes keeps them under other names; on a CPU its paged AdamW computes the same without paging."""
    start = {"a": torch.randn(4, 3), "b": torch.randn(5)}
    gradients = [{name: torch.randn_like(value) for name, value in start.items()} for _ in range(6)]
    config = CONFIG.model_copy(update={"weight_decay": 0.1})

    def run(makers):
        values = start
        kept = {name: {} for name in start}
        for part, make in enumerate(makers):
            parameters = {name: torch.nn.Parameter(value.clone()) for name, value in values.items()}
            optimiser = make(parameters, config)
            for name, parameter in parameters.items():
                set_moments(optimiser, parameter, kept[name])
            for step in range(3 * part, 3 * part + 3):
                for name, parameter in parameters.items():
                    parameter.grad = gradients[step][name].clone()
                optimiser.step()
            values = {name: parameter.detach() for name, parameter in parameters.items()}
            kept = {name: moments(optimiser, parameter) for name, parameter in parameters.items()}
        return values, kept

    def plain(parameters, config):
        return make_optimiser(parameters, config, CPU)

    want, state = run([plain, plain])
    for makers in ([paged_adamw, plain], [plain, paged_adamw], [paged_adamw, paged_adamw]):
        found, held = run(makers)
        for name in want:
            assert torch.allclose(found[name], want[name], atol=1e-6)
            for key in ("step", "exp_avg", "exp_avg_sq"):
                assert torch.allclose(held[name][key], state[name][key], atol=1e-6)


def test_a_damaged_checkpoint_is_named(tiny_model, initial, tasks, tmp_path):
    (tmp_path / "state.json").write_text('{"step": 4, "tokens": 1}')
    (tmp_path / "state.safetensors").write_bytes(b"broken")
    with pytest.raises(InputError, match=str(tmp_path)):
        train(tiny_model, initial, tasks, resume=tmp_path)


def test_a_loss_that_is_no_number_stops_with_step_and_examples(tiny_model, initial, tasks):
    config = CONFIG.model_copy(update={"learning_rate": 1e30, "max_grad_norm": 1e30})
    with pytest.raises(RunError, match=r"at step \d+ \(.*examples.*learning_rate") as caught:
        train(tiny_model, initial, tasks, config, steps=20)
    step = int(re.search(r"at step (\d+)", str(caught.value)).group(1))
    pool = [(task.name, i) for task in tasks for i in range(len(task["train"]))]
    for at in sample_batch(step, len(pool), 4, 3):
        name, index = pool[at]
        assert f"{name} {index}" in str(caught.value)


def test_a_poisoned_adapter_stops_at_once(tiny_model, tasks, tmp_path):
    model = attach_adapters(load_base(tiny_model, "none", CPU), {"default": fresh(tiny_model, tmp_path)}, "default")
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n)[0, 0] = math.nan
    rows: list[dict] = []
    with pytest.raises(RunError, match=r"the loss is nan at step 0"):
        train_adapter(model, tasks, CONFIG, 5, 3, 0, on_step=rows.append)
    assert rows == []


def test_learning_rate_warms_up_and_decays():
    config = TrainingConfig(learning_rate=1.0, warmup=0.25)
    rates = [learning_rate(step, 100, config) for step in range(100)]
    assert rates[0] == pytest.approx(0.04)
    assert max(rates) == rates[24] == rates[25] == 1.0
    assert rates[-1] == pytest.approx(1 / 75)
    cosine = config.model_copy(update={"schedule": "cosine"})
    assert learning_rate(25 + 75 // 2, 100, cosine) == pytest.approx(0.5, abs=0.02)


def test_offsets_are_added_to_the_scores_and_part_of_the_data(tiny_model, tasks, tmp_path):
    """Of several tasks with different numbers of labels, only the examples that have offsets lose by them."""
    start = fresh(tiny_model, tmp_path)
    offsets = {
        task.name: np.random.default_rng(1).normal(size=(len(task["train"]), len(task.labels))) for task in tasks
    }
    changed = [
        replace(task, splits={**task.splits, "train": tuple(
            replace(e, offsets=tuple(row)) for e, row in zip(task["train"], offsets[task.name].tolist(), strict=True)
        )}) if task is not tasks[0] else task
        for task in tasks
    ]  # fmt: skip
    _, rows, _ = train(tiny_model, start, changed, steps=1)
    pool = [(task, i) for task in tasks for i in range(len(task["train"]))]
    base = attach_adapters(load_base(tiny_model, "none", CPU), {"default": start})
    losses = []
    for at in sample_batch(0, len(pool), CONFIG.batch_size, 3):
        task, i = pool[at]
        one = make_batch([task["train"][i]], [LabelTree.of(task.label_ids)], len(task.labels), 0, CPU)
        added = torch.tensor(offsets[task.name][i]) * (task is not tasks[0])
        with torch.no_grad():
            losses.append(float(score_loss(label_scores(base, one) + added, one.labels)))
    assert rows[0]["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    hashes = [split_hash(task, task["train"]) for task in (*tasks, *changed)]
    assert len(set(hashes)) == 2 * len(tasks) - 1
