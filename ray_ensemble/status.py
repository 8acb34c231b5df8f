"""How far a run is, from the files of its folder alone: no Ray, so that any machine which sees the folder
or reaches its URL can ask.

    from ray_ensemble.status import run_status
    run_status("runs/first")["stage"]

Rates are those of the files: what was finished since the first file that the stage has left, by the files' own times.
"""

from __future__ import annotations

import json
import math
import time
import zipfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from ray_ensemble.config import JobConfig, load_config
from ray_ensemble.errors import InputError
from ray_ensemble.files import read_json, read_mapping
from ray_ensemble.run_folder import LEASE_SECONDS, STAGES
from ray_ensemble.storage import is_url, run_place, status_files, without_settings

_PROGRESS = {"gradients": "gradients", "search": "search", "train": "training"}
_RECENT = 50  # rows of a training log that its rate is taken of


def run_status(folder: str | Path) -> dict[str, Any]:
    """What the files of a run folder tell.

    Returns:
        `folder`; `state`: finished, running, partial (jobs failed for good), or stopped; `stage`: the first that is not whole,
        or None; `stages`: each one's `whole`, `seconds`, and `missing` files; `owner`: host, pid and age of the heartbeat in
        seconds, or None; `waits_for`: in words; `gradients`, `search`, `training`: `done` and `total` in their `unit`,
        `per_second` and `seconds_left` where they can be told (`training` with `adapters`); `failed`: reasons by adapter.

    Raises:
        InputError: there is no run folder, or a file of it is damaged.
    """
    path = status_files(run_place(folder))
    if not path.is_dir():
        raise InputError(f"{path}: no such run folder")
    if not (path / "config.yaml").is_file():
        raise InputError(f"{path}: not a run folder (no config.yaml)")
    config = load_config(path / "config.yaml")
    stages = {stage: _stage(path, stage) for stage in STAGES}
    current = next((stage for stage in STAGES if not stages[stage]["whole"]), None)
    owner = _owner(path)
    alive = owner is not None and owner["alive"]
    failures = path / "failures.json"
    failed = read_mapping(failures, "record of failures", "failed", dict)["failed"] if failures.is_file() else {}
    found: dict[str, Any] = {
        "folder": without_settings(str(folder)) if is_url(folder) else str(path.resolve()),
        "state": _state(current, alive, failed),
        "stage": current,
        "stages": stages,
        "owner": owner,
        "failed": failed,
    }
    if stages["tasks"]["whole"]:
        tasks = {
            task["name"]: task for task in read_mapping(path / "tasks.json", "list of tasks", "tasks", list)["tasks"]
        }
        found["gradients"] = _gradients(path, config, tasks)
        found["search"] = _search(path, config, stages["search"]["whole"])
        if stages["search"]["whole"]:
            found["training"] = _training(path, config, tasks)
    found["waits_for"] = _waits_for(found, alive)
    return found


def status_text(status: dict[str, Any]) -> str:
    """What `run_status` found, for a terminal."""
    lines = [f"{status['folder']}: {status['state']}"]
    owner = status["owner"]
    if owner is not None:
        silent = "" if owner["alive"] else ", which is too long: the owner is gone"
        lines.append(
            f"  owner      process {owner['pid']} on {owner['host']}, heartbeat {owner['heartbeat_age']:.0f} s ago{silent}"
        )
    if status["waits_for"] is not None:
        lines.append(f"  waits for  {status['waits_for']}")
    lines.append("")
    for stage, facts in status["stages"].items():
        progress = status.get(_PROGRESS.get(stage, ""))
        if facts["whole"]:
            told = f"whole, {facts['seconds']:.0f} s"
        elif stage == status["stage"] and progress:
            told = _told(progress)
        else:
            told = "…" if stage == status["stage"] else "-"
        lines.append(f"  {stage:<10} {told}")
    if status["stage"] == "train" and "training" in status:
        for name, adapter in status["training"]["adapters"].items():
            of = "" if adapter["total"] is None else f" of {adapter['total']}"
            loss = "" if adapter["loss"] is None else f", loss {adapter['loss']:.2f}"
            lines.append(f"    {name}: {adapter['done']}{of} steps{loss}")
    lines += [f"    {name} failed: {reason}" for name, reason in status["failed"].items()]
    return "\n".join(lines)


def _told(progress: dict[str, Any]) -> str:
    text = f"{progress['done']} of {progress['total']} {progress['unit']}"
    if progress["per_second"]:
        text += f", {progress['per_second']:.2f}/s"
    if progress["seconds_left"] is not None:
        text += f", {progress['seconds_left']} s left"
    return text


def _stage(path: Path, stage: str) -> dict[str, Any]:
    """A stage is whole if its manifest is there and the files that it lists are; their bytes are not read."""
    manifest = path / "manifests" / f"{stage}.json"
    if not manifest.is_file():
        return {"whole": False, "seconds": None, "missing": []}
    facts = read_mapping(manifest, "manifest", "files", dict)
    missing = [name for name in facts["files"] if not (path / name).is_file()]
    return {"whole": not missing, "seconds": facts.get("seconds"), "missing": missing}


def _owner(path: Path) -> dict[str, Any] | None:
    """Who holds the lease, and whether its heartbeat is recent: of a process elsewhere no more can be told."""
    try:
        held = json.loads((path / "lease.json").read_text(encoding="utf-8"))
        age = max(0.0, time.time() - float(held["heartbeat"]))
        return {
            "host": str(held["host"]),
            "pid": int(held["pid"]),
            "heartbeat_age": round(age, 1),
            "alive": age < LEASE_SECONDS,
        }
    except (OSError, ValueError, KeyError, TypeError):
        return None  # none, released this moment, or cut short: nobody's


def _state(current: str | None, alive: bool, failed: dict[str, str]) -> str:
    if current is None:
        return "finished"
    if alive:
        return "running"
    return "partial" if failed and current == "train" else "stopped"


def _waits_for(found: dict[str, Any], alive: bool) -> str | None:
    stage = found["stage"]
    if stage is None:
        return None
    if not alive:
        missing = found["stages"][stage]["missing"]
        lost = f" ({missing[0]} is missing, so that {stage} runs again)" if missing else ""
        return f"the same command to be started again; it goes on with {stage}{lost}"
    progress = found.get(_PROGRESS.get(stage, ""))
    if not progress:
        return f"the {stage} stage"
    left = progress["total"] - progress["done"]
    if not left:
        return f"the end of the {stage} stage"
    if not progress["done"]:
        return f"the first of {left} {progress['unit']}: models are loaded, or the cluster has no room yet"
    return f"{left} of {progress['total']} {progress['unit']}"


def _progress(unit: str, done: int, total: int, per_second: float | None) -> dict[str, Any]:
    left = (total - done) / per_second if per_second and done < total else None
    return {
        "unit": unit,
        "done": done,
        "total": total,
        "per_second": round(per_second, 3) if per_second else None,
        "seconds_left": round(left) if left is not None else None,
    }


def _rate(sizes: dict[Path, int]) -> float | None:
    """Units a second, by the times of the files that hold them; the first file tells when, not how fast."""
    if len(sizes) < 2:
        return None
    times = {}
    for file in sizes:
        with suppress(FileNotFoundError):  # a part that was put together with others since
            times[file] = file.stat().st_mtime
    if len(times) < 2:
        return None
    first, last = min(times, key=lambda f: times[f]), max(times.values())
    elapsed = last - times[first]
    return (sum(sizes[file] for file in times) - sizes[first]) / elapsed if elapsed > 0 else None


def _gradients(path: Path, config: JobConfig, tasks: dict[str, Any]) -> dict[str, Any]:
    most = config.gradients.max_examples or math.inf
    store, total, done = path / "gradients", 0, 0
    parts = {part: examples for part in store.glob(".parts/*.npz") if (examples := _examples(part)) is not None}
    for name, task in tasks.items():
        for split, count in (("train", int(min(task["train"], most))), ("validation", task["validation"])):
            total += count
            if (store / name / split / "info.json").is_file():
                done += count
                # Its parts stay until the last split is put together.
                parts = {part: n for part, n in parts.items() if not part.name.startswith(f"{name}-{split}-")}
    return _progress("examples", min(total, done + sum(parts.values())), total, _rate(parts))


def _examples(part: Path) -> int | None:
    """Examples in a finished part of the gradients; None where it is gone by now or is damaged."""
    try:
        with np.load(part, allow_pickle=False) as arrays:
            return len(arrays["margins" if "margins" in arrays else "class_scores"])
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        return None


def _search(path: Path, config: JobConfig, whole: bool) -> dict[str, Any]:
    scales = len(set(config.search.regularization_scales))  # with several, each has trials of its own
    files = (path / "search").glob("tune/*/result.json" if scales == 1 else "scale-*/tune/*/result.json")
    results = {file: 1 for file in files if file.stat().st_size}
    # There may be fewer distinct trials than the job allows.
    total = len(results) if whole else config.search.trials * scales
    return _progress("trials", min(len(results), total), total, _rate(results))


def _training(path: Path, config: JobConfig, tasks: dict[str, Any]) -> dict[str, Any]:
    """Steps of all adapters: those that are done by name, those in training by the key that their logs have."""
    groups = read_mapping(path / "partition.json", "partition", "groups", list)["groups"]
    members = {f"group-{g}": list(group) for g, group in enumerate(groups)}
    steps = {
        name: config.training.steps(sum(tasks[task]["train"] for task in group)) for name, group in members.items()
    }
    warm_up = config.gradients.meta_steps if config.gradients.start == "meta" else 0
    members["qlora_all"], steps["qlora_all"] = list(tasks), sum(steps.values()) + warm_up
    adapters: dict[str, dict[str, Any]] = {}
    for name, group in members.items():
        kept = path / ("baselines" if name == "qlora_all" else "adapters") / name / "result.json"
        trained = (read_json(file) for file in [kept, *sorted(path.glob("trained/*/result.json"))] if file.is_file())
        if any(_made(result, group, steps[name]) for result in trained):
            adapters[name] = {"done": steps[name], "total": steps[name], "loss": None}
    done, speeds = sum(adapter["done"] for adapter in adapters.values()), []
    for log in sorted(path.glob("checkpoints/*/logs/*.jsonl")):
        rows = list(_rows(log))
        if not rows or (path / "trained" / log.stem / "result.json").is_file():
            continue
        adapters[log.stem] = {"done": rows[-1]["step"] + 1, "total": None, "loss": rows[-1]["loss"]}
        done += rows[-1]["step"] + 1
        seconds = [row["seconds"] for row in rows[-_RECENT:] if row.get("seconds")]
        if seconds:
            speeds.append(len(seconds) / sum(seconds))
    total = sum(steps.values())
    return {**_progress("steps", min(done, total), total, sum(speeds) or None), "adapters": adapters}


def _made(result: dict[str, Any], group: Iterable[str], steps: int) -> bool:
    """Whether a kept adapter is that of a group: of the same tasks, and with no more steps (it may have stopped early)."""
    return set(result["members"]) == set(group) and result["steps"] <= steps


def _rows(log: Path) -> Iterable[dict[str, Any]]:
    try:
        lines = log.read_text(encoding="utf-8").splitlines()
    except OSError:
        return  # removed this moment: its adapter is done
    for line in lines:
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue  # cut off by a kill, or just being written
