"""Requests over HTTP without Ray: the endpoint's answers are the predictor's, and what is wrong is refused with a reason."""

from __future__ import annotations

import asyncio
import hashlib
import json
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from run_by_hand import write_run

from ray_ensemble.cli import main
from ray_ensemble.config import ServingConfig, serving_config
from ray_ensemble.ensemble import Predictor
from ray_ensemble.ensemble.prediction import PredictedTask
from ray_ensemble.errors import InputError
from ray_ensemble.serving import Refused, check_row, parse_body, tasks_of
from ray_ensemble.serving.server import check_address

pytest.importorskip("starlette")
from starlette.requests import Request as HttpRequest

TASKS = {
    "films": PredictedTask("Review: {text}\nAnswer:", ("text",), ("no", "yes")),
    "pairs": PredictedTask("{first} or {second}?", ("first", "second"), ("a", "b", "c")),
    "odd": PredictedTask("{task}:", ("task",), ("a", "b")),
}
Answer = tuple[int, Any, dict[str, str]]
LOOP = asyncio.new_event_loop()  # one for all tests: a batch queue stays in the loop that it began in


@pytest.fixture(scope="module")
def run(tiny_model, task_folder, tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("serving") / "run", tiny_model, task_folder)


@pytest.fixture(autouse=True)
def replica(monkeypatch) -> None:
    """The one thing that Ray's batch queue wants to know of the replica that it is in."""
    context = SimpleNamespace(_deployment_config=SimpleNamespace(max_ongoing_requests=1000))
    monkeypatch.setattr("ray.serve.get_replica_context", lambda: context)


@pytest.fixture(scope="module")
def rows(task_folder) -> list[dict[str, Any]]:
    """Rows of all tasks, one of each in turn."""
    texts = {
        path.name: [json.loads(line)["text"] for line in (path / "test.jsonl").read_text().splitlines()]
        for path in sorted(task_folder.iterdir())
    }
    return [{"task": task, "text": found[i]} for i in range(5) for task, found in texts.items()]


def endpoint(run: Path, token: str | None = None, **changes: Any) -> Any:
    from ray_ensemble.serving.application import Endpoint

    token_hash = None if token is None else hashlib.sha256(token.encode()).hexdigest()
    return Endpoint(str(run), ServingConfig(**{"batch_wait": 0.2, **changes}), 1, token_hash)


@pytest.fixture(scope="module")
def served(run) -> Any:
    return endpoint(run, max_rows=50, max_body_bytes=5000)


async def call(target: Any, path: str, body: bytes = b"", method: str = "POST", **headers: str) -> Answer:
    """One HTTP request as a server hands it to an application: in pieces, and with or without its length told."""
    pieces = [body[i : i + 1000] for i in range(0, len(body), 1000)] or [b""]
    sent = iter(pieces)

    async def receive() -> dict[str, Any]:
        piece = next(sent)
        return {"type": "http.request", "body": piece, "more_body": piece is not pieces[-1]}

    scope = {
        "type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
        "scheme": "http", "server": ("127.0.0.1", 8000),
        "headers": [(name.lower().replace("_", "-").encode(), value.encode()) for name, value in headers.items()],
    }  # fmt: skip
    response = await target(HttpRequest(scope, receive))
    return response.status_code, json.loads(response.body), dict(response.headers)


def ask(target: Any, path: str, body: bytes = b"", method: str = "POST", **headers: str) -> Answer:
    return LOOP.run_until_complete(call(target, path, body, method, **headers))


def test_requests_of_many_tasks_at_once_get_the_predictors_answers(run, rows, monkeypatch):
    """One batch for all, in which a row that cannot be answered harms no other."""
    target = endpoint(run, batch_size=64)
    calls = []
    predict = target._predictor.predict
    monkeypatch.setattr(target._predictor, "predict", lambda asked: calls.append(len(asked)) or predict(asked))

    async def all_at_once() -> list[Answer]:
        bodies = [json.dumps(row).encode() for row in rows] + [json.dumps(rows).encode()]
        return await asyncio.gather(*(call(target, "/predict", body) for body in bodies))

    *single, together = LOOP.run_until_complete(all_at_once())
    expected = Predictor(run).predict([(row["task"], row) for row in rows])
    for status, answer, _ in single:
        assert status == 200, answer
    assert together[0] == 200
    for found in ([answer for _, answer, _ in single], together[1]):
        assert [answer["label"] for answer in found] == [answer["label"] for answer in expected]
        for ours, theirs in zip(found, expected, strict=True):
            assert ours["probabilities"] == pytest.approx(theirs["probabilities"], abs=1e-5)
    assert calls == [2 * len(rows)]


def test_a_row_that_only_the_tokenizer_refuses_harms_no_other(served, rows, monkeypatch):
    predict = served._predictor.predict

    def predict_but_one(asked: Any) -> Any:
        for number, (_, fields) in enumerate(asked, start=1):
            if fields["text"] == "bad":
                raise InputError(f"request {number}: no tokens")
        return predict(asked)

    monkeypatch.setattr(served._predictor, "predict", predict_but_one)

    async def both() -> list[Answer]:
        bodies = [rows[0], {"task": "films", "text": "bad"}, rows[1]]
        return await asyncio.gather(*(call(served, "/predict", json.dumps(body).encode()) for body in bodies))

    good, bad, other = LOOP.run_until_complete(both())
    assert (good[0], bad[0], other[0]) == (200, 422, 200)
    assert bad[1] == {"error": "no tokens"}
    status, answer, _ = ask(served, "/predict", json.dumps([rows[0], {"task": "films", "text": "bad"}]).encode())
    assert (status, answer) == (422, {"error": "row 2: no tokens"})


MALFORMED = [
    (b"", 400, "not JSON"),
    (b"{", 400, "not JSON"),
    (b'{"task": "films", "text": NaN}', 400, "NaN"),
    (b"\xff", 400, "UTF-8"),
    (b"[" * 4000, 400, ""),
    (b"3", 422, "expected an object"),
    (b"null", 422, "expected an object"),
    (b'["x"]', 422, "row 1: expected an object"),
    (b"{}", 422, "no 'task'"),
    (b'{"task": 3, "text": "x"}', 422, "name of a dataset"),
    (b'{"task": "filmes", "text": "x"}', 422, "did you mean 'films'?"),
    (b'{"task": "\\ud800", "text": "x"}', 422, 'no task "\\ud800"'),
    (b'{"task": "films"}', 422, "no field 'text'"),
    (b'{"task": "films", "txet": "x"}', 422, "no field 'text'"),
    (b'{"task": "films", "text": null}', 422, "neither text nor a number"),
    (b'{"task": "films", "text": true}', 422, "neither text nor a number"),
    (b'{"task": "films", "text": ["x"]}', 422, "neither text nor a number"),
    (b'{"task": "films", "text": "\\ud800"}', 422, "surrogate"),
    (b'[{"task": "films", "text": "x"}, {"task": "films"}]', 422, "row 2: no field"),
    (b"[" + b",".join([b"{}"] * 51) + b"]", 413, "51 rows"),
    (b'{"task": "films", "text": "' + b"x" * 5000 + b'"}', 413, "too long"),
]


@pytest.mark.parametrize(("body", "status", "reason"), MALFORMED)
def test_malformed_requests_are_told_why(served, body, status, reason):
    for headers in ({}, {"content_length": str(len(body))}):
        found, answer, _ = ask(served, "/predict", body, **headers)
        assert found == status, answer
        assert list(answer) == ["error"]
        assert reason in answer["error"]


def test_a_value_too_deep_to_be_shown_is_refused_like_others(run):
    value: Any = []
    for _ in range(100_000):
        value = [value]
    with pytest.raises(InputError, match="neither text nor a number, but what is nested too deeply"):
        check_row({"task": "films", "text": value}, tasks_of(run))
    while value:  # else it is taken down recursively
        value = value[0]


def test_other_paths_and_methods(served):
    assert ask(served, "/healthz", method="GET")[:2] == (200, {"status": "ok"})
    status, answer, _ = ask(served, "/tasks", method="GET")
    assert status == 200
    films = next(task for task in answer["tasks"] if task["name"] == "films")
    assert films == {"name": "films", "prompt": "Review: {text}\nAnswer:", "fields": ["text"], "labels": ["no", "yes"]}
    assert ask(served, "/", method="GET")[0] == 404
    status, answer, headers = ask(served, "/predict", method="GET")
    assert (status, headers["allow"]) == (405, "POST")
    assert "POST" in answer["error"]


def test_with_a_token_all_but_health_needs_it(run, rows):
    target = endpoint(run, token="secret word")
    body = json.dumps(rows[0]).encode()
    for path, method in (("/predict", "POST"), ("/tasks", "GET")):
        for headers in (
            {},
            {"authorization": "secret word"},
            {"authorization": "Bearer x"},
            {"authorization": "Bearer "},
        ):
            status, answer, found = ask(target, path, body, method, **headers)
            assert status == 401
            assert "Bearer" in answer["error"]
            assert found["www-authenticate"] == "Bearer"
        assert ask(target, path, body, method, authorization="Bearer secret word")[0] == 200
    assert ask(target, "/healthz", method="GET")[0] == 200


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
    | st.sampled_from(["films", "pairs", "odd"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["task", "text", "first", "second"]) | st.text(max_size=3), inner, max_size=4),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(JSON)
def test_whatever_json_comes_it_is_parsed_or_refused(data):
    """What passes holds text or numbers for exactly the fields of a known prompt."""
    try:
        requests, listed = parse_body(json.dumps(data).encode(), TASKS, 10)
    except Refused as refused:
        assert 400 <= refused.status < 500  # noqa: PT017
        assert str(refused)  # noqa: PT017
        return
    assert listed == isinstance(data, list)
    for name, fields in requests:
        assert tuple(fields) == TASKS[name].fields
        assert all(isinstance(value, str | int | float) for value in fields.values())


def test_a_field_called_task(tmp_path):
    with pytest.raises(InputError, match="predict --task odd"):
        check_row({"task": "odd"}, TASKS)
    assert check_row({"task": "x"}, TASKS, "odd") == ("odd", {"task": "x"})


def test_a_port_in_use_and_wrong_options_are_refused(run, capsys):
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # as Ray's own proxy has it
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"--port {port}"):
            check_address(serving_config({"port": port}))
        assert main(["serve", str(run), "--port", str(port)]) == 2
    check_address(serving_config({"port": port}))
    capsys.readouterr()
    for options in (["--port", "0"], ["--replicas", "0"], ["--batch-size", "0"], ["--batch-wait", "-1"]):
        assert main(["serve", str(run), *options]) == 2
        assert options[0] in capsys.readouterr().err
    assert main(["serve", str(run / "nothing")]) == 2


def test_an_empty_token_is_a_mistake(run, monkeypatch, capsys):
    monkeypatch.setenv("RAY_ENSEMBLE_TOKEN", "")
    assert main(["serve", str(run)]) == 2
    assert "RAY_ENSEMBLE_TOKEN" in capsys.readouterr().err


def test_rows_of_a_file_are_checked_before_anything_runs(run, tmp_path, capsys):
    """No Ray: these end before it would start."""
    path, output = tmp_path / "rows.jsonl", tmp_path / "answers.jsonl"
    good = json.dumps({"task": "films", "text": "x"})
    cases = [("{", "2: not a JSON"), ('{"task": "films"}', "2: no field 'text'"), ('{"text": "x"}', "2: no 'task'")]
    for line, word in cases:
        path.write_text(f"{good}\n{line}\n")
        assert main(["predict", str(run), "--input", str(path), "--output", str(output)]) == 2
        assert f"{path}:{word}" in capsys.readouterr().err
    path.write_text("\n\n")
    assert main(["predict", str(run), "--input", str(path)]) == 2
    assert main(["predict", str(run), "--task", "filmes", "--input", str(path)]) == 2
    assert "did you mean 'films'?" in capsys.readouterr().err
    assert main(["predict", str(run), "--input", str(tmp_path / "none")]) == 2
    assert main(["predict", str(run), "--output", str(output)]) == 2
    assert not output.exists()


def test_tasks_are_known_without_the_model(run):
    assert tasks_of(run) == Predictor(run, ["films", "phones", "contrary", "options"]).tasks
