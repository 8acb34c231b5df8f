"""Models and data at URLs, and jobs whose data are put there."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from tiny import write_task

from ray_ensemble.config import load_config
from ray_ensemble.errors import InputError
from ray_ensemble.job_package import JobPackage, pack_job
from ray_ensemble.storage import Store
from ray_ensemble.submission import _checked_output, _next_id, entrypoint
from ray_ensemble.submitted import put_inputs
from ray_ensemble.tasks import load_tasks, resolve_source


def put_all(url: str, folder: Path) -> None:
    store = Store(url)
    for path in folder.rglob("*"):
        if path.is_file():
            store.put(path.relative_to(folder).as_posix(), path)


def test_tasks_at_a_url_are_those_of_the_folder(url, tmp_path):
    write_task(tmp_path / "tasks" / "films", seed=1)
    write_task(tmp_path / "tasks" / "phones", seed=2)
    put_all(url, tmp_path / "tasks")
    found = []
    for source in (url, str(tmp_path / "tasks")):
        (tmp_path / "job.yaml").write_text(yaml.safe_dump({"model": {"source": "a/b"}, "tasks": [source]}))
        config = load_config(tmp_path / "job.yaml")
        found.append(load_tasks(config.tasks, config.limits, tmp_path))
    assert found[0] == found[1]
    assert config.tasks[0].source != url


def test_a_file_and_what_changed_there(url, tmp_path):
    store = Store(url)
    store.write("a/rows.jsonl", b"one")
    store.write("a/old.jsonl", b"x")
    assert resolve_source(f"{url}/a/rows.jsonl", tmp_path).read_bytes() == b"one"
    assert {path.name for path in resolve_source(f"{url}/a", tmp_path).iterdir()} == {"rows.jsonl", "old.jsonl"}
    store.write("a/rows.jsonl", b"other")
    store.delete(["a/old.jsonl"])
    folder = resolve_source(f"{url}/a", tmp_path)
    assert (folder / "rows.jsonl").read_bytes() == b"other"
    assert [path.name for path in folder.iterdir()] == ["rows.jsonl"]
    with pytest.raises(InputError, match=f"{url}/none: there is no such folder or object"):
        resolve_source(f"{url}/none", tmp_path)


@pytest.mark.parametrize("place", ["model", "task"])
def test_credentials_in_a_job_file_are_refused_and_not_repeated(tmp_path, place):
    secret = "s3://bucket/data?secret_key=planted"
    job = {"model": {"source": secret if place == "model" else "a/b"}, "tasks": [secret]}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    with pytest.raises(InputError, match="never from the URL") as caught:
        load_config(tmp_path / "job.yaml")
    assert "planted" not in str(caught.value)


def test_a_later_session_of_ray_gets_the_same_config_at_a_url(url, tmp_path):
    write_task(tmp_path / "films")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({"model": {"source": "./model"}, "tasks": ["films"]}))
    configs = []
    for session in ("one", "two"):
        (tmp_path / session).mkdir()
        package = pack_job(tmp_path / "job.yaml", [], tmp_path / session)
        configs.append(load_config(put_inputs(package, url)))
        shutil.rmtree(package.folder)
    assert configs[0] == configs[1]
    source = configs[0].tasks[0].source
    assert source.startswith(f"{url}.inputs/{package.digest}/inputs/")
    assert configs[0].model.source.startswith(f"{url}.inputs/{package.digest}/inputs/")
    assert resolve_source(source, tmp_path).name == "films"
    assert (resolve_source(source, tmp_path) / "train.jsonl").read_bytes() == (
        tmp_path / "films" / "train.jsonl"
    ).read_bytes()


def test_submissions_to_a_url():
    url = "s3://bucket/runs/My first?endpoint_override=127.0.0.1:9000"
    with pytest.raises(InputError, match="not a plain path"):
        _checked_output(url)
    url = "s3://bucket/runs/My-first?endpoint_override=127.0.0.1:9000&scheme=http"
    assert _checked_output(url) == url
    assert _next_id(url, [], "http://127.0.0.1:1").startswith("ray-ensemble-my-first-")
    assert url in entrypoint(url, JobPackage(Path("/x"), None), [], False)
    for bad in ("s3://key:planted@bucket/run", "s3://bucket/run?secret_key=planted"):
        with pytest.raises(InputError) as caught:
            _checked_output(bad)
        assert "planted" not in str(caught.value)
