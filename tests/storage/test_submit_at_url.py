"""A job submitted with `--output s3://…`: the cluster goes in the middle of it, and another one ends it from what is there."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import requests
import yaml
from job_server import Head, bearer, started_head, write_job_beside_its_files, write_wheel

from ray_ensemble.status import run_status
from ray_ensemble.storage import Store, place_of

pytestmark = [pytest.mark.ray, pytest.mark.slow]
WAIT_S = 300.0


@pytest.fixture
def cluster(s3, monkeypatch):
    """Starts clusters whose nodes reach the store; those who submit have no key to it."""

    @contextmanager
    def started() -> Iterator[Head]:
        with started_head() as head, monkeypatch.context() as client:
            for name in [name for name in os.environ if name.startswith("AWS_")]:
                client.delenv(name)
            yield head

    return started


def test_a_new_cluster_ends_what_another_one_left_at_the_url(s3, cluster, tiny_model, tmp_path):
    job = write_job_beside_its_files(tmp_path / "job", tiny_model)
    wheel, store = write_wheel(tmp_path), Store(s3)
    keys = [os.environ[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")]
    with cluster() as head:
        code, told = head.submit(job, "--output", s3, "--wheel", wheel, "--no-follow")
        assert code == 0, told
        deadline = time.monotonic() + WAIT_S
        while store.read("manifests/gradients.json") is None:
            assert time.monotonic() < deadline, f"no gradients at the URL in {WAIT_S} s"
            time.sleep(0.5)
    assert store.read("metrics.json") is None, "the job was over before its cluster went"
    with cluster() as head:
        code, told = head.submit(job, "--output", s3, "--wheel", wheel, "--env", "AWS_SECRET_ACCESS_KEY")
        assert code == 0, told
        jobs = requests.get(f"{head.address}/api/jobs/", headers=bearer(), timeout=30).text
        assert not [key for key in keys if key in told + jobs]
    assert "gradients: done before" in told
    assert run_status(s3)["state"] == "finished"
    assert set(json.loads(store.read("metrics.json"))["tasks"]) == {"films", "contrary"}
    config = yaml.safe_load(store.read("config.yaml"))
    assert config["model"]["source"].startswith(f"{s3}.inputs/")
    for place in (store, Store(f"{s3}.inputs")):
        names = place.list()
        assert names
        assert not [name for name in names if any(key.encode() in (place.read(name) or b"") for key in keys)]
    assert not (place_of(s3) / "work").exists(), "who submits needs no copy of the run"
