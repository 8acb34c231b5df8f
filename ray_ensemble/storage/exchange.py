"""What the driver and the workers of a run hand each other as files: by path where all nodes see one folder, else by the store.

A driver's folder is a plain run folder, or the working copy of a URL (`origin`); workers are then given the URL alone. An adapter
is named by `located` as a path, or as `<url>#<hash>`: its two files lie in the store under the hash of their contents, so that
what a worker is told to load never changes under it.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_ensemble.errors import InputError
from ray_ensemble.files import sha256_file, sha256_json, whole_folder
from ray_ensemble.storage.mirror import Mirror
from ray_ensemble.storage.sources import bring_new
from ray_ensemble.storage.store import store_at
from ray_ensemble.storage.url import is_url, without_settings
from ray_ensemble.storage.working_copy import SHARED, origin

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


# On the driver -------------------------------------------------------------------------------------------------------


def run_of(folder: Path) -> str:
    """The run as workers are told of it: the URL that `folder` is a copy of, or its path."""
    return origin(folder) or str(folder)


def located(folder: Path, adapter: Path) -> str:
    """A saved adapter as workers are told of it.

    Args:
        folder: the driver's run folder.
        adapter: the adapter's folder.

    Raises:
        InputError: a file of the adapter is missing.
        RunError: the store does not answer.
    """
    url = origin(folder)
    if url is None:
        return str(adapter)
    digest = _digest(adapter)
    store, below = store_at(url), f"{SHARED}/{digest}"
    there = store.list(below)
    for name in reversed(ADAPTER_FILES):  # the small one last
        if f"{below}/{name}" not in there:
            store.put(f"{below}/{name}", adapter / name)
    return f"{url}#{digest}"


def bring(folder: Path, *below: str) -> None:
    """Bring what workers put up below some names; nothing to do where they see the folder."""
    url = origin(folder)
    if url is None:
        return
    store = store_at(url)
    bring_new(store, folder, {at: about for name in below for at, about in store.list(name).items()})


def drop(folder: Path, name: str) -> None:
    """Remove a folder of the run, here and in the store."""
    shutil.rmtree(folder / name, ignore_errors=True)
    url = origin(folder)
    if url is not None:
        store_at(url).delete_below(name)


def train_storage(folder: Path) -> dict[str, Any]:
    """Where Ray Train keeps checkpoints: the arguments of its `RunConfig`."""
    url = origin(folder)
    if url is None:
        return {"storage_path": str((folder / "checkpoints").resolve())}
    store = store_at(url)
    return {"storage_path": store.path("checkpoints"), "storage_filesystem": store.filesystem}


# On workers ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunCopy:
    """A worker's part of the run folder; `send` puts up what is new in it, where it is a copy."""

    folder: Path
    send: Callable[[], object]


@contextmanager
def run_copy(run: str, below: Sequence[str]) -> Iterator[RunCopy]:
    """The run folder as a worker writes to it: the folder itself, or a temporary copy that is put up as it grows.

    Args:
        run: what `run_of` gave.
        below: names in the run folder that the worker reads; of a URL, they are brought down first.

    Raises:
        InputError, RunError: the store refuses, or does not answer.
    """
    if not is_url(run):
        yield RunCopy(Path(run), lambda: None)
        return
    with tempfile.TemporaryDirectory(prefix="ray-ensemble-") as temporary:
        folder = Path(temporary, without_settings(run).rpartition("/")[2])  # some loggers show its name
        mirror = Mirror(store_at(run), folder, lambda name: True)
        for name in below:
            mirror.pull(lambda found: True, name)
        with mirror.pushing():
            yield RunCopy(folder, mirror.push)


def adapter_copy(adapter: str | Path) -> Path:
    """A folder on this machine with the adapter that `located` named.

    Raises:
        InputError: the store's files are not those that were named.
        RunError: the store does not answer.
    """
    from ray_ensemble.tasks import cache_dir  # which reads configs, which may name URLs

    if not is_url(adapter):
        return Path(adapter)
    url, digest = parts_of(str(adapter))
    target = cache_dir() / "adapters" / digest
    if not target.is_dir():
        store = store_at(url)
        with whole_folder(target) as temporary:
            for name in ADAPTER_FILES:
                store.get(f"{SHARED}/{digest}/{name}", temporary / name)
            if _digest(temporary) != digest:
                raise InputError(f"{store.where(f'{SHARED}/{digest}')}: damaged (it is not the adapter of that hash)")
    return target


def parts_of(adapter: str) -> tuple[str, str]:
    """URL and hash of an adapter in a store."""
    url, _, digest = adapter.rpartition("#")
    if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
        raise InputError(f"{url}: names no adapter")
    return url, digest


def _digest(adapter: Path) -> str:
    missing = [name for name in ADAPTER_FILES if not (adapter / name).is_file()]
    if missing:
        raise InputError(f"{adapter / missing[0]}: missing, so that workers cannot be given this adapter")
    return sha256_json({name: sha256_file(adapter / name) for name in ADAPTER_FILES})
