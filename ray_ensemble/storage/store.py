"""The objects below a URL, by name: listed, brought and put whole, deleted. Through pyarrow, or what fsspec knows beyond it.

An object is put under its own name in one go where the store makes it visible only when it is whole (S3, Google, Azure), else
under a temporary name that is then moved. What looks transient is tried again a bounded number of times.
"""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qsl

from ray_ensemble.errors import InputError, RunError
from ray_ensemble.files import whole_file
from ray_ensemble.storage.url import checked_url, is_safe, without_settings

PARALLEL = 16  # transfers at once: each mostly waits for the network
_TRIES = 4
_PAUSE_S = 1.0  # before the second try; doubled from then on
_S3_WAIT_S = 15.0  # without a byte from S3, until one of its client's attempts is given up
_S3_ATTEMPTS = 2  # that the client makes in one of our tries; by itself it would make ten, which takes minutes
_ATOMIC = ("s3", "gcs", "abfs")  # by pyarrow's type_name: a put object is there whole, or not at all
_REFUSED = (
    "NO_SUCH_BUCKET",
    "ACCESS_DENIED",
    "INVALID_ACCESS_KEY_ID",
    "SIGNATURE_DOES_NOT_MATCH",
    "INVALID_CLIENT_TOKEN_ID",
    "EXPIRED_TOKEN",
    "UNRECOGNIZED_CLIENT",
    "MISSING_AUTHENTICATION_TOKEN",
    "HTTP response code 401",
    "HTTP response code 403",
    "PERMISSION_DENIED",
    "UNAUTHENTICATED",
    "AuthenticationFailed",
    "AuthorizationFailure",
)

Result = TypeVar("Result")


@dataclass(frozen=True)
class Stored:
    """An object: its size in bytes, and when it was written, in nanoseconds by the store's clock (None: it does not tell)."""

    size: int
    written: int | None


class Store:
    """The objects below one URL.

    Args:
        url: of a folder; see `checked_url`.

    Raises:
        InputError: the URL is not right, or no library here knows its scheme. All methods: the store refuses the request
            (credentials, bucket).
        RunError: all methods: the store did not answer, after several tries.
    """

    def __init__(self, url: str) -> None:
        self.url = checked_url(url)
        self.filesystem, self.base = self._tried("opened", "", lambda: _resolve(self.url))
        self._atomic = self.filesystem.type_name in _ATOMIC
        self._local = self.filesystem.type_name == "local"

    def where(self, name: str) -> str:
        """An object as messages name it."""
        shown = without_settings(self.url)
        return f"{shown}/{name}" if name else shown

    def path(self, name: str) -> str:
        """An object's path in `filesystem`; no name is what the URL itself names.

        Raises:
            InputError: the name leads out of the folder.
        """
        if not name:
            return str(self.base)
        if not is_safe(name):
            raise InputError(f"{self.where('')}: the object name {name!r} leads out of the folder; it is not used")
        return f"{self.base}/{name}"

    def list(self, below: str = "") -> dict[str, Stored]:
        """All objects below a name, or the one of that name; or all there are.

        Raises:
            InputError: the name of one of them leads out of the folder.
        """
        from pyarrow.fs import FileSelector, FileType

        at = self.path(below)
        selector = FileSelector(at, recursive=True, allow_not_found=True)
        found = {}
        for info in self._tried("listed", below, lambda: self._infos(selector)):
            name = info.path.removeprefix(self.base).removeprefix("/")
            if info.type != FileType.File or (info.base_name.startswith(".") and name.endswith(".tmp")):
                continue
            self.path(name)
            found[name] = _stored(info)
        if not found and below and (about := self.about(below)) is not None:
            found[below] = about
        return found

    def about(self, name: str) -> Stored | None:
        """Size and time of one object, or None where there is none."""
        from pyarrow.fs import FileType

        path = self.path(name)
        info = self._tried("looked up", name, lambda: self.filesystem.get_file_info(path))
        return _stored(info) if info.type == FileType.File else None

    def read(self, name: str) -> bytes | None:
        """The bytes of a small object, or None where there is none."""
        path = self.path(name)

        def read() -> bytes:
            with self.filesystem.open_input_stream(path) as stream:
                found: bytes = stream.read()
                return found

        try:
            return self._tried("read", name, read)
        except FileNotFoundError:
            return None

    def get(self, name: str, target: Path) -> None:
        """Bring an object to `target`, whole or not at all.

        Raises:
            InputError: it is missing.
        """
        from pyarrow.fs import LocalFileSystem, copy_files

        path = self.path(name)
        try:
            with whole_file(target) as temporary:
                self._tried("read", name, lambda: copy_files(path, str(temporary), self.filesystem, LocalFileSystem()))
        except FileNotFoundError:
            raise InputError(f"{self.where(name)}: this object is missing") from None

    def put(self, name: str, source: Path) -> None:
        """Put a file under a name, whole or not at all."""
        from pyarrow.fs import LocalFileSystem, copy_files

        def put(target: str) -> None:
            copy_files(str(source), target, LocalFileSystem(), self.filesystem)

        self._put(name, put, lambda temporary: shutil.copyfile(source, temporary))

    def write(self, name: str, data: bytes) -> None:
        """Put a few bytes under a name, whole or not at all."""

        def put(target: str) -> None:
            with self.filesystem.open_output_stream(target) as stream:
                stream.write(data)

        self._put(name, put, lambda temporary: temporary.write_bytes(data))

    def delete(self, names: Iterable[str]) -> None:
        """Delete objects; those that are not there are passed over."""

        def delete(name: str) -> None:
            path = self.path(name)
            try:
                self._tried("deleted", name, lambda: self.filesystem.delete_file(path))
            except FileNotFoundError:
                return

        self.each(delete, names)

    def delete_below(self, name: str) -> None:
        """Delete all objects below a name."""
        if not name:
            raise ValueError("the whole folder is not deleted")
        path = self.path(name)
        try:
            self._tried("deleted", name, lambda: self.filesystem.delete_dir(path))
        except FileNotFoundError:
            return

    def open(self, name: str) -> Any:
        """An object as a seekable stream, to read parts of it. Close it."""
        path = self.path(name)
        return self._tried("read", name, lambda: self.filesystem.open_input_file(path))

    def each(self, action: Callable[[str], None], names: Iterable[str]) -> None:
        """Do something with many objects, several at once; the first error is raised when those under way are through."""
        wanted = list(names)
        if not wanted:
            return
        with ThreadPoolExecutor(min(PARALLEL, len(wanted))) as threads:
            futures = [threads.submit(action, name) for name in wanted]
            try:
                for future in futures:
                    future.result()
            finally:
                for future in futures:
                    future.cancel()

    def _infos(self, selector: Any) -> Any:
        try:
            return self.filesystem.get_file_info(selector)
        except NotADirectoryError:
            return []  # an object has none below it

    def _put(self, name: str, put: Callable[[str], Any], put_here: Callable[[Path], Any]) -> None:
        path = self.path(name)
        if self._local:

            def put_file() -> None:
                with whole_file(Path(path)) as temporary:
                    put_here(temporary)

            self._tried("written", name, put_file)
            return
        if self._atomic:
            self._tried("written", name, lambda: put(path))
            return
        folder, _, last = path.rpartition("/")

        def put_and_move() -> None:
            temporary = f"{folder}/.{last}.{uuid.uuid4().hex}.tmp"
            self.filesystem.create_dir(folder, recursive=True)
            put(temporary)
            self.filesystem.move(temporary, path)

        self._tried("written", name, put_and_move)

    def _tried(self, done: str, name: str, action: Callable[[], Result]) -> Result:
        where = self.where(name)
        for attempt in range(_TRIES):
            try:
                return action()
            except (FileNotFoundError, InputError):
                raise
            except Exception as error:  # what fsspec opens raises the errors of many libraries
                if isinstance(error, PermissionError) or any(mark in str(error) for mark in _REFUSED):
                    raise InputError(f"{where}: cannot be {done}: the store refuses it ({_cause(error)})") from None
                if attempt + 1 == _TRIES:
                    raise RunError(
                        f"{where}: cannot be {done}, tried {_TRIES} times ({_cause(error)}); the same command goes on once the "
                        "store answers"
                    ) from None
            time.sleep(_PAUSE_S * 2**attempt)
        raise AssertionError("the last try returns or raises")


@lru_cache(maxsize=64)
def store_at(url: str) -> Store:
    """The store of a URL, made once in a process."""
    return Store(url)


def _stored(info: Any) -> Stored:
    return Stored(int(info.size or 0), info.mtime_ns)


def _cause(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def _resolve(url: str) -> tuple[Any, str]:
    """pyarrow's filesystem for a URL, and the path there."""
    from pyarrow import ArrowInvalid
    from pyarrow.fs import FileSystem, FSSpecHandler, PyFileSystem

    scheme = url.partition("://")[0]
    try:
        filesystem, path = FileSystem.from_uri(url)
    except ArrowInvalid as error:
        if "Unrecognized filesystem type" not in str(error):
            raise InputError(f"{without_settings(url)}: not a URL that can be opened ({_cause(error)})") from None
        import fsspec

        try:
            found, path = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as missing:
            raise InputError(
                f"{without_settings(url)}: neither pyarrow nor fsspec opens '{scheme}' here ({_cause(missing)})"
            ) from None
        filesystem = PyFileSystem(FSSpecHandler(found))
    if filesystem.type_name == "s3":
        filesystem = _s3(url, filesystem.region)
    return filesystem, path.rstrip("/")


def _s3(url: str, region: str) -> Any:
    """S3 as the URL's settings and the environment have it, with waits that end in reasonable time."""
    from pyarrow.fs import AwsStandardS3RetryStrategy, S3FileSystem

    settings = dict(parse_qsl(url.partition("?")[2]))
    endpoint = settings.get("endpoint_override")
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):
        endpoint = endpoint or os.environ.get(name)
    return S3FileSystem(
        region=region,
        endpoint_override=endpoint or None,
        scheme=settings.get("scheme", "https"),
        connect_timeout=_S3_WAIT_S,
        request_timeout=_S3_WAIT_S,
        retry_strategy=AwsStandardS3RetryStrategy(max_attempts=_S3_ATTEMPTS),
    )
