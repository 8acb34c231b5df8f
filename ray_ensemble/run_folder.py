"""A run's folder: one resolved config, one owner at a time, and a manifest for every stage that is whole."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray_ensemble.config import JobConfig, dump_config, flatten, load_config
from ray_ensemble.errors import InputError
from ray_ensemble.files import file_harm, read_json, sha256_file, write_json, write_text
from ray_ensemble.storage import (
    LOCAL_SETTLE_SECONDS,
    MARKER,
    Lease,
    LocalFolder,
    WorkingCopy,
    opened,
    refuse_working_copy,
    run_place,
    without_settings,
)

LEASE_SECONDS = 60.0

STAGES = ("plan", "tasks", "gradients", "search", "train", "ensemble", "evaluate", "report")

# Keys of the job that each stage depends on, besides those of the stages before it. A prefix stands for all below it.
_DEPENDS: dict[str, tuple[str, ...]] = {
    "plan": ("model.", "adapter."),
    "tasks": ("tasks.", "limits."),
    "gradients": ("gradients.",),
    "search": (
        "estimator.",
        "search.",
        "training.epochs",
        "training.min_steps",
        "training.batch_size",
        "training.sampling",
    ),
    "train": ("training.",),
    "ensemble": ("ensemble.", "boosting."),
    "evaluate": (),
    "report": (),
}
# Keys that say how fast a result comes, not what it is.
_FREE = (
    "gradients.replicas",
    "gradients.gpus",
    "gradients.wait_minutes",
    "search.wait_minutes",
    "training.concurrency",
    "training.cpus",
    "training.gpus",
    "training.wait_minutes",
    "training.max_failures",
    "training.max_preemptions",
    "training.pack",
    "training.loggers",
    "training.checkpoint_every",
    "training.batch_tokens",
    "training.activation_checkpointing",
    "training.workers",
    "training.offload",
)


class RunFolder:
    """The folder of one run. To make one may drop stages of the run that is there: own the folder first, by `open_run`.

    Args:
        path: the folder; it is made if it is not there.
        config: the job that runs in it.
        redo: recompute what depends on keys that have changed instead of refusing them.
        copy: of a run at a URL, whose `folder` is then `path`.

    Raises:
        InputError: the folder cannot be written, or belongs to another job.
    """

    def __init__(
        self, path: str | Path, config: JobConfig, redo: bool = False, copy: WorkingCopy | None = None
    ) -> None:
        self.path = Path(path).resolve()
        self.config = config
        self._copy = copy
        _check_writable(self.path, self.name)
        if copy is None:
            refuse_working_copy(self.path)
        self._claim_config(redo)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def url(self) -> str | None:
        """The URL that this is a local copy of, or None."""
        return None if self._copy is None else self._copy.store.url

    @property
    def name(self) -> str:
        """The folder as messages name it: its URL or its path."""
        return without_settings(self.url) if self.url is not None else str(self.path)

    def whole(self, stage: str) -> bool:
        """Whether `stage` has run to its end here and every file that it lists is still what it was."""
        manifest = self._manifest_path(stage)
        if not manifest.exists():
            return False
        for name, digest in read_json(manifest, "manifest")["files"].items():
            file = self.path / name
            reason = file_harm(file, digest)
            if reason is not None and self._copy is not None and self._copy.refetch(name):
                reason = file_harm(file, digest)
            if reason is not None:
                print(f"{self.name}/{name}: {reason}; the {stage} stage runs again", flush=True)
                return False
        return True

    def finished(self, stage: str) -> bool:
        """Whether `stage` ran to its end here, whatever became of its files since."""
        return self._manifest_path(stage).exists()

    def finish(self, stage: str, files: Iterable[Path], facts: dict[str, Any]) -> None:
        """Write the manifest that makes `stage` whole: hashes of its files, and what it cost."""
        listed = {str(file.relative_to(self.path)): sha256_file(file) for file in files}
        write_json(self._manifest_path(stage), {"stage": stage, **facts, "files": listed})
        if self._copy is not None:
            self._copy.finish(f"manifests/{stage}.json")

    def facts(self, stage: str) -> dict[str, Any]:
        """The manifest of a finished stage."""
        found: dict[str, Any] = read_json(self._manifest_path(stage), "manifest")
        return found

    def forget_from(self, stage: str) -> None:
        """Drop the manifests of `stage` and of all after it, so that they run again."""
        names = STAGES[STAGES.index(stage) :]
        if self._copy is not None:
            self._copy.forget([f"manifests/{name}.json" for name in names if self._manifest_path(name).exists()])
        for name in names:
            self._manifest_path(name).unlink(missing_ok=True)

    def _manifest_path(self, stage: str) -> Path:
        return self.path / "manifests" / f"{stage}.json"

    def _claim_config(self, redo: bool) -> None:
        file = self.path / "config.yaml"
        if not file.exists():
            if any(child.name not in ("lease.json", MARKER) for child in self.path.iterdir()):
                raise InputError(
                    f"--output {self.name}: not empty and not a run folder (no config.yaml); choose another folder"
                )
            write_text(file, dump_config(self.config))
            return
        before, after = flatten(load_config(file)), flatten(self.config)
        changed = [
            key for key in dict.fromkeys([*before, *after]) if before.get(key) != after.get(key) and not is_free(key)
        ]
        if changed and not redo:
            shown = ", ".join(f"{key}: {_short(before.get(key))} -> {_short(after.get(key))}" for key in changed[:5])
            more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
            raise InputError(
                f"--output {self.name}: belongs to a run with another config ({shown}{more}); choose another folder, "
                "or give --redo to recompute what depends on it"
            )
        if changed:
            stage = min((_stage_of(key, self.config) for key in changed), key=STAGES.index)
            self.forget_from(stage)
            if STAGES.index(stage) <= STAGES.index("train"):  # the estimate that was validated was of another job
                for name in ("validation.json", "plots/validation.png"):
                    (self.path / name).unlink(missing_ok=True)
        if before != after:
            write_text(file, dump_config(self.config))


@contextmanager
def open_run(output: str | Path, config: JobConfig, redo: bool = False) -> Iterator[RunFolder]:
    """Own a run folder within the block, given by path or by URL.

    Raises:
        InputError: as for `RunFolder`; another living run owns it; or the URL's store refuses it.
        RunError: the store does not answer, or another run took the folder over.
    """
    place = run_place(output)
    if not isinstance(place, str):
        path = place.resolve()
        _check_writable(path, str(path))
        refuse_working_copy(path)
        lease = Lease(LocalFolder(path), _process_start, expires=LEASE_SECONDS, settle=LOCAL_SETTLE_SECONDS)
        with lease.held():
            yield RunFolder(path, config, redo)
        return
    with opened(place, _process_start, LEASE_SECONDS) as copy:
        folder = RunFolder(copy.folder, config, redo, copy)
        copy.push()
        yield folder


def _check_writable(path: Path, name: str) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"--output {name}: cannot be written ({error.strerror})") from None


def is_free(key: str) -> bool:
    """Whether a key of the job, as `flatten` gives it, says how fast a result comes and not what it is."""
    return any(f"{key}.".startswith(f"{free}.") for free in _FREE)


def _stage_of(key: str, config: JobConfig) -> str:
    """The first stage of the job that depends on a key."""
    trains = key.startswith("training.")
    if trains and config.gradients.start == "meta" and key not in ("training.epochs", "training.min_steps"):
        return "gradients"  # the common start is trained before them
    if trains and config.estimator.calibrate:
        return "search"
    for stage in STAGES:
        if any(key == name or (name.endswith(".") and key.startswith(name)) for name in _DEPENDS[stage]):
            return stage
    return STAGES[0]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "…"


def _process_start(pid: int) -> str | None:
    """When a process of this machine started, in clock ticks since boot, or None if there is none of that number."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None
