"""What may be a run folder's URL. Credentials never are part of it: a URL is shown, logged and kept in files."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import parse_qsl, urlencode, urlsplit

from ray_ensemble.errors import InputError

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_SETTINGS = ("endpoint_override", "region", "scheme")  # of a query; whatever else there is could be a secret
_USERS = ("abfs", "abfss", "hdfs", "wasb", "wasbs")  # whose addresses have a container or an account's name before '@'
_UNSAFE = re.compile(r"[\\\x00-\x1f\x7f]")
_HOW = (
    "credentials come from the environment of the nodes or from a file mounted there (AWS_SHARED_CREDENTIALS_FILE, "
    "GOOGLE_APPLICATION_CREDENTIALS, the machine's role), never from the URL"
)


def is_url(place: object) -> bool:
    """Whether a run folder is given by URL and not as a path."""
    return isinstance(place, str) and _URL.match(place) is not None


def checked_url(url: str) -> str:
    """The URL of a run folder in the one form that it is compared by; a query may hold `endpoint_override`, `region`, `scheme`.

    Raises:
        InputError: it holds what may be a credential (which is not repeated), names no folder, or leads elsewhere.
    """
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        raise InputError("a run folder's URL cannot be read; expected such as s3://bucket/runs/first") from None
    scheme = parts.scheme.lower()
    address = parts.netloc.rpartition("@")[2]
    shown = f"{scheme}://{address}{parts.path}"
    if parts.password is not None or (parts.username is not None and scheme not in _USERS):
        raise InputError(f"{shown}: the URL holds a user or password; {_HOW}")
    query = parse_qsl(parts.query, keep_blank_values=True)
    for key, value in query:
        if key not in _SETTINGS:  # it may be a secret itself
            raise InputError(f"{shown}: of settings after '?' only {', '.join(_SETTINGS)} are taken; {_HOW}")
        if "@" in value:
            raise InputError(f"{shown}: '{key}' holds a user or password; {_HOW}")
    if parts.fragment:
        raise InputError(f"{shown}: a run folder's URL has no part after '#'")
    if scheme == "file" and parts.netloc:
        raise InputError(f"{shown}: a file URL has three slashes, file:///…, and no host")
    path = parts.path.rstrip("/")
    if not path.strip("/"):
        raise InputError(f"{shown}: names no folder; give one below the bucket, such as {shown.rstrip('/')}/runs/first")
    if not is_safe(path.removeprefix("/")) or re.search(r"[\s%]", path):
        raise InputError(f"{shown}: not a plain path (no '..', empty part, blank, '%' or '\\')")
    ending = f"?{urlencode(sorted(query), safe=':/')}" if query else ""
    return f"{scheme}://{parts.netloc}{path}{ending}"


def without_settings(url: str) -> str:
    """A checked URL without its query, as messages show it; a path as it is."""
    return url.partition("?")[0] if is_url(url) else url


def is_safe(name: str) -> bool:
    """Whether joining an object's name to a folder stays inside that folder."""
    return not _UNSAFE.search(name) and not any(part in {"", ".", ".."} for part in name.split("/"))


def run_place(place: str | Path) -> str | Path:
    """A run folder as it was given: a checked URL, or a path."""
    return checked_url(str(place)) if is_url(place) else Path(place)
