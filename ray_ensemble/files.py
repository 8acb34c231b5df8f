"""Files that are whole or absent: every write goes to a temporary name beside the target and is then renamed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_ensemble.errors import InputError


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on leaving without an error it replaces `path`, else it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on leaving without an error it takes the place of `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    temporary.chmod(0o755)
    try:
        yield temporary
        if path.exists():
            shutil.rmtree(path)
        temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what kills left half written anywhere below `folder`; nobody else may be writing there."""
    for path in list(folder.rglob(".*.tmp")):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, data: Any) -> None:
    """Write `data` as indented JSON, whole or not at all; NaN and infinities are refused (they are not JSON)."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path, what: str = "file") -> Any:
    """Read JSON; a missing or damaged file is an `InputError` that names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: this {what} is missing") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: this {what} cannot be read as JSON ({error})") from None


def read_mapping(path: Path, what: str, key: str, kind: type) -> dict[str, Any]:
    """Read JSON that is an object with a `key` of some kind; another is an `InputError` that names the file."""
    data = read_json(path, what)
    if not isinstance(data, dict) or not isinstance(data.get(key), kind):
        raise InputError(f"{path}: there is no '{key}' in this {what}")
    return data


def write_array(path: Path, array: NDArray[Any]) -> None:
    """Write one array as `.npy` (never pickled), whole or not at all."""
    with whole_file(path) as temporary, temporary.open("wb") as stream:
        np.save(stream, array, allow_pickle=False)


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def file_harm(path: Path, digest: str) -> str | None:
    """What is wrong with a file that has a recorded SHA-256, or None."""
    if not path.is_file():
        return "missing"
    return None if sha256_file(path) == digest else "damaged (its SHA-256 is not the recorded one)"


def sha256_json(data: Any) -> str:
    """SHA-256 over the canonical JSON (sorted keys, no blanks) of `data`."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def jsonl_appender(path: Path) -> Callable[[dict[str, Any]], None]:
    """Return a function that appends one JSON object a line to `path` and flushes it."""
    path.parent.mkdir(parents=True, exist_ok=True)

    def append(row: dict[str, Any]) -> None:
        with path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row, allow_nan=False) + "\n")

    return append
