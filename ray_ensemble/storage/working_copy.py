"""The driver's local copy of a run at a URL: brought down when the run is opened, put up as it grows.

It is kept in the cache and holds nothing that the store does not have: it may be deleted whenever no run is open. Where another
run was there since, it is dropped and brought down anew.
"""

from __future__ import annotations

import json
import re
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray_ensemble.errors import InputError, RunError
from ray_ensemble.files import sha256_json, write_json
from ray_ensemble.storage.lease import LEASE, Lease
from ray_ensemble.storage.mirror import Known, Mirror, clear
from ray_ensemble.storage.store import Store
from ray_ensemble.storage.url import checked_url, without_settings

MARKER = ".store.json"  # in a working copy: what it is a copy of
SHARED = "shared"  # adapters that workers load, under the hash of their contents
_SESSION = "session.json"  # which opening of the run was the last
_WORKERS = ("checkpoints", "trained", "tensorboard", "wandb")  # what training workers put up themselves
# Ray Tune's own state, but the results that tell how many trials there are: a new cluster makes the trials again from known fits.
_TUNE = re.compile(r"search/(scale-[^/]+/)?tune/(?![^/]+/result\.json$)")


class WorkingCopy:
    """A run at a URL, opened by its one owner: `folder` is the local copy."""

    def __init__(self, store: Store, folder: Path, lease: Lease) -> None:
        self.store, self.folder, self._lease = store, folder, lease
        self._session = uuid.uuid4().hex
        self._mirror = Mirror(store, folder, _is_pushed)
        self._pushing = threading.Lock()

    def open(self) -> None:
        """Bring down what is there."""
        shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)  # what workers had told an earlier run
        marker = _read_marker(self.folder)
        if marker is None or self.store.read(_SESSION) != _session(marker["session"]):
            clear(self.folder)
        else:
            self._mirror.known = {name: (size, time) for name, (size, time) in marker["files"].items()}
        self._mirror.pull(_is_pulled)
        there = self.store.list("manifests")
        for manifest in (self.folder / "manifests").glob("*.json"):
            if f"manifests/{manifest.name}" not in there:  # a kill came between the two
                manifest.unlink()
        self._remember()
        self.store.write(_SESSION, _session(self._session))

    @contextmanager
    def pushing(self) -> Iterator[None]:
        """Put up what is new while the block runs, and when it ends."""
        with self._mirror.pushing(self.push):
            yield

    def push(self) -> None:
        """Put up what is new, now.

        Raises:
            RunError: the store does not answer, or another run took the folder over.
        """
        with self._pushing:
            self._lease.confirm()
            if not (self.folder / MARKER).is_file():  # else all would be taken for deleted
                raise RunError(
                    f"{self.folder}: was removed while the run is open; {self.store.where('')} keeps what it has"
                )
            if self._mirror.push():
                self._remember()

    def finish(self, manifest: str) -> None:
        """Put up what is new, and then the manifest that makes it whole."""
        self.push()
        self.store.put(manifest, self.folder / manifest)

    def forget(self, manifests: list[str]) -> None:
        """Delete manifests, before anything of their stages is changed."""
        self._lease.confirm()
        self.store.delete(manifests)

    def refetch(self, name: str) -> bool:
        """Bring an object over a local file that is missing or damaged; False if there is none."""
        return self._mirror.refetch(name)

    def _remember(self) -> None:
        write_json(
            self.folder / MARKER,
            {
                "url": self.store.url,
                "folder": str(self.folder),
                "session": self._session,
                "files": self._mirror.known,
            },
        )


@contextmanager
def opened(url: str, started: Callable[[int], str | None], expires: float) -> Iterator[WorkingCopy]:
    """Own the run at a URL within the block, through a local copy.

    Args:
        url: of the run folder.
        started: as for `Lease`.
        expires: likewise.

    Raises:
        InputError: the URL is not right, another living run owns the folder, or the store refuses it.
        RunError: the store does not answer.
    """
    store = Store(url)
    lease = Lease(store, started, expires=expires)
    with lease.held():
        copy = WorkingCopy(store, place_of(store.url) / "work", lease)
        copy.open()
        with copy.pushing():
            yield copy
        store.delete_below(SHARED)


def place_of(url: str) -> Path:
    """Where copies of a run at a URL are kept on this machine."""
    return cache_of("runs", checked_url(url))


def cache_of(kind: str, url: str) -> Path:
    """A folder of the cache for what is at a checked URL."""
    from ray_ensemble.tasks import cache_dir  # which reads configs, which may name URLs

    name = re.sub(r"[^A-Za-z0-9._-]+", "-", without_settings(url).rpartition("/")[2])[:40]
    return cache_dir() / kind / f"{name}-{sha256_json(url)[:16]}"


def origin(folder: Path) -> str | None:
    """The URL that a folder is the working copy of, or None for a run folder of its own."""
    marker = _read_marker(folder)
    return None if marker is None else str(marker["url"])


def refuse_working_copy(folder: Path) -> None:
    """Raise `InputError` where a local copy is taken for a run folder."""
    url = origin(folder)
    if url is not None:
        raise InputError(f"{folder}: is a copy of {without_settings(url)} and goes with it; give the URL")


def _session(identity: str) -> bytes:
    return json.dumps({"id": identity}).encode()


def _read_marker(folder: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        # A copy that was moved or copied elsewhere is a folder like any other.
        if found["folder"] != str(folder.resolve()):
            return None
        known: Known = found["files"]
        return {"url": str(found["url"]), "session": str(found["session"]), "files": known}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _is_pushed(name: str) -> bool:
    top = name.partition("/")[0]
    return (
        top not in (*_WORKERS, "manifests", SHARED, MARKER, _SESSION, LEASE)
        and not top.startswith("clock-")
        and _TUNE.match(name) is None
    )


def _is_pulled(name: str) -> bool:
    top = name.partition("/")[0]
    return _is_pushed(name) or top in ("manifests", "trained")
