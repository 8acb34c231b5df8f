"""Scores are found under a hash of all that they depend on, however many requests share an adapter or examples."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ray_ensemble.config import GradientsConfig
from ray_ensemble.ensemble import ScoreRequest
from ray_ensemble.ensemble.scoring import score_paths
from ray_ensemble.files import sha256_file, sha256_json
from ray_ensemble.tasks import EncodedExample, EncodedTask, split_hash

BASE = {"model": "m", "quantization": "none", "adapter": "a"}
CONFIG = GradientsConfig()


def task(name: str, first: int) -> EncodedTask:
    examples = tuple(EncodedExample((first, i), i % 2, False) for i in range(6))
    return EncodedTask(name, ("no", "yes"), ((1,), (2,)), dict.fromkeys(("train", "validation", "test"), examples), "h")


def one_by_one(request: ScoreRequest, folder: Path) -> Path:
    adapter = request.adapter and sha256_file(request.adapter / "adapter_model.safetensors")
    data = split_hash(request.task, request.examples)
    content = {"adapter": adapter, "data": data, "base": BASE, "batch": CONFIG.batch_tokens, "threads": CONFIG.threads}
    return folder / "scores" / f"{request.task.name}-{sha256_json(content)[:16]}.npy"


@pytest.fixture
def requests(tmp_path) -> list[ScoreRequest]:
    for name in ("group-0", "group-1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_model.safetensors").write_text(name)
    tasks = [task("films", 1), task("phones", 1), task("games", 2)]
    # Of one task: all, a part, and an equal part that is another object.
    cuts = [(t, cut) for t in tasks for cut in (t["train"], t["train"][:3], tuple(list(t["train"])[:3]))]
    return [ScoreRequest(a, t, cut) for t, cut in cuts for a in (None, tmp_path / "group-0", tmp_path / "group-1")]


def test_paths_are_those_of_each_request_alone(requests, tmp_path):
    found = score_paths(requests, CONFIG, BASE, tmp_path)
    assert found == [one_by_one(request, tmp_path) for request in requests]
    assert len(set(found)) == 3 * 2 * 3, "equal requests meet"


def test_an_adapter_that_changed_is_another(requests, tmp_path):
    before = score_paths(requests, CONFIG, BASE, tmp_path)
    (tmp_path / "group-1" / "adapter_model.safetensors").write_text("retrained")
    after = score_paths(requests, CONFIG, BASE, tmp_path)
    pairs = zip(requests, before, after, strict=True)
    changed = [request.adapter and request.adapter.name for request, old, new in pairs if old != new]
    assert changed == ["group-1"] * 9
    other = replace(requests[0], examples=requests[0].examples[1:])
    assert score_paths([other], CONFIG, BASE, tmp_path) != score_paths(requests[:1], CONFIG, BASE, tmp_path)
