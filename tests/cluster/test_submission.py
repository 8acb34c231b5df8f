"""Submissions that never reach a cluster: what is refused, and that nothing secret is in what would be sent."""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from tiny import write_task

from ray_ensemble import submission as submission_module
from ray_ensemble import submit
from ray_ensemble.cli import main
from ray_ensemble.errors import InputError, RunError
from ray_ensemble.job_metadata import submission_metadata, without_secrets
from ray_ensemble.job_package import pack_job
from ray_ensemble.submission import LogReader, Submission, entrypoint, runtime_env
from ray_ensemble.version import __version__

SECRETS = {
    "HF_TOKEN": "hf_planted0123456789",
    "WANDB_API_KEY": "wandb-planted-0123456789",
    "AWS_SECRET_ACCESS_KEY": "aws/planted+0123456789",
    "RAY_AUTH_TOKEN": "ray-planted-0123456789",
}


@pytest.fixture
def job(tmp_path) -> Path:
    write_task(tmp_path / "films")
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({"model": {"source": "a/b"}, "tasks": ["films"]}))
    return tmp_path / "job.yaml"


@pytest.fixture
def nowhere() -> str:
    """An address where nothing listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


@pytest.mark.parametrize("output", ["runs/first", "./first"])
def test_an_output_that_is_no_absolute_path_is_refused(job, output):
    with pytest.raises(InputError, match=r"--output .*every node"):
        submit(job, address="http://127.0.0.1:1", output=output)


@pytest.mark.parametrize(
    "given", ["HF_TOKEN=hf_Planted0123456789", "hf_Planted-012", "hf_Planted0123456789", "UExhbnRlZA==", ""]
)
def test_values_of_variables_are_refused_and_not_repeated(job, given, capsys, monkeypatch):
    """Also a value that could be a name, as a shell makes it of `--env $HF_TOKEN`."""
    monkeypatch.setenv("HF_TOKEN", "hf_Planted0123456789")
    arguments = ["submit", str(job), "--address", "http://127.0.0.1:1", "--output", "/runs/a", "--env", given]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "only the name of a variable" in error
    assert not [value for value in ("Planted", "UExhbnRlZA") if value in error]


def test_no_server_is_told_by_the_address_that_was_given(job, nowhere, monkeypatch, capsys):
    """Also where RAY_ADDRESS names another cluster, which Ray would take instead."""
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:2")
    with pytest.raises(InputError, match=f"--address {nowhere}: no Ray job server answers there .*{nowhere}"):
        submit(job, address=nowhere, output="/runs/a")
    assert f"{job.parent / 'films'}: sent with the job" in capsys.readouterr().err.replace("\n", "")


@given(st.text(max_size=60), st.lists(st.lists(st.integers(0, 60), max_size=5), max_size=5))
def test_a_log_is_written_once_however_often_it_is_cut(log, attempts):
    """Each attempt reads the log from its start in pieces, up to some place; the last one reads all of it."""
    reader, written = LogReader(), ""
    for cuts in [*attempts, [len(log)]]:
        reader.restart()
        places = [0, *sorted(min(cut, len(log)) for cut in cuts)]
        for start, end in itertools.pairwise(places):
            written += reader.new(log[start:end])
    assert written == log


@pytest.mark.parametrize("address", ["127.0.0.1:8265", "ray://127.0.0.1:10001", "auto"])
def test_other_kinds_of_addresses_are_refused(job, address):
    with pytest.raises(InputError, match="expected http://"):
        submit(job, address=address, output="/runs/a")


@pytest.mark.parametrize("content", [None, "", " \n"])
def test_a_token_file_that_is_missing_or_empty_is_named(job, nowhere, tmp_path, monkeypatch, content):
    token = tmp_path / "token"
    if content is not None:
        token.write_text(content)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    with pytest.raises(InputError, match=f"RAY_AUTH_TOKEN_PATH {token}"):
        submit(job, address=nowhere, output="/runs/a")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--address", "http://127.0.0.1:1"],
        ["--address", "http://127.0.0.1:1", "--attach", "a", "--cancel", "a"],
        ["job.yaml", "--address", "http://127.0.0.1:1", "--cancel", "a"],
        ["job.yaml", "--address", "http://127.0.0.1:1"],
    ],
)
def test_wrong_use_is_told(arguments, capsys):
    assert main(["submit", *arguments]) == 2
    assert "ray-ensemble: submit: " in capsys.readouterr().err


def test_the_address_is_needed(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["submit", "job.yaml", "--output", "/runs/a"])
    assert caught.value.code == 2


def test_nothing_of_the_environment_is_sent(job, tmp_path, monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    folder = tmp_path / "package"
    folder.mkdir()
    package = pack_job(job, ["training.seed=1"], folder)
    environment = runtime_env(package, tmp_path / "wheel")
    command = entrypoint("/runs/a b", package, list(SECRETS), redo=True)
    assert set(environment) == {"working_dir", "py_modules"}
    content = json.dumps(environment) + command + "".join(p.read_text() for p in folder.rglob("*") if p.is_file())
    assert not [name for name, value in SECRETS.items() if value in content]
    assert command == (
        f"exec python -m ray_ensemble.submitted --output '/runs/a b' --inputs {package.digest} --env HF_TOKEN "
        "--env WANDB_API_KEY --env AWS_SECRET_ACCESS_KEY --env RAY_AUTH_TOKEN --redo"
    )


def test_metadata_name_the_run_its_base_and_its_tasks(tmp_path):
    write_task(tmp_path / "data" / "films")
    write_task(tmp_path / "data" / "phones")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    tasks = ["data", "hf:a/b", "/on/the/cluster"]
    wanted = {"ray_ensemble_run": "first", "ray_ensemble_output": "/runs/first", "ray_ensemble_version": __version__}
    for model, shown, chosen, count in [
        ("./model", "model", tasks, "at least 4"),
        ("a/b", "a/b", tasks[:2], "3"),
        ("s3://bucket/m?region=eu-1", "s3://bucket/m", ["hf:a/b"], "1"),
    ]:
        (tmp_path / "job.yaml").write_text(yaml.safe_dump({"model": {"source": model}, "tasks": chosen}))
        folder = tmp_path / f"package-{count}"
        folder.mkdir()
        found = submission_metadata("/runs/first", pack_job(tmp_path / "job.yaml", [], folder))
        assert found == {**wanted, "ray_ensemble_model": shown, "ray_ensemble_tasks": count}


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("s3://key:secret@bucket/run?versionId=secret", "s3://bucket/run"),
        ("s3://bucket/run#secret", "s3://bucket/run"),
        ("https://host/a@b", "https://host/a@b"),
        ("/runs/who@where?", "/runs/who@where?"),
        ("pypi:evals==3.0.1/a.jsonl", "pypi:evals==3.0.1/a.jsonl"),
    ],
)
def test_urls_are_shown_without_what_may_be_a_key(source, shown):
    assert without_secrets(source) == shown


class Flaky:
    """A job server whose log is cut off: what each request for it gives, and the clock's time then."""

    def __init__(self, events, clock):
        self.events, self.clock = list(events), clock

    async def tail_job_logs(self, _):
        wait, what = self.events.pop(0)
        self.clock[0] += wait
        if isinstance(what, Exception):
            raise what
        yield what

    def get_job_info(self, _):
        return SimpleNamespace(status=SimpleNamespace(is_terminal=lambda: not self.events))


@pytest.mark.parametrize(
    ("events", "ends"),
    [
        ([(0, "a\n"), (3600, RuntimeError("closed")), (1, "a\nb\n")], True),  # after an hour without a word
        ([(0, "a\n"), (0, RuntimeError("closed")), (59, RuntimeError("refused")), (0, "a\nb\n")], True),
        ([(0, RuntimeError("closed")), (61, RuntimeError("refused")), (0, "a\nb\n")], False),
    ],
)
def test_following_ends_after_a_minute_without_an_answer_and_not_before(events, ends, monkeypatch):
    clock, written = [0.0], []

    async def no_pause(_):
        return None

    monkeypatch.setattr(submission_module.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(submission_module.asyncio, "sleep", no_pause)
    following = Submission("http://127.0.0.1:1", "a")._tail(Flaky(events, clock), written.append)
    if not ends:
        with pytest.raises(RunError, match="is silent"):
            asyncio.run(following)
        return
    asyncio.run(following)
    assert "".join(written) == "a\nb\n"
