"""A lifted booster against its fit: with gradients that are not projected, the step of the adapter is the fit itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_gradients import adapted, batch_of

from ray_ensemble.config import GradientsConfig
from ray_ensemble.estimator import TaskFeatures, pairwise_margins
from ray_ensemble.gradients import ReplicaSpec
from ray_ensemble.gradients.lifting import LiftingReplica, LiftingUnit, lift_group, save_moved
from ray_ensemble.gradients.lifting_shards import LiftingShard
from ray_ensemble.gradients.linearity import lora_parameters, margins_along, norm
from ray_ensemble.gradients.per_example import GradientCollector
from ray_ensemble.gradients.units import SplitPlan
from ray_ensemble.models import attach_adapters, load_base, save_adapter
from ray_ensemble.training.boosting import fit_residual

CPU = torch.device("cpu")
CONFIG = GradientsConfig(batch_tokens=64)


class Everything:
    """Stands where a projection does and keeps every element of every gradient."""

    def __init__(self, shapes: dict[str, torch.Size]) -> None:
        ends = np.cumsum([shape.numel() for shape in shapes.values()])
        self.places = {name: slice(end - s.numel(), end) for (name, s), end in zip(shapes.items(), ends, strict=True)}
        self.dim = int(ends[-1])

    def apply(self, name: str, gradients: torch.Tensor) -> torch.Tensor:
        found = torch.zeros(len(gradients), self.dim)
        found[:, self.places[name]] = gradients.flatten(1)
        return found


@pytest.fixture(params=[False, True], ids=["fresh", "warm"])
def start(request, tiny_model, tmp_path):
    model = adapted(tiny_model, tmp_path, warm=request.param)
    save_adapter(model, tmp_path / "start", "default")
    return model, tmp_path / "start"


def lifted(tiny_model, folder, task, shares):
    """The sum over the units of a task by one replica, without Ray, and the scores in the task's order."""
    replica = LiftingReplica(ReplicaSpec(str(tiny_model), "none", str(folder), 0), 1)
    scores = np.empty((len(shares), len(task.labels)), np.float32)
    total: dict[str, np.ndarray] = {}
    for unit in SplitPlan(task, "train", CONFIG, {}).units.values():
        found = replica.lift(LiftingUnit(unit, shares[list(unit.indices)]))
        scores[list(unit.indices)] = found["scores"]
        for name, value in found["delta"].items():
            total[name] = total.get(name, 0) + value
    return {name: torch.from_numpy(value) for name, value in total.items()}, scores


@pytest.mark.parametrize("name", ["films", "options"])
def test_a_lifted_booster_is_its_fit(start, tiny_model, encoded, name, tmp_path):
    model, folder = start
    task = encoded[name]
    count, classes = len(task["train"]), len(task.labels)
    parameters = lora_parameters(model)
    map_ = Everything({key: p.shape for key, p in parameters.items()})
    found = GradientCollector(model, map_).collect([batch_of(task, range(count))], "classes")
    labels = np.array([example.label for example in task["train"]])
    rows, margins, starts = pairwise_margins(found.scores.numpy(), found.features.numpy(), labels)
    features = TaskFeatures(
        name, rows, margins, np.zeros((2, classes)), np.zeros((2, classes, map_.dim)), np.zeros(2, int), starts
    )
    residual = np.random.default_rng(0).random((count, classes - 1))
    fit = fit_residual([features], [residual], "examples", lambda _: 0.0, float(np.square(rows).sum(1).mean()) * 0.1)

    delta, scores = lifted(tiny_model, folder, task, fit.shares[0])
    flat = np.concatenate([delta[key].numpy().ravel() for key in parameters])
    assert np.linalg.norm(flat - fit.beta) < 1e-4 * np.linalg.norm(fit.beta)
    np.testing.assert_allclose(scores, found.scores.numpy(), atol=1e-4)

    length = norm(delta) / norm(parameters)
    factor, distance = save_moved(folder, delta, tmp_path / "booster", 1e-4 / length, None)
    assert distance == pytest.approx(1e-4)
    moved = attach_adapters(load_base(tiny_model, "none", CPU), {"default": tmp_path / "booster"})
    batches = [batch_of(task, range(8))]
    f0, _, _ = margins_along(model, batches, delta, [0.0])
    f1, _, _ = margins_along(moved, batches, delta, [0.0])
    _, predicted, _ = margins_along(model, batches, delta, [factor])
    assert np.abs(predicted[0] - f0).max() > 1e-4
    assert np.abs(f1 - predicted[0]).max() < 0.05 * np.abs(predicted[0] - f0).max()


def test_a_step_that_is_too_long_is_shortened(start, tmp_path):
    model, folder = start
    delta = {name: torch.ones_like(p).detach() for name, p in lora_parameters(model).items()}
    factor, distance = save_moved(folder, delta, tmp_path / "booster", 7.0, 0.02)
    assert distance == pytest.approx(0.02)
    before, after = (load_file(f / "adapter_model.safetensors") for f in (folder, tmp_path / "booster"))
    assert 0 < factor < 7
    for name, value in after.items():
        torch.testing.assert_close(value, before[name] + factor)


@pytest.mark.ray
@pytest.mark.slow
def test_any_number_of_replicas_lifts_to_the_same_bytes(start, tiny_model, encoded, ray_cluster):
    _, folder = start
    spec = ReplicaSpec(str(tiny_model), "none", str(folder), 0)
    tasks = [encoded["films"], encoded["options"]]
    generator = np.random.default_rng(0)
    shares = [generator.random((len(task["train"]), len(task.labels) - 1)) for task in tasks]
    one, two = (
        lift_group(tasks, shares, spec, CONFIG.model_copy(update={"replicas": n, "batch_tokens": 32}), {})
        for n in (1, 2)
    )
    for name, value in one.delta.items():
        assert torch.equal(value, two.delta[name])
    alone = [lifted(tiny_model, folder, task, own) for task, own in zip(tasks, shares, strict=True)]
    for name, value in one.delta.items():
        torch.testing.assert_close(value, alone[0][0][name] + alone[1][0][name], rtol=1e-4, atol=1e-5)
    for ours, (_, theirs) in zip(one.scores, alone, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_shards_lift_to_the_bytes_of_the_whole_whatever_comes_back_first(start, tiny_model, encoded):
    """What the pipeline of actors does, in one process, with batches that return in a wild order."""
    _, folder = start
    spec = ReplicaSpec(str(tiny_model), "none", str(folder), 0)
    config = CONFIG.model_copy(update={"shards": 2})
    first, last = (LiftingShard(spec, config, shard) for shard in range(2))
    whole = LiftingReplica(spec, 1)
    for name in ("films", "options"):
        task = encoded[name]
        shares = np.random.default_rng(1).random((len(task["train"]), len(task.labels) - 1))
        for key, plain in SplitPlan(task, "train", CONFIG, {}).units.items():
            unit = LiftingUnit(plain, shares[list(plain.indices)])
            places = range(len(plain.batches))
            assert len(places) > 2
            hidden = [first.forward(key, unit, place, None) for place in places]
            turned = {place: last.turn(key, unit, place, hidden[place]) for place in [*places[1:], 0]}
            for place in reversed(places):
                assert first.backward(key, place, turned[place][0]) is None
            want = whole.lift(unit)
            assert np.concatenate([turned[place][1] for place in places]).tobytes() == want["scores"].tobytes()
            delta = first.lifted(key) | last.lifted(key)
            assert delta.keys() == want["delta"].keys()
            for parameter, value in want["delta"].items():
                assert delta[parameter].tobytes() == value.tobytes(), parameter


@pytest.mark.ray
@pytest.mark.slow
def test_sharded_replicas_lift_to_the_bytes_of_whole_ones(start, tiny_model, encoded, wide_cluster):
    _, folder = start
    spec = ReplicaSpec(str(tiny_model), "none", str(folder), 0)
    tasks = [encoded["films"], encoded["options"]]
    generator = np.random.default_rng(0)
    shares = [generator.random((len(task["train"]), len(task.labels) - 1)) for task in tasks]
    one, two = (
        lift_group(tasks, shares, spec, CONFIG.model_copy(update={"replicas": 1, "shards": shards}), {})
        for shards in (1, 2)
    )
    assert one.tokens == two.tokens
    assert one.delta.keys() == two.delta.keys()
    for name, value in one.delta.items():
        assert torch.equal(value, two.delta[name])
    for ours, theirs in zip(two.scores, one.scores, strict=True):
        assert np.array_equal(ours, theirs)
