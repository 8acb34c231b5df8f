"""Objects by name: round trips, wholeness, refusals, and what is told when a store refuses or is silent."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ray_ensemble.storage.store as module
from ray_ensemble.errors import InputError, RunError
from ray_ensemble.storage import Store, checked_url, is_safe, is_url

NAMES = st.lists(st.text("abc.-_01", min_size=1, max_size=6), min_size=1, max_size=3).map("/".join).filter(is_safe)


@pytest.fixture
def store(url: str) -> Store:
    return Store(url)


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(module, "_PAUSE_S", 0.01)


def put(store: Store, tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / "source").write_bytes(data)
    store.put(name, tmp_path / "source")


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=NAMES, data=st.binary(max_size=2000))
def test_bytes_come_back_as_they_were(store, tmp_path, name, data):
    store.delete_below(name)
    for other in store.list():  # a name cannot be a folder too
        if other.startswith(f"{name}/") or name.startswith(f"{other}/"):
            store.delete([other])
    put(store, tmp_path, name, data)
    store.get(name, tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == data == store.read(name)
    assert store.list()[name].size == store.about(name).size == len(data)
    store.write(name, data[::-1])
    assert store.read(name) == data[::-1]
    store.delete([name, name])
    assert name not in store.list()
    assert store.about(name) is None
    assert store.read(name) is None
    with pytest.raises(InputError, match="this object is missing"):
        store.get(name, tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == data, "what was there before was spoiled"


@pytest.mark.slow
def test_a_large_object_goes_in_parts(store, tmp_path):
    data = bytes(range(256)) * 2**17  # 32 MiB: several parts of an upload
    put(store, tmp_path, "large.bin", data)
    store.get("large.bin", tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == data


def test_a_folder_is_deleted_with_all_that_is_below_it_and_nothing_else(store, tmp_path):
    for name in ("a/b/1", "a/b/c/2", "a/bc", "d"):
        put(store, tmp_path, name, b"x")
    store.delete_below("a/b")
    store.delete_below("nothing/there")
    assert set(store.list()) == {"a/bc", "d"}
    assert set(store.list("a")) == {"a/bc"}
    assert store.list("none") == {}


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "a//b", ".", "a\\b", "a\nb"])
def test_names_that_lead_elsewhere_are_refused(store, tmp_path, name):
    for action in (store.read, store.about, lambda n: store.get(n, tmp_path / "t"), lambda n: store.write(n, b"")):
        with pytest.raises(InputError, match="leads out of the folder"):
            action(name)
    assert not (tmp_path / "t").exists()


def test_an_object_whose_own_name_leads_elsewhere_is_refused_by_name(s3, tmp_path):
    store = Store(s3)
    with store.filesystem.open_output_stream(f"{store.base}/adapters/..\\..\\x") as stream:
        stream.write(b"evil")
    with pytest.raises(InputError, match="leads out of the folder"):
        store.list()


@pytest.mark.parametrize("url", ["file", "memory"], indirect=True)
def test_a_put_that_is_cut_off_leaves_what_was_there(store, tmp_path, monkeypatch):
    """Where an object is written bit by bit, it is so under another name, which is no object."""
    put(store, tmp_path, "before", b"old")
    (tmp_path / "source").write_bytes(b"new")

    def fails(*_: object, **__: object) -> None:
        raise OSError("pulled the plug")

    monkeypatch.setattr("os.fsync", fails)
    monkeypatch.setattr("fsspec.implementations.memory.MemoryFileSystem.mv", fails)
    for name in ("before", "after"):
        with pytest.raises(RunError, match="pulled the plug"):
            store.put(name, tmp_path / "source")
    assert {name: store.read(name) for name in store.list()} == {"before": b"old"}


@pytest.mark.slow
def test_a_process_that_is_killed_while_it_puts_leaves_nothing_or_all(s3, tmp_path):
    size = 48 * 2**20
    with (tmp_path / "large").open("wb") as stream:
        stream.truncate(size)
    code = (
        "import sys\nfrom pathlib import Path\nfrom ray_ensemble.storage import Store\nstore = Store(sys.argv[1])\n"
        "print('now', flush=True)\nstore.put('large', Path(sys.argv[2]))\n"
    )
    for wait in (0.02, 0.2):
        process = subprocess.Popen(
            [sys.executable, "-c", code, s3, str(tmp_path / "large")], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "now\n"
        time.sleep(wait)
        process.kill()
        process.wait()
        found = Store(s3).about("large")
        assert found is None or found.size == size


def test_a_bucket_that_is_not_there_is_told_at_once(s3, monkeypatch):
    store = Store("s3://no-such-bucket/run")
    started = time.monotonic()
    with pytest.raises(
        InputError, match=r"^s3://no-such-bucket/run/a: cannot be written: the store refuses it .*NO_SUCH"
    ):
        store.write("a", b"")
    assert time.monotonic() - started < 30


@pytest.mark.slow
def test_a_silent_store_is_given_up_after_some_tries(s3, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    monkeypatch.setattr(module, "_TRIES", 2)
    store = Store(f"{s3}?endpoint_override=127.0.0.1:{port}&scheme=http")
    with pytest.raises(RunError, match=rf"^{s3}/a: cannot be read, tried 2 times .*connect"):
        store.read("a")


@pytest.mark.slow
def test_a_store_that_takes_connections_and_says_nothing_is_given_up(s3, monkeypatch):
    monkeypatch.setattr(module, "_TRIES", 2)
    monkeypatch.setattr(module, "_S3_WAIT_S", 1.0)
    with socket.create_server(("127.0.0.1", 0), backlog=100) as hole:
        store = Store(f"{s3}?endpoint_override=127.0.0.1:{hole.getsockname()[1]}&scheme=http")
        started = time.monotonic()
        with pytest.raises(RunError, match=rf"^{s3}/a: cannot be written, tried 2 times"):
            store.write("a", b"1")
        assert time.monotonic() - started < 60


def test_what_is_transient_is_tried_again(s3, tmp_path):
    """A port that drops connections until a real server's bytes are passed on behind it."""
    import os

    host, _, port = os.environ["AWS_ENDPOINT_URL"].removeprefix("http://").partition(":")
    dropped = []

    def serve(listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            if len(dropped) < 5:
                dropped.append(1)
                client.close()
                continue
            server = socket.create_connection((host, int(port)))
            for a, b in ((client, server), (server, client)):
                threading.Thread(target=_pass_on, args=(a, b), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        store = Store(f"{s3}?endpoint_override=127.0.0.1:{listener.getsockname()[1]}&scheme=http")
        store.write("a", b"kept")
        assert store.read("a") == b"kept"
    assert dropped


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            target.sendall(data)
    except OSError:
        pass
    target.close()


@pytest.mark.parametrize(
    "url",
    [
        "s3://AKIAPLANTED:planted@bucket/run",
        "s3://AKIAPLANTED@bucket/run",
        "sftp://me:planted@host/run",
        "https://ghp_planted@host/run",
        "s3://bucket/run?access_key=planted",
        "s3://bucket/run?secret_key=planted&region=eu-west-1",
        "s3://bucket/run?X-Amz-Signature=planted",
        "gs://bucket/run?planted",
        "s3://bucket/run?endpoint_override=http://me:planted@host:9000",
    ],
)
def test_credentials_in_a_url_are_refused_and_not_repeated(url):
    with pytest.raises(InputError, match="credentials come from the environment") as caught:
        checked_url(url)
    assert "planted" not in str(caught.value).lower()


@pytest.mark.parametrize("url", ["abfs://container@account.dfs.core.windows.net/run", "hdfs://me@host:8020/run"])
def test_a_name_that_is_part_of_an_address_is_none(url):
    assert checked_url(url) == url


@pytest.mark.parametrize(
    "url", ["s3://bucket", "s3://bucket/", "s3://b/../c", "s3://b/a//c", "s3://b/a b", "s3://b/a%2e", "file://host/x"]
)
def test_urls_that_name_no_plain_folder_are_refused(url):
    with pytest.raises(InputError):
        checked_url(url)


def test_one_place_has_one_url():
    assert checked_url("S3://bucket/run/") == checked_url("s3://bucket/run") == "s3://bucket/run"
    long = "s3://b/r?scheme=http&endpoint_override=127.0.0.1:9000"
    assert (
        checked_url(long) == checked_url(checked_url(long)) == "s3://b/r?endpoint_override=127.0.0.1:9000&scheme=http"
    )
    assert not is_url("/runs/first")
    assert not is_url(Path("runs/first"))


@pytest.mark.parametrize("scheme", ["nosuch", "gdrive"])
def test_a_scheme_that_nothing_knows_is_refused(scheme):
    with pytest.raises(InputError, match=f"neither pyarrow nor fsspec opens '{scheme}'"):
        Store(f"{scheme}://bucket/run")
