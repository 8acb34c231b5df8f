"""A worker killed, a node lost, a node announced as lost: the adapter ends as if nothing had been, never from step 0 again."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from interrupted import EVERY, encoded_tasks, job_and_settings
from safetensors.torch import load_file

from ray_ensemble.config import AdapterConfig
from ray_ensemble.models import attach_adapters, draw_initial_adapter, load_base
from ray_ensemble.training import train_adapter

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.slow]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def source(tiny_model: Path, task_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    shutil.copytree(tiny_model, folder / "model")
    shutil.copytree(task_folder, folder / "tasks")
    draw_initial_adapter(load_base(tiny_model, "none", CPU), AdapterConfig(), folder / "init")
    return folder


@pytest.mark.parametrize("mode", ["worker", "node", "notice"])
def test_interrupted_training_goes_on_from_a_checkpoint(source, tmp_path, mode):
    script = Path(__file__).parent / "interrupted.py"
    done = subprocess.run(
        [sys.executable, str(script), str(source), str(tmp_path / "run"), mode],
        capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    # Ray's own lines about lost nodes may come after it.
    told = json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"interrupted"')))
    job, settings = job_and_settings(mode)
    # What is seen of a checkpoint first is its folder, while it is reported; the report before it may not have reached Ray yet.
    assert told["went_on"] + 1 >= told["interrupted"] - (2 * EVERY[mode] if mode != "notice" else 0) > 0

    members = [task for task in encoded_tasks(source) if task.name in job.members]
    model = attach_adapters(load_base(source / "model", "none", CPU), {"default": source / "init"}, trainable="default")
    losses: list[float] = []
    train_adapter(model, members, settings, job.steps, job.seed, 0, on_step=lambda row: losses.append(row["loss"]))
    rows = [json.loads(line) for line in (Path(told["adapter"]) / "train.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(job.steps))
    assert [row["loss"] for row in rows] == pytest.approx(losses, rel=1e-6)
    found = load_file(Path(told["adapter"]) / "adapter_model.safetensors")
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.testing.assert_close(found[name.replace(".default.", ".")], parameter.detach(), rtol=1e-5, atol=1e-6)
