"""Scores by shards are those of the whole base, to the byte; each shard holds its own layers of whatever adapter is asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import write_model

from ray_ensemble.config import AdapterConfig, GradientsConfig, LimitsConfig, TaskConfig
from ray_ensemble.ensemble import ScoreRequest, score_all
from ray_ensemble.ensemble.adapter_switch import AdapterSwitch, adapter_name
from ray_ensemble.ensemble.scoring import ScoringReplica, batches_of
from ray_ensemble.ensemble.scoring_shards import ScoringBatch, ScoringShard
from ray_ensemble.errors import InputError
from ray_ensemble.gradients import ReplicaSpec
from ray_ensemble.models import attach_adapters, draw_initial_adapter, load_base, load_tokenizer
from ray_ensemble.tasks import EncodedTask, encode_task, load_tasks

CPU = torch.device("cpu")
LAYERS = 5
CONFIG = GradientsConfig(batch_tokens=100, replicas=1)


@pytest.fixture(scope="module")
def spec(tmp_path_factory) -> ReplicaSpec:
    folder = tmp_path_factory.mktemp("deep")
    write_model(folder / "model", layers=LAYERS)
    draw_initial_adapter(load_base(folder / "model", "none", CPU), AdapterConfig(), folder / "init")
    return ReplicaSpec(str(folder / "model"), "none", str(folder / "init"), 0)


@pytest.fixture(scope="module")
def tasks(spec, task_folder) -> list[EncodedTask]:
    loaded = load_tasks([TaskConfig(source=str(task_folder))], LimitsConfig(), task_folder)
    tokenizer = load_tokenizer(Path(spec.source))
    return [encode_task(task, tokenizer, 64, False) for task in loaded if task.name in ("films", "options")]


def adapter(spec: ReplicaSpec, folder: Path, seed: int) -> Path:
    """An adapter that changes every score."""
    folder.mkdir()
    torch.manual_seed(seed)
    saved = load_file(Path(spec.initial_adapter) / "adapter_model.safetensors")
    save_file({k: v + 0.2 * torch.randn_like(v) for k, v in saved.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_bytes((Path(spec.initial_adapter) / "adapter_config.json").read_bytes())
    return folder


@pytest.fixture(scope="module")
def adapters(spec, tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return [adapter(spec, folder / str(seed), seed) for seed in range(3)]


def through(shards: list[ScoringShard], request: ScoreRequest) -> np.ndarray:
    """What the pipeline of actors does, in one process."""
    name = None if request.adapter is None else adapter_name(request.adapter)
    scores = np.empty((len(request.examples), len(request.task.labels)), np.float32)
    for indices in batches_of(request, CONFIG.batch_tokens):
        examples = tuple(request.examples[i] for i in indices)
        hidden = None
        for shard in shards:
            hidden = shard.forward(ScoringBatch(request.task.label_ids, examples, request.adapter, name), hidden)
        scores[indices] = hidden
    return scores


@pytest.mark.parametrize(("quantization", "count"), [("none", 2), ("nf4", 3)])
def test_shards_score_as_the_whole_to_the_byte(spec, tasks, adapters, quantization, count):
    spec = ReplicaSpec(spec.source, quantization, spec.initial_adapter, 0)
    whole = ScoringReplica(spec, 1, CONFIG.batch_tokens)
    config = CONFIG.model_copy(update={"shards": count})
    shards = [ScoringShard(spec, config, shard) for shard in range(count)]
    seen = []
    for folder in (adapters[0], None, adapters[1], adapters[0]):
        for task in tasks:
            request = ScoreRequest(folder, task, task["train"])
            seen.append(whole.score(request)["scores"])
            assert through(shards, request).tobytes() == seen[-1].tobytes()
    assert np.abs(seen[0] - seen[2]).max() > 0.1, "the adapter changes scores"
    assert np.array_equal(seen[0], seen[6]), "and so it does when it comes back"


def test_a_shard_holds_its_own_layers_of_the_base_and_of_its_adapters_alone(spec, tasks, adapters):
    config = CONFIG.model_copy(update={"shards": 2})
    layers = (range(3), range(3, 5))
    whole = {name: p.nbytes for name, p in load_base(Path(spec.source), "none", CPU).named_parameters()}
    example = tasks[0]["train"][0]
    for shard, own in enumerate(layers):
        actor = ScoringShard(spec, config, shard)
        hidden = np.zeros((1, len(example.prompt_ids), 32), np.float32) if shard else None
        for folder in adapters:
            actor.forward(ScoringBatch(tasks[0].label_ids, (example,), folder, adapter_name(folder)), hidden)
        lora = {name: p.nbytes for name, p in actor.model.named_parameters() if "lora_" in name}
        assert len(lora) == len(own) * 6 * (1 + len(adapters))
        assert all(int(name.split(".layers.")[1].split(".")[0]) in own for name in lora)
        parts = [*(f".layers.{place}." for place in own), "lm_head" if shard else "embed_tokens", "model.norm"]
        held = actor.facts()["weights"] - sum(size for name, size in lora.items() if ".default." in name)
        assert held == sum(size for name, size in whole.items() if any(part in name for part in parts))
        assert held < 0.7 * sum(whole.values())


def test_more_adapters_than_are_kept_come_and_go(spec, tasks, adapters, monkeypatch):
    monkeypatch.setattr("ray_ensemble.ensemble.adapter_switch._KEPT", 2)
    model = attach_adapters(load_base(Path(spec.source), "none", CPU), {"default": Path(spec.initial_adapter)})
    switch = AdapterSwitch(model)
    ids = torch.arange(5, 17)[None]

    def logits(folder: Path | None) -> torch.Tensor:
        with torch.inference_mode(), switch.using(folder, None if folder is None else adapter_name(folder)):
            return model(input_ids=ids).logits

    first = [logits(folder) for folder in [*adapters, None]]
    assert len(model.peft_config) == 3, "two and θ₀"
    for folder, want in zip([None, *reversed(adapters)], reversed(first), strict=True):
        assert torch.equal(logits(folder), want)


@pytest.mark.ray
@pytest.mark.slow
def test_the_pool_scores_on_shards_what_it_scores_on_whole_bases(spec, tasks, adapters, tmp_path, wide_cluster):
    requests = [ScoreRequest(folder, task, task["train"]) for task in tasks for folder in (None, *adapters[:2])]
    base = {"model": "tiny"}
    config = CONFIG.model_copy(update={"shards": 2, "replicas": 2})
    sharded = score_all(requests, spec, config, base, tmp_path / "sharded", "scores")
    whole = ScoringReplica(spec, 1, CONFIG.batch_tokens)
    for found, request in zip(sharded.scores, requests, strict=True):
        assert found.tobytes() == whole.score(request)["scores"].tobytes()
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "sharded" / "scores").iterdir()}
    assert len(stamps) == len(requests)
    again = score_all(requests, spec, CONFIG, base, tmp_path / "sharded", "scores")  # unsharded: the same keys
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert again.tokens == sharded.tokens
    assert again.peak_memory_bytes == 0, "nothing was computed"
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "adapter_model.safetensors").write_bytes(b"nothing")
    (broken / "adapter_config.json").write_bytes((adapters[0] / "adapter_config.json").read_bytes())
    with pytest.raises(InputError, match="cannot load this adapter"):
        score_all(
            [ScoreRequest(broken, tasks[0], tasks[0]["test"])], spec, config, base, tmp_path / "sharded", "scores"
        )
