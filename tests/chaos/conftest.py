"""The undisturbed run that every round is held against, once for the session."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import Reference, tiny_job


@pytest.fixture(scope="session")
def reference(tiny_model: Path, task_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    folder = tmp_path_factory.mktemp("reference")
    return Reference.run(tiny_job(folder, tiny_model, task_folder), folder / "run")
