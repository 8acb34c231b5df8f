"""Units of the gradient pass without Ray: the same features for any size of batch, and batches halved for lack of memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import write_task

from ray_ensemble.config import AdapterConfig, GradientsConfig, LimitsConfig, TaskConfig
from ray_ensemble.gradients.replicas import GradientReplica, within_memory
from ray_ensemble.gradients.store import damage
from ray_ensemble.gradients.units import GradientUnit, ReplicaSpec, SplitPlan, part_is_whole
from ray_ensemble.models import draw_initial_adapter, load_base, load_tokenizer
from ray_ensemble.tasks import EncodedTask, encode_task, load_tasks


@pytest.fixture(scope="module")
def tasks(tiny_model: Path, tmp_path_factory) -> dict[str, EncodedTask]:
    folder = tmp_path_factory.mktemp("tasks")
    write_task(folder / "films", seed=1, train=40)
    write_task(folder / "options", ("(A)", "(B)", "(C)", "(D)"), seed=4, train=40)
    found = load_tasks([TaskConfig(source=str(folder))], LimitsConfig(), folder)
    return {task.name: encode_task(task, load_tokenizer(tiny_model), 64, False) for task in found}


@pytest.fixture(scope="module")
def spec(tiny_model: Path, tmp_path_factory) -> ReplicaSpec:
    init = tmp_path_factory.mktemp("start") / "init"
    draw_initial_adapter(load_base(tiny_model, "none", torch.device("cpu")), AdapterConfig(), init)
    return ReplicaSpec(str(tiny_model), "none", str(init), 0)


def features(task: EncodedTask, spec: ReplicaSpec, batch_tokens: int) -> tuple[int, dict[str, np.ndarray]]:
    """Number of batches, and the arrays of the whole training split in its own order."""
    config = GradientsConfig(dim=96, batch_tokens=batch_tokens)
    plan, replica = SplitPlan(task, "train", config, {}), GradientReplica(spec, config)
    arrays: dict[str, np.ndarray] = {}
    for unit in plan.units.values():
        for name, values in replica.collect(unit).arrays.items():
            arrays.setdefault(name, np.empty((plan.examples, *values.shape[1:]), np.float32))[list(unit.indices)] = (
                values
            )
    return sum(len(unit.batches) for unit in plan.units.values()), arrays


@pytest.mark.parametrize("name", ["films", "options"])
def test_features_do_not_depend_on_the_size_of_batches(tasks, spec, name):
    key = "features" if name == "films" else "class_features"
    single, reference = features(tasks[name], spec, 1)
    assert single == 40, "with one token a batch, every batch holds one example"
    for batch_tokens in (100, 300, 100_000):
        batches, found = features(tasks[name], spec, batch_tokens)
        assert batches < single
        error = np.linalg.norm(found[key] - reference[key], axis=-1)
        norm = np.linalg.norm(reference[key], axis=-1)
        assert norm.max() > 1e-3
        assert (error <= 1e-5 * norm).all()


def unit_of(task: EncodedTask) -> GradientUnit:
    (unit, *_) = SplitPlan(task, "train", GradientsConfig(dim=96, batch_tokens=300), {}).units.values()
    return unit


def test_batches_are_halved_until_they_fit_and_the_features_stay(tasks, spec, monkeypatch):
    """The allocator's own error, on batches of more than two examples."""
    unit = unit_of(tasks["films"])
    assert max(map(len, unit.batches)) > 4
    replica = GradientReplica(spec, GradientsConfig(dim=96))
    whole = replica.collect(unit)
    assert whole.counts["halved_batches"] == 0
    made = GradientUnit.made

    def in_little_memory(self, *arguments):
        if max(map(len, self.batches)) > 2:
            torch.empty(1 << 60, dtype=torch.uint8)
        return made(self, *arguments)

    monkeypatch.setattr(GradientUnit, "made", in_little_memory)
    halved = replica.collect(unit)
    assert halved.counts["halved_batches"] > 0
    for name, values in whole.arrays.items():
        assert np.abs(halved.arrays[name] - values).max() < 1e-5 * np.abs(values).max() + 1e-6


def test_other_errors_and_single_examples_that_do_not_fit_are_not_tried_again(tasks):
    calls = []

    def fails(unit: GradientUnit) -> None:
        calls.append(max(map(len, unit.batches)))
        raise torch.OutOfMemoryError("no room")

    with pytest.raises(torch.OutOfMemoryError):
        within_memory(unit_of(tasks["films"]), fails)
    assert calls[-1] == 1
    assert calls == sorted(calls, reverse=True)
    calls.clear()

    def wrong(unit: GradientUnit) -> None:
        calls.append(1)
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes"):
        within_memory(unit_of(tasks["films"]), wrong)
    assert calls == [1]


@pytest.mark.parametrize("harm", ["cut", "flipped", "empty", "text"])
def test_a_damaged_part_is_told_and_made_again(tmp_path, harm, capsys):
    part = tmp_path / "films-train-abc-0.npz"
    np.savez(part, features=np.arange(4000, dtype=np.float32))
    assert part_is_whole(part)
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes({"cut": data[: len(data) // 2], "flipped": data, "empty": b"", "text": b"no archive"}[harm])
    assert not part_is_whole(part)
    assert "recomputing films-train-abc-0.npz: damaged" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["{}", "[]", '{"files": {}}', '{"files": 3}'])
def test_a_split_that_lists_no_files_is_damaged(tmp_path, text):
    (tmp_path / "info.json").write_text(text)
    assert "lists no files" in (damage(tmp_path, {}) or "")
