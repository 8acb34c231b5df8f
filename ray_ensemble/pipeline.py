"""The stages in order: plan, tasks, gradients, search, train, ensemble, evaluate, report.

    from ray_ensemble import Job
    result = Job.from_yaml("job.yaml").run("runs/demo")

Each stage reads what the ones before it wrote, writes its own files, and ends with a manifest; a stage whose manifest is there
is not run again.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_ensemble.config import JobConfig, load_config
from ray_ensemble.errors import InputError, RunError, nearest
from ray_ensemble.files import read_json
from ray_ensemble.run_folder import STAGES, open_run
from ray_ensemble.runtime import prepare_environment
from ray_ensemble.stages import Stages, encode_all
from ray_ensemble.tasks import load_tasks

_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class RunResult:
    """A finished run: its folder, and the files that one asks for first, as plain data.

    Of a run at a URL, `folder` is the local copy and `url` tells where it is.
    """

    folder: Path
    url: str | None = None

    @property
    def partition(self) -> dict[str, Any]:
        """`partition.json`."""
        found: dict[str, Any] = read_json(self.folder / "partition.json", "partition")
        return found

    @property
    def metrics(self) -> dict[str, Any]:
        """`metrics.json`."""
        found: dict[str, Any] = read_json(self.folder / "metrics.json", "metrics")
        return found

    @property
    def report(self) -> Path:
        """Where the report is."""
        return self.folder / "report.html"


class Job:
    """A job file, ready to run; the command line's verbs are calls of this class."""

    def __init__(self, config: JobConfig) -> None:
        self.config = config

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Sequence[str] = ()) -> Job:
        """Read and check a job file; `overrides` are `"section.key=value"`.

        Raises:
            InputError: the file is not a job.
        """
        return cls(load_config(path, list(overrides)))

    def run(self, output: str | Path, *, redo: bool = False) -> RunResult:
        """All stages, going on where an earlier run of the same job stopped."""
        return self.through("report", output, redo=redo)

    def plan(self, output: str | Path, *, redo: bool = False) -> RunResult:
        """Resolve the job: `config.yaml`, `plan.json`, and θ₀ in `init/`."""
        return self.through("plan", output, redo=redo)

    def tasks(self, output: str | Path, *, redo: bool = False) -> RunResult:
        """Up to the data, read and tokenised: `tasks.json`."""
        return self.through("tasks", output, redo=redo)

    def gradients(self, output: str | Path, *, redo: bool = False) -> RunResult:
        """Up to the gradient store: `gradients/`."""
        return self.through("gradients", output, redo=redo)

    def search(self, output: str | Path, *, redo: bool = False) -> RunResult:
        """Up to the groups: `affinity.json`, `partition.json`."""
        return self.through("search", output, redo=redo)

    def train(self, output: str | Path, *, redo: bool = False) -> RunResult:
        """Up to the adapters of the groups and the baseline's: `adapters/`, `baselines/`."""
        return self.through("train", output, redo=redo)

    def ensemble(self, output: str | Path, *, redo: bool = False) -> RunResult:
        """Up to the weights and merged adapters: `ensemble.json`, `merged/`."""
        return self.through("ensemble", output, redo=redo)

    def evaluate(self, output: str | Path, *, redo: bool = False) -> RunResult:
        """Up to the metrics on the test splits: `metrics.json`."""
        return self.through("evaluate", output, redo=redo)

    def report(self, output: str | Path, *, redo: bool = False) -> RunResult:
        """Up to the report, as `run`."""
        return self.through("report", output, redo=redo)

    def through(self, stage: str, output: str | Path, *, redo: bool = False) -> RunResult:
        """Every stage up to and with `stage`.

        Args:
            stage: one of plan, tasks, gradients, search, train, ensemble, evaluate, report.
            output: the run folder, a path or a URL (docs/run.md).
            redo: recompute what depends on keys that differ from the folder's config, instead of refusing.

        Raises:
            InputError: the job, its data or the folder are not right.
            RunError: a stage failed; the same call goes on from what is whole.
        """
        if stage not in STAGES:
            raise InputError(f"no stage '{stage}'{nearest(stage, STAGES)} (stages: {', '.join(STAGES)})")
        prepare_environment()
        from ray_ensemble.models import quiet_libraries

        quiet_libraries()
        try:
            with open_run(output, self.config, redo) as folder, ExitStack() as stack:
                Stages(folder, stack).through(stage)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            raise RunError(
                f"--output {output}: the disk is full ({error}); free some space: the same command then goes on from here"
            ) from error
        return RunResult(folder.path, folder.url)

    def validate(
        self, output: str | Path, *, subsets: int = 12, repeats: int | None = None, redo: bool = False
    ) -> dict[str, Any]:
        """Fine-tune sampled subsets for real and compare the estimate with them: `validation.json`, and what it holds.

        Args:
            output: the run folder; stages up to the gradients run first where they are not whole.
            subsets: how many are fine-tuned.
            repeats: how many of these are fine-tuned again with another seed, which gives the ceiling of any estimate; by default
                three, or all where there are fewer.
            redo: as for `through`.

        Raises:
            InputError, RunError: as for `through`.
        """
        prepare_environment()
        from ray_ensemble.models import quiet_libraries
        from ray_ensemble.report import write_validation_plot
        from ray_ensemble.validation import check_counts, validate

        quiet_libraries()
        repeats = min(3, subsets) if repeats is None else repeats
        check_counts(subsets, repeats)
        with open_run(output, self.config, redo) as folder, ExitStack() as stack:
            stages = Stages(folder, stack)
            stages.through("gradients")
            found = validate(stages, subsets, repeats)
            write_validation_plot(folder.path, found)
            if folder.finished("report"):
                # The report carries the last validation.
                folder.forget_from("report")
                stages.through("report")
            return found

    def preview(self) -> list[Any]:
        """Rendered prompts and label words of every task as the tokenizer sees them, as rich renderables."""
        from ray_ensemble.models import load_tokenizer, materialise, quiet_libraries
        from ray_ensemble.tasks import preview

        quiet_libraries()
        tokenizer = load_tokenizer(materialise(self.config.model.source))
        tasks = load_tasks(self.config.tasks, self.config.limits, Path.cwd())
        encoded = encode_all(tasks, tokenizer, self.config)
        return [preview(task, found, tokenizer) for task, found in zip(tasks, encoded, strict=True)]
