"""Models and data at URLs, brought to the cache of each node that needs them."""

from __future__ import annotations

import os
from pathlib import Path

from ray_ensemble.errors import InputError
from ray_ensemble.storage.store import Store, Stored, store_at
from ray_ensemble.storage.url import without_settings
from ray_ensemble.storage.working_copy import cache_of


def source_files(url: str) -> Path:
    """A local copy of the folder or the file that is at a URL; what changed there since is brought again.

    Raises:
        InputError: nothing is there, or the URL is not right.
        RunError: the store does not answer.
    """
    store = store_at(url)
    target = cache_of("sources", store.url) / without_settings(store.url).rpartition("/")[2]
    there = store.list()
    if there:
        bring_new(store, target, there)
        left = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()} - set(there)
        for name in left:
            if not name.endswith(".tmp"):  # another process on this node may be bringing it
                (target / name).unlink(missing_ok=True)
        return target
    about = store.about("")
    if about is None:
        raise InputError(f"{without_settings(store.url)}: there is no such folder or object")
    if not _is_same(target, about):
        _bring(store, "", target, about)
    return target


def bring_new(store: Store, folder: Path, there: dict[str, Stored]) -> None:
    """Bring what `folder` does not have as it is there; files get the objects' times, by which that is told."""

    new = [name for name, about in there.items() if not _is_same(folder / name, about)]
    store.each(lambda name: _bring(store, name, folder / name, there[name]), new)


def _bring(store: Store, name: str, target: Path, about: Stored) -> None:
    store.get(name, target)
    if about.written is not None:
        os.utime(target, ns=(about.written, about.written))


def _is_same(file: Path, about: Stored) -> bool:
    try:
        found = file.stat()
    except OSError:
        return False
    return (found.st_size, found.st_mtime_ns) == (about.size, about.written)
