"""Ray Serve and Ray Data on a run made by hand: the example's client, bulk files, and what an overload gets."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from run_by_hand import write_run

from ray_ensemble.cli import main
from ray_ensemble.config import ServingConfig
from ray_ensemble.ensemble import Predictor
from ray_ensemble.errors import InputError

pytest.importorskip("starlette")
pytestmark = [pytest.mark.ray, pytest.mark.slow]

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def run(tiny_model, task_folder, tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("served") / "run", tiny_model, task_folder)


@pytest.fixture(scope="module")
def rows(task_folder) -> list[dict]:
    """700 rows of all tasks: several batches."""
    texts = [
        {"task": path.name, "text": json.loads(line)["text"]}
        for path in sorted(task_folder.iterdir())
        for line in (path / "test.jsonl").read_text().splitlines()
    ]
    return [{**texts[i % len(texts)], "text": f"{texts[i % len(texts)]['text']} {i}"} for i in range(700)]


def test_the_client_of_the_example(run):
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "serve_client.py"), str(run)],
        capture_output=True,
        text=True,
        timeout=1100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "200 requests over 4 datasets" in done.stdout
    assert "all as predict says" in done.stdout


@pytest.mark.timeout(1200)
def test_too_many_requests_get_503_and_the_rest_their_answers(run):
    sys.path.insert(0, str(EXAMPLES))
    try:
        import serve_client
    finally:
        sys.path.remove(str(EXAMPLES))
    port = serve_client.free_port()
    command = serve_client.verb("serve", str(run), "--port", str(port), "--batch-size", "1", "--queue", "2")
    server = subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "RAY_ENSEMBLE_TOKEN": "x"})
    try:
        asyncio.run(serve_client.healthy(f"http://127.0.0.1:{port}", server, 600))
        os.environ["RAY_ENSEMBLE_TOKEN"] = "x"
        asked = serve_client.mixed_rows(str(run), 200)
        answers = asyncio.run(statuses(f"http://127.0.0.1:{port}", asked))
        server.send_signal(signal.SIGTERM)
        assert server.wait(120) == 0
    finally:
        os.environ.pop("RAY_ENSEMBLE_TOKEN", None)
        if server.poll() is None:
            server.kill()
    assert set(answers) == {200, 503}


async def statuses(url: str, rows: list[dict]) -> list[int]:
    import aiohttp

    headers = {"Authorization": "Bearer x"}
    async with aiohttp.ClientSession(headers=headers, connector=aiohttp.TCPConnector(limit=0)) as session:

        async def one(row: dict) -> int:
            async with session.post(f"{url}/predict", json=row) as response:
                await response.read()
                return response.status

        return await asyncio.gather(*map(one, rows))


def test_a_file_in_bulk_is_answered_in_its_order(run, rows, ray_cluster, tmp_path, capsys):
    source, target = tmp_path / "rows.jsonl", tmp_path / "answers.jsonl"
    source.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    assert main(["predict", str(run), "--input", str(source), "--output", str(target)]) == 0
    found = [json.loads(line) for line in target.read_text().splitlines()]
    expected = Predictor(run).predict([(row["task"], row) for row in rows])
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["label"] == theirs["label"]
        assert ours["probabilities"] == pytest.approx(theirs["probabilities"], abs=1e-5)
    # All rows of one task, to standard output, by merged adapters.
    films = [row["text"] for row in rows if row["task"] == "films"]
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in films))
    capsys.readouterr()
    assert main(["predict", str(run), "--task", "films", "--merged", "--input", str(source)]) == 0
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    expected = Predictor(run, ["films"], merged=True).predict([("films", {"text": text}) for text in films])
    assert [answer["label"] for answer in shown] == [answer["label"] for answer in expected]


def test_actors_that_cannot_start_leave_no_output(run, rows, ray_cluster, tmp_path, capsys):
    import shutil

    broken = Path(shutil.copytree(run, tmp_path / "broken"))
    (broken / "adapters" / "group-1" / "adapter_model.safetensors").write_bytes(b"no tensors")
    source, target = tmp_path / "rows.jsonl", tmp_path / "answers.jsonl"
    source.write_text(json.dumps(rows[0]) + "\n" + json.dumps({"task": "films", "text": "x"}) + "\n")
    assert main(["predict", str(broken), "--input", str(source), "--output", str(target)]) in (1, 2)
    assert "group-1" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir() if "answers" in path.name] == []


def test_a_cluster_that_serves_already_keeps_its_address_and_serves_one_run(ray_cluster, capsys):
    from ray import serve

    from ray_ensemble.serving import server

    class Other:
        async def __call__(self, _: object) -> str:
            return "other"

    config = ServingConfig(port=8123)
    assert server._address(config, asks_token=True) == "http://127.0.0.1:8123"
    try:
        serve.run(serve.deployment(Other).bind(), name="other", route_prefix="/other")
        assert "8123" not in server._address(config, asks_token=False)
        assert "whoever reaches it can use the run" in capsys.readouterr().err
        serve.run(serve.deployment(Other).bind(), name="ray-ensemble", route_prefix="/")
        with pytest.raises(InputError, match="serves a run already"):
            server._address(config, asks_token=True)
    finally:
        serve.shutdown()
