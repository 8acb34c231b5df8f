"""What Ray's dashboard shows of a job beside its id: metadata, which whoever can list jobs can read. No secrets.

Ray takes a job's metadata once: `submit` gives them to the job server, and a run to Ray when it joins a cluster, where Ray lists
it as a driver's job. Nothing can be changed later, so how far a run is stands in its figures (`metrics`) and in its folder.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from ray_ensemble.config import JobConfig, load_config
from ray_ensemble.errors import InputError
from ray_ensemble.job_package import JobPackage
from ray_ensemble.tasks.folder import find_task_folders
from ray_ensemble.version import __version__

_USER = re.compile(r"(?<=://)[^/?#]*@")
_QUERY = re.compile(r"[?#].*", re.DOTALL)


def metadata(output: str, model: str, tasks: str) -> dict[str, str]:
    """The metadata of a run: its name and output, this package's version, the base, and how many tasks there are."""
    shown = without_secrets(output)
    return {
        "ray_ensemble_run": posixpath.basename(shown.rstrip("/")),
        "ray_ensemble_output": shown,
        "ray_ensemble_version": __version__,
        "ray_ensemble_model": without_secrets(model),
        "ray_ensemble_tasks": tasks,
    }


def submission_metadata(output: str, package: JobPackage) -> dict[str, str]:
    """The metadata of a job that is sent: a packed base by its name, and the tasks as far as they can be counted from here."""
    config = load_config(package.job)
    model = config.model.source
    if Path(model).is_relative_to(package.folder):
        model = Path(model).name
    return metadata(output, model, count_tasks(config, package.folder))


def count_tasks(config: JobConfig, folder: Path) -> str:
    """How many tasks a job has: `12`, or `at least 12` where folders that are not below `folder` may hold several."""
    count, open_end = 0, False
    for task in config.tasks:
        path = Path(task.source)
        if path.is_relative_to(folder) and path.is_dir():
            try:
                count += len(find_task_folders(path))
            except InputError:  # the run will say so
                count += 1
        else:
            count += 1
            open_end |= path.is_absolute() and path.suffix != ".jsonl"
    return f"at least {count}" if open_end else str(count)


def without_secrets(source: str) -> str:
    """A path or name as it is; a URL without user, password, query and fragment, which may hold keys."""
    return _QUERY.sub("", _USER.sub("", source)) if "://" in source else source
