"""The tiny tasks as the tiny model's tokenizer sees them."""

from __future__ import annotations

from pathlib import Path

import pytest

from ray_ensemble.config import LimitsConfig, TaskConfig
from ray_ensemble.models import load_tokenizer
from ray_ensemble.tasks import EncodedTask, encode_task, load_tasks


@pytest.fixture(scope="session")
def tasks(tiny_model: Path, task_folder: Path) -> list[EncodedTask]:
    loaded = load_tasks([TaskConfig(source=str(task_folder))], LimitsConfig(), task_folder)
    tokenizer = load_tokenizer(tiny_model)
    return [encode_task(task, tokenizer, 64) for task in loaded]
