"""An S3 server of moto's in a process of its own on loopback, with made-up credentials in the environment."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

FAKE = {
    "AWS_ACCESS_KEY_ID": "planted-access-key-of-the-tests",
    "AWS_SECRET_ACCESS_KEY": "planted-secret-key-of-the-tests",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_REGION": "us-east-1",
}


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The server's address. pyarrow would dead-lock with one in this process, since a closing stream holds Python's lock."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    log = (tmp_path_factory.mktemp("s3") / "log.txt").open("wb")
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], stdout=log, stderr=log
    )
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"{address}/moto-api/", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None, "the S3 server did not start"
                assert time.monotonic() < deadline, "the S3 server does not answer"
                time.sleep(0.1)
        yield address
    finally:
        server.kill()
        server.wait()
        log.close()


@pytest.fixture(scope="session")
def bucket(s3_server: str) -> str:
    """A bucket there."""
    request = urllib.request.Request(f"{s3_server}/runs", method="PUT", headers={"Host": s3_server.partition("//")[2]})
    urllib.request.urlopen(request, timeout=10).close()
    return "runs"


@pytest.fixture
def s3(s3_server: str, bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A URL of a folder that is not there yet; the server is found by the environment, and the cache is the test's own."""
    for name, value in FAKE.items():
        monkeypatch.setenv(name, value)
    for name in [name for name in os.environ if name.startswith("AWS_") and name not in FAKE]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("RAY_ENSEMBLE_CACHE", str(tmp_path / "cache"))
    return f"s3://{bucket}/{uuid.uuid4().hex}/first"


@pytest.fixture(params=["s3", pytest.param("file", marks=pytest.mark.slow), "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A URL of a folder that is not there yet: by pyarrow to a server and to this disk, and by fsspec."""
    if request.param == "s3":
        found: str = request.getfixturevalue("s3")
        return found
    monkeypatch.setenv("RAY_ENSEMBLE_CACHE", str(tmp_path / "cache"))
    return f"file://{tmp_path}/bucket/first" if request.param == "file" else f"memory://{uuid.uuid4().hex}/first"
