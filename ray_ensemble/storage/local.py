"""A folder of this machine's file systems, or of one that machines share, as a lease sees it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ray_ensemble.errors import RunError
from ray_ensemble.files import whole_file
from ray_ensemble.storage.store import Stored


class LocalFolder:
    """The files right below a folder, which need not be there yet.

    Raises:
        RunError: all methods but `where`: the file system refuses it, such as a full disk.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def where(self, name: str) -> str:
        """A file as messages name it."""
        return str(self._path / name if name else self._path)

    def about(self, name: str) -> Stored | None:
        """Size and time of a file, by the clock of the file system; None where there is none."""
        try:
            found = (self._path / name).stat()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._failure(name, "looked up", error) from None
        return Stored(found.st_size, found.st_mtime_ns)

    def read(self, name: str) -> bytes | None:
        """The bytes of a file, or None where there is none."""
        try:
            return (self._path / name).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._failure(name, "read", error) from None

    def write(self, name: str, data: bytes) -> None:
        """Put a few bytes into a file, whole or not at all."""
        try:
            with whole_file(self._path / name) as temporary:
                temporary.write_bytes(data)
        except OSError as error:
            raise self._failure(name, "written", error) from None

    def delete(self, names: Iterable[str]) -> None:
        """Delete files; those that are not there are passed over."""
        for name in names:
            try:
                (self._path / name).unlink(missing_ok=True)
            except OSError as error:
                raise self._failure(name, "deleted", error) from None

    def _failure(self, name: str, done: str, error: OSError) -> RunError:
        return RunError(f"{self.where(name)}: cannot be {done} ({error.strerror})")
