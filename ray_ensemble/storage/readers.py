"""Local copies of a run at a URL for those who read it: what its manifests list, or what tells how far it is."""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ray_ensemble.errors import InputError
from ray_ensemble.files import sha256_file, whole_file
from ray_ensemble.storage.store import Store, Stored, store_at
from ray_ensemble.storage.url import is_url, without_settings
from ray_ensemble.storage.working_copy import place_of

_TEXTS = (".json", ".jsonl", ".yaml")
_INDEX = ".status.json"


def run_files(run: str | Path, stage: str | None = None) -> Path:
    """A run folder to read from: the path itself, or a copy of the whole stages of a run at a URL, without its gradients.

    The copy is kept in the cache; files that are there and sound are not brought again.

    Args:
        run: a run folder, by path or checked URL.
        stage: one that must be whole there. A run that does an earlier stage anew is refused: its files are not of one piece.

    Raises:
        InputError: no run is there, it is not that far, or a file or object is missing or damaged, which is named.
        RunError: the store does not answer.
    """
    path = _copied(str(run)) if is_url(run) else Path(run)
    if stage is not None and not (path / "manifests" / f"{stage}.json").is_file():
        name = without_settings(str(run))
        if not (path / "config.yaml").is_file():
            raise InputError(f"{name}: no run folder is there (no config.yaml)")
        raise InputError(
            f"{name}: the {stage} stage is not whole (no manifests/{stage}.json): the run has not come this far, or does a part "
            "of it anew; `ray-ensemble status` tells"
        )
    return path


def _copied(run: str) -> Path:
    """The copy of a run at a URL."""
    store = store_at(run)
    folder = place_of(store.url) / "read"
    manifests = [name for name in store.list("manifests") if name.endswith(".json")]
    if store.about("config.yaml") is None:
        raise InputError(f"{store.where('')}: not a run folder (no config.yaml)")
    store.each(lambda name: store.get(name, folder / name), ["config.yaml", *manifests])
    for left in (folder / "manifests").glob("*.json"):
        if f"manifests/{left.name}" not in manifests:
            left.unlink()
    wanted: dict[str, str] = {}
    for name in manifests:
        wanted |= _listed(store, name, folder / name)

    def bring(name: str) -> None:
        file = folder / name
        if file.is_file() and sha256_file(file) == wanted[name]:
            return
        store.get(name, file)
        if sha256_file(file) != wanted[name]:
            file.unlink()
            raise InputError(f"{store.where(name)}: damaged (its SHA-256 is not the one that its stage recorded)")

    store.each(bring, wanted)
    return folder


def _listed(store: Store, name: str, manifest: Path) -> dict[str, str]:
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        found = {str(file): str(digest) for file, digest in files.items() if not file.startswith("gradients/")}
    except (ValueError, KeyError, AttributeError):
        raise InputError(f"{store.where(name)}: damaged; this manifest cannot be read") from None
    for file in found:
        store.path(file)  # refuses names that lead out of the folder
    return found


def status_files(run: str | Path) -> Path:
    """A folder that `status` can tell the state of a run from: the path itself, or stand-ins for the objects of a run at a URL.

    Texts are brought whole. Of the gradients' parts only the array that tells how many examples they hold is; of all else the
    names. Times are those of the store.

    Raises:
        InputError: no run is there.
        RunError: the store does not answer.
    """
    if not is_url(run):
        return Path(run)
    store = store_at(str(run))
    folder = place_of(store.url) / "status"
    folder.mkdir(parents=True, exist_ok=True)
    there = {name: about for name, about in store.list().items() if not name.startswith("shared/")}
    if "config.yaml" not in there:
        raise InputError(f"{store.where('')}: not a run folder (no config.yaml)")
    before = _read_index(folder)

    def bring(name: str) -> None:
        about, target = there[name], folder / name
        if name.endswith(_TEXTS) or name.endswith(".npz"):
            try:
                _bring_contents(store, name, target)
            except (InputError, FileNotFoundError):
                return  # deleted since it was listed
            except (ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error):
                return  # a damaged part, which the run will find and do again
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.touch()
        if about.written is not None:
            os.utime(target, ns=(about.written, about.written))

    store.each(
        bring, [name for name, about in there.items() if before.get(name) != _mark(about) or name == "lease.json"]
    )
    for name in set(before) - set(there):
        (folder / name).unlink(missing_ok=True)
    with whole_file(folder / _INDEX) as temporary:
        temporary.write_text(json.dumps({name: _mark(about) for name, about in there.items()}))
    return folder


def _bring_contents(store: Store, name: str, target: Path) -> None:
    if not name.endswith(".npz"):
        store.get(name, target)
        return
    with store.open(name) as stream, np.load(stream, allow_pickle=False) as arrays:
        counted = "margins" if "margins" in arrays else "class_scores"
        with whole_file(target) as temporary, temporary.open("wb") as written:
            np.savez(written, allow_pickle=False, **{counted: arrays[counted]})


def _mark(about: Stored) -> list[Any]:
    return [about.size, about.written]


def _read_index(folder: Path) -> Mapping[str, list[Any]]:
    try:
        found: dict[str, list[Any]] = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        return {name: mark for name, mark in found.items() if (folder / name).is_file()}
    except (OSError, ValueError, AttributeError):
        return {}
