"""The benchmark of inference on a run of tiny adapters."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from run_by_hand import write_run

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "inference.py"


@pytest.mark.slow
def test_every_variant_is_timed_and_agrees(tiny_model, task_folder, tmp_path):
    run = write_run(tmp_path / "run", tiny_model, task_folder)
    command = [sys.executable, str(SCRIPT), str(run), "--task", "options", "--rounds", "2", "--examples", "6"]
    command += ["--generate", "3", "--prompts", "2", "--json", str(tmp_path / "found.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert list(found["predict"]) == ["base", "one", "mixed", "sequential", "merged"]
    assert list(found["generate"]) == ["one", "mixed", "merged"]
    for rows in (found["predict"], found["generate"]):
        assert rows["one"]["ratio_to_one"] == {"median": 1.0, "min": 1.0, "max": 1.0}
        assert rows["mixed"]["flops"] == 4 * rows["one"]["flops"]
        assert rows["one"]["flops"] < rows["merged"]["flops"] < 2 * rows["one"]["flops"]
        assert min(row["peak_memory_bytes"] for row in rows.values()) > 2**20
    assert found["predict"]["base"]["flops"] < found["predict"]["one"]["flops"]
    assert "≤ 4.4" in done.stdout


@pytest.mark.slow
def test_too_few_adapters_are_told(tiny_model, task_folder, tmp_path):
    run = write_run(tmp_path / "run", tiny_model, task_folder)
    command = [sys.executable, str(SCRIPT), str(run), "--adapters", "7"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1
    assert "--adapters 7: " in done.stderr
    assert "has 6, the baseline and boosters included" in done.stderr
