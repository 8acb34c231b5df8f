"""What a job sends to a cluster: the resolved job file and the local data that its relative sources name (no Ray).

A source that is an absolute path is taken as a path on the cluster, and so is one that starts with `~`, as this machine reads
it. Relative ones are packed and rewritten.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ray_ensemble.config import dump_config, load_config
from ray_ensemble.errors import InputError
from ray_ensemble.files import sha256_file, sha256_json, write_text

PACKAGE_LIMIT = 100 * 2**20  # bytes: Ray's job server takes no larger request
INPUTS = "inputs"
_SHOWN = 5  # of the largest files, where a package is too large


@dataclass(frozen=True)
class JobPackage:
    """A packed job: the job file, and its data below `inputs/`.

    `digest` is the hash of names and contents of the data, or None where none are packed; `packed` are the files and folders of
    this machine that were, `remote` the sources that are taken as paths on the cluster.
    """

    folder: Path
    digest: str | None
    packed: tuple[Path, ...] = ()
    remote: tuple[str, ...] = ()

    @property
    def job(self) -> Path:
        """The job file, whose relative sources start at its folder."""
        return self.folder / "job.yaml"


def pack_job(job: str | Path, overrides: Sequence[str], folder: Path) -> JobPackage:
    """Write a job and the data that its relative sources name into `folder`.

    Hidden files and folders are left out; a link is followed only inside the data that it is part of.

    Args:
        job: the job file.
        overrides: `"section.key=value"` strings; they are resolved here.
        folder: an empty folder.

    Raises:
        InputError: the job is not right, a source is not there, links out of its folder or is no plain file, or all
            together are more than `PACKAGE_LIMIT`.
    """
    config = load_config(job, list(overrides))
    moved = _loaded_elsewhere(Path(job), overrides)
    places: dict[Path, str] = {}

    def packed(here: str, there: str) -> str:
        """The source as it stands in the package: as it is, unless it depends on where the job file is."""
        if here == there:
            return here
        prefix = "hf:" if here.startswith("hf:") else ""
        local = Path(here.removeprefix("hf:"))
        # The name stays: a task without a name of its own is called by it.
        place = places.setdefault(local, f"./{INPUTS}/{len(places)}/{local.name}")
        return f"{prefix}{place}"

    model = config.model.model_copy(update={"source": packed(config.model.source, moved[0])})
    tasks = [
        task.model_copy(update={"source": packed(task.source, there)})
        for task, there in zip(config.tasks, moved[1:], strict=True)
    ]
    files = {Path(place) / name: file for local, place in places.items() for name, file in _files(local).items()}
    _refuse_large({str(file): file.stat().st_size for file in files.values()})
    for name, file in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    sources = [model.source, *(task.source for task in tasks)]
    remote = tuple(source for source in sources if source.removeprefix("hf:").startswith("/"))
    package = JobPackage(folder, _digest(folder, list(files)), tuple(places), remote)
    write_text(package.job, dump_config(config.model_copy(update={"model": model, "tasks": tasks})))
    return package


def unpack_wheel(wheel: str | Path, folder: Path) -> Path:
    """The `ray_ensemble` folder of a wheel, unpacked below `folder`.

    Ray would install a wheel with all that it depends on, over what the image has; a folder it only puts on the path.

    Raises:
        InputError: it is not a wheel of this package.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.startswith("ray_ensemble/")]
            if "ray_ensemble/version.py" not in names:
                raise InputError(
                    f"--wheel {wheel}: not a wheel of ray_ensemble (pip wheel --no-deps -w dist . makes one)"
                )
            archive.extractall(folder, names)  # takes '..' and leading slashes out of names
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(f"--wheel {wheel}: cannot be read ({error})") from None
    return folder / "ray_ensemble"


def _loaded_elsewhere(job: Path, overrides: Sequence[str]) -> list[str]:
    """Sources of the model and of each task as they are if the job file lies elsewhere: relative ones differ then."""
    with tempfile.TemporaryDirectory() as elsewhere:
        # Deep enough that no chain of '..' leads to the same place from here.
        copy = Path(elsewhere, *["deeper"] * 40, job.name)
        copy.parent.mkdir(parents=True)
        shutil.copyfile(job, copy)
        config = load_config(copy, list(overrides))
    return [config.model.source, *(task.source for task in config.tasks)]


def _files(local: Path) -> dict[str, Path]:
    """Plain files of a source by their names below it; `.` for a source that is a file."""
    if not local.exists():
        raise InputError(f"{local}: no such file or folder, so that it cannot be sent to the cluster")
    if local.is_file():
        return {".": local}
    found: dict[str, Path] = {}
    for parent, folders, names in os.walk(local):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in [*folders, *sorted(names)]:
            path = Path(parent, name)
            if name.startswith(".") or (name in folders and not path.is_symlink()):
                continue
            if path.is_symlink() and not path.resolve().is_relative_to(local):
                raise InputError(f"{path}: links to {path.resolve()}, outside the data; it is not sent to the cluster")
            if not path.is_file():
                raise InputError(f"{path}: not a plain file; it cannot be sent to the cluster")
            found[str(path.relative_to(local))] = path
    return found


def _refuse_large(sizes: dict[str, int]) -> None:
    total = sum(sizes.values())
    if total > PACKAGE_LIMIT:
        largest = sorted(sizes, key=lambda name: sizes[name], reverse=True)[:_SHOWN]
        shown = ", ".join(f"{name} ({sizes[name] / 2**20:.1f} MiB)" for name in largest)
        raise InputError(
            f"the job's files are {total / 2**20:.0f} MiB, more than the {PACKAGE_LIMIT // 2**20} MiB that can be sent; the "
            f"largest: {shown}; put them where every node of the cluster sees them and give absolute paths"
        )


def _digest(folder: Path, names: list[Path]) -> str | None:
    if not names:
        return None
    return sha256_json({str(name): sha256_file(folder / name) for name in names})[:20]
