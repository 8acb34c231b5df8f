"""A local copy of the objects of a store, and what is new in it put up while the work goes on.

What is finished goes up every few seconds, so that a process that is killed loses no more than that. Data go before the JSON
files that describe them; objects whose file has gone are deleted last. Manifests are not the mirror's business: `RunFolder` puts
one when all else of its stage is up.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ray_ensemble.errors import InputError, RunError
from ray_ensemble.storage.store import Store

PUSH_SECONDS = 5.0
_LAST = ("result.json", "info.json")  # say that what is beside them is whole

Known = dict[str, tuple[int, int]]  # name -> size and time of the local file when it was last the same as the object
Stat = tuple[int, int]


class Mirror:
    """A folder and the store that it is a copy of. One process at a time writes either.

    Args:
        store: the objects.
        folder: the copy.
        pushed: whether a file of this name goes up, and its object is deleted once the file is.
        known: what is known to be the same in both.
    """

    def __init__(self, store: Store, folder: Path, pushed: Callable[[str], bool], known: Known | None = None) -> None:
        self.store, self.folder = store, folder
        self.known: Known = dict(known or {})
        self._pushed = pushed
        self._lock = threading.Lock()
        self._told: str | None = None

    def pull(self, wanted: Callable[[str], bool], below: str = "") -> None:
        """Bring objects that are not here as they are there; a file that changed since it was last the same is kept.

        Args:
            wanted: whether an object of this name is.
            below: only look below this name.
        """
        with self._lock:
            stored = {name: about for name, about in self.store.list(below).items() if wanted(name)}

            def bring(name: str) -> None:
                target, about = self.folder / name, stored[name]
                self.store.get(name, target)
                if about.written is not None:
                    os.utime(target, ns=(about.written, about.written))  # rates are told by the files' times

            missing = [name for name, about in stored.items() if not self._is_kept(name, about.size)]
            self.store.each(bring, missing)
            self.known.update({name: stat for name in missing if (stat := _stat(self.folder / name)) is not None})

    def refetch(self, name: str) -> bool:
        """Bring an object again over a file that is missing or damaged; False if there is no such object."""
        with self._lock:
            if self.store.about(name) is None:
                return False
            self.store.get(name, self.folder / name)
            stat = _stat(self.folder / name)
            if stat is not None:
                self.known[name] = stat
            return True

    def push(self) -> bool:
        """Put up what is new, and delete what has gone; whether there was anything."""
        with self._lock:
            here = self._files()
            new = [name for name, stat in here.items() if self.known.get(name) != stat]
            for wave in range(3):
                self.store.each(lambda name: self._put(name, here[name]), [n for n in new if _wave(n) == wave])
            gone = [name for name in self.known if name not in here and self._pushed(name)]
            if gone and not self.folder.is_dir():
                raise RunError(
                    f"{self.folder}: was removed while it was in use; {self.store.where('')} keeps what it has"
                )
            self._delete(gone)
            return bool(new or gone)

    @contextmanager
    def pushing(self, push: Callable[[], object] | None = None) -> Iterator[None]:
        """Push every few seconds within the block, and at its end, also when it ends by an error, by `push` if given."""
        push = push or self.push
        stop = threading.Event()

        def run() -> None:
            while not stop.wait(PUSH_SECONDS):
                try:
                    push()
                    self._told = None
                except (InputError, RunError) as error:
                    # The end of the stage tries again, and says so if it fails.
                    self._tell(str(error))

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            yield
        except BaseException:
            stop.set()
            thread.join()
            try:
                push()
            except (InputError, RunError) as error:  # what ended the block is told instead
                self._tell(str(error))
            raise
        finally:
            stop.set()
            thread.join()
        push()

    def _tell(self, text: str) -> None:
        if text != self._told:
            print(f"{text}; what is finished waits in {self.folder}", flush=True)
            self._told = text

    def _is_kept(self, name: str, size: int) -> bool:
        stat = _stat(self.folder / name)
        if stat is None:
            return False
        if self.known.get(name) != stat:
            return self._pushed(name)  # newer than the object: it goes up with the next push
        return stat[0] == size

    def _files(self) -> dict[str, Stat]:
        found = {}
        for parent, folders, names in os.walk(self.folder):
            below = Path(parent).relative_to(self.folder)
            folders[:] = [name for name in folders if not _is_temporary(name)]
            for file in names:
                name = (below / file).as_posix()
                if _is_temporary(file) or not self._pushed(name):
                    continue
                stat = _stat(self.folder / name)
                if stat is not None:
                    found[name] = stat
        return found

    def _put(self, name: str, stat: Stat) -> None:
        source = self.folder / name
        try:
            self.store.put(name, source)
        except FileNotFoundError:
            if source.exists():
                raise
            return  # replaced or removed since it was seen: the next push sees what became of it
        self.known[name] = stat

    def _delete(self, gone: list[str]) -> None:
        # Whole folders in one request where nothing of them is left.
        tops = {name: self._gone_folder(name) for name in gone}
        folders = {top for top in tops.values() if top is not None}
        for top in sorted(folders):
            self.store.delete_below(top)
        self.store.delete(name for name, top in tops.items() if top is None)
        for name in gone:
            del self.known[name]

    def _gone_folder(self, name: str) -> str | None:
        """The highest folder of a name, below the first level, that is no longer here."""
        parts = name.split("/")[:-1]
        for depth in range(1, len(parts) + 1):
            at = "/".join(parts[:depth])
            if not (self.folder / at).exists() and self._pushed(f"{at}/x"):
                return at
        return None


def clear(folder: Path) -> None:
    """Empty a folder, or make it."""
    folder.mkdir(parents=True, exist_ok=True)
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _wave(name: str) -> int:
    if name.rpartition("/")[2] in _LAST:
        return 2
    return 1 if name.endswith(".json") else 0


def _is_temporary(name: str) -> bool:
    return name.startswith((".probe-",)) or (name.startswith(".") and name.endswith(".tmp"))


def _stat(path: Path) -> Stat | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns
