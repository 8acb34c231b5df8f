"""An exported folder loads with peft and transformers alone, answers as the run does, and knows nothing of this machine."""

from __future__ import annotations

import http.server
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from run_by_hand import BOOSTING, write_run
from tokenizers.processors import TemplateProcessing

from ray_ensemble.cli import main
from ray_ensemble.ensemble import Predictor
from ray_ensemble.ensemble.export import VLLM_RANKS, export_run
from ray_ensemble.errors import InputError
from ray_ensemble.files import read_json, write_json

TEXT = {"text": "the film was a superb and lovely film"}


def finished(run: Path) -> Path:
    """Add to a run made by hand what an export reads of one that went through all stages."""
    plan, ensemble = read_json(run / "plan.json"), read_json(run / "ensemble.json")
    plan["model"]["hash"] = "a" * 64
    write_json(run / "plan.json", plan)
    ensemble["boosting"] = {**BOOSTING, "adapters": ["booster-0", "booster-1"]}
    write_json(run / "ensemble.json", ensemble)
    tasks = read_json(run / "tasks.json")["tasks"]
    sizes = {"train": 24, "validation": 8, "test": 10, "data_hash": "b" * 64}
    write_json(run / "tasks.json", {"tasks": [{**task, **sizes} for task in tasks]})
    names = [task["name"] for task in tasks]
    write_json(
        run / "partition.json",
        {"groups": [[name] for name in names], "m": 4, "objective": 0.5, "method": "sdp", "seed": 0},
    )
    metric = {"loss": 0.4321, "accuracy": 0.875, "n": 10}
    models = dict.fromkeys(("base", "qlora_all", "group", "ensemble", "merged"), metric)
    metrics = {"tasks": dict.fromkeys(names, models), "mean": models, "flops": {"ratio": 1.25}}
    write_json(run / "metrics.json", metrics)
    write_json(run / "manifests" / "evaluate.json", {"stage": "evaluate", "files": {}})
    write_json(run / "manifests" / "train.json", {"steps": dict.fromkeys(ensemble["adapters"], 16)})
    return run


@pytest.fixture(scope="module")
def run(tiny_model, task_folder, tmp_path_factory) -> Path:
    return finished(write_run(tmp_path_factory.mktemp("export") / "run", tiny_model, task_folder))


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory) -> Path:
    return export_run(run, tmp_path_factory.mktemp("exported") / "folder")


def test_what_is_in_the_folder(exported, run):
    files = {str(path.relative_to(exported)) for path in exported.rglob("*") if path.is_file()}
    folders = [f"merged/{task}" for task in ("contrary", "films", "options", "phones")]
    folders += [f"adapters/group-{g}" for g in range(4)] + [f"boosters/booster-{b}" for b in range(2)]
    adapters = {f"{f}/{file}" for f in folders for file in ("adapter_config.json", "adapter_model.safetensors")}
    assert files == adapters | {"README.md", "ensemble.json", "tasks.json", "predict.py", "serve_vllm.sh"}
    for folder in folders:
        name = f"{folder}/adapter_model.safetensors"
        assert (exported / name).read_bytes() == (run / name).read_bytes()


def test_nothing_of_this_machine_and_no_data(exported, run, tiny_model, task_folder):
    rows = [json.loads(line)["text"] for line in (task_folder / "films" / "train.jsonl").read_text().splitlines()]
    for path in exported.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            for secret in (str(tiny_model.parent), str(task_folder), str(run), os.path.expanduser("~"), *rows):
                assert secret.encode() not in content, (path, secret)
    config = json.loads((exported / "adapters" / "group-0" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny-llama"


@pytest.mark.parametrize("task", ["films", "options", "contrary"])
def test_predict_py_answers_as_the_run_does(exported, run, tiny_model, task):
    # The file that lies in the folder, not the module that it was made of.
    theirs = runpy.run_path(str(exported / "predict.py"))
    program = theirs["Exported"](exported, str(tiny_model))
    for merged in (False, True):
        ours = Predictor(run, [task], merged=merged).predict([(task, TEXT)])[0]["probabilities"]
        assert program.predict(task, TEXT, merged) == pytest.approx(ours, abs=2e-5)


@pytest.mark.parametrize("words", [10, 2000])
def test_predict_py_cuts_prompts_as_the_run_does(exported, run, tiny_model, words):
    fields = {"text": " ".join(["a lovely film and"] * words)}
    ours = Predictor(run, ["films"]).predict([("films", fields)])[0]["probabilities"]
    program = runpy.run_path(str(exported / "predict.py"))["Exported"](exported, str(tiny_model))
    assert program.predict("films", fields) == pytest.approx(ours, abs=2e-5)


def test_predict_py_leaves_out_an_end_that_the_tokenizer_appends(exported, tiny_model):
    program = runpy.run_path(str(exported / "predict.py"))["Exported"](exported, str(tiny_model))
    bare = program._encoded("{text}", {"text": "a film"}, 99)
    program.tokenizer._tokenizer.post_processor = TemplateProcessing(single="$A END", special_tokens=[("END", 5)])
    assert program.tokenizer("a film")["input_ids"] == [*bare, 5]
    program._end = program._appended()
    assert program._encoded("{text}", {"text": "a film"}, 99) == bare


def test_figures_of_another_ensemble_are_left_out(run, tmp_path):
    """The ensemble was made anew and not evaluated: metrics.json is that of before."""
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    (copy / "manifests" / "evaluate.json").unlink()
    card = (export_run(copy, tmp_path / "folder") / "README.md").read_text()
    assert "87.5%" not in card
    assert "not evaluated" in card


@pytest.mark.parametrize(
    "source", ["s3://acme/models/llama?endpoint_override=http://minio.acme:9000", "file:///home/me/llama"]
)
def test_a_base_at_a_url_is_named_by_its_last_part(run, tmp_path, source):
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    config = yaml.safe_load((copy / "config.yaml").read_text())
    config["model"]["source"] = source
    (copy / "config.yaml").write_text(yaml.safe_dump(config))
    folder = export_run(copy, tmp_path / "folder")
    assert "base_model" not in yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])
    for path in folder.rglob("*"):
        if path.is_file() and path.suffix != ".safetensors":
            assert not re.search(r"acme|minio|/home/me", path.read_text()), path
    assert json.loads((folder / "tasks.json").read_text())["base"]["source"] == "llama"


def test_an_output_below_a_file_is_refused(run, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["export", str(run), "--output", str(tmp_path / "file" / "sub")]) == 2
    assert "cannot be made" in capsys.readouterr().err


def test_a_warm_start_goes_with_the_ensembles_that_weigh_it(tiny_model, task_folder, tmp_path):
    run = finished(write_run(tmp_path / "run", tiny_model, task_folder, warm=True))
    folder = export_run(run, tmp_path / "exported")
    assert {path.name for path in (folder / "adapters").iterdir()} == {f"group-{g}" for g in range(4)}
    assert (folder / "start" / "adapter_model.safetensors").is_file()
    assert "| `start` | all |" in (folder / "README.md").read_text()
    program = runpy.run_path(str(folder / "predict.py"))["Exported"](folder, str(tiny_model))
    for task in ("films", "contrary"):  # with boosters and without
        ours = Predictor(run, [task]).predict([(task, TEXT)])[0]["probabilities"]
        assert program.predict(task, TEXT) == pytest.approx(ours, abs=2e-5)


def test_the_card_and_its_code(exported, tiny_model, monkeypatch):
    card = (exported / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    data = yaml.safe_load(front)
    assert data["library_name"] == "peft"
    assert "license" not in data
    assert "base_model" not in data  # a folder of this machine is nothing that the hub knows
    for word in (
        "87.5% / 0.432",
        "1.25",
        "`group-3`",
        "`bbbbbbbbbbbbbbbb`",
        "min_steps: 16",
        "Licences",
        "(A), (B), (C), (D)",
    ):
        assert word in body
    code = re.search(r"```python\n(.*?)```", body, re.DOTALL)[1].replace("path/to/the/base", str(tiny_model))
    monkeypatch.chdir(exported)
    found: dict[str, Any] = {}
    exec(code, found)
    ids = torch.arange(5, 17)[None]
    with found["model"].disable_adapter():
        bare = found["model"](input_ids=ids).logits
    assert (found["model"](input_ids=ids).logits - bare).abs().max() > 1e-3


def test_a_base_of_the_hub_is_named(run, tmp_path, tiny_model):
    config = yaml.safe_load((run / "config.yaml").read_text())
    before = (run / "config.yaml").read_text()
    config["model"]["source"] = "hf:HuggingFaceTB/SmolLM2-135M"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    try:
        folder = export_run(run, tmp_path / "folder")
    finally:
        (run / "config.yaml").write_text(before)
    assert (
        yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])["base_model"]
        == "HuggingFaceTB/SmolLM2-135M"
    )
    adapter = json.loads((folder / "merged" / "films" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M"
    assert 'BASE="${BASE:-HuggingFaceTB/SmolLM2-135M}"' in (folder / "serve_vllm.sh").read_text()


def test_the_vllm_script_hands_on_what_vllm_takes(exported, tmp_path):
    """Run with a stand-in for vLLM that writes down its arguments."""
    stand_in = tmp_path / "vllm"
    stand_in.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    stand_in.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "BASE": "some base"}
    command = ["sh", str(exported / "serve_vllm.sh"), "--port", "8001"]
    given = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    assert given[:3] == ["serve", "some base", "--enable-lora"]
    assert int(given[given.index("--max-lora-rank") + 1]) in VLLM_RANKS
    modules = [argument for argument in given if "=" in argument]
    ranks = []
    for module in modules:
        name, _, path = module.partition("=")
        ranks.append(json.loads((Path(path) / "adapter_config.json").read_text())["r"])
        assert name in path
    assert len(modules) == 10
    assert int(given[given.index("--max-lora-rank") + 1]) >= max(ranks)
    assert given[-2:] == ["--port", "8001"]
    del environment["BASE"]
    failed = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert failed.returncode != 0
    assert "set BASE" in failed.stderr


def test_a_target_in_use_and_an_unfinished_run_are_refused(run, exported, tmp_path, capsys):
    before = {path: path.stat().st_mtime_ns for path in exported.rglob("*")}
    assert main(["export", str(run), "--output", str(exported)]) == 2
    assert "not empty" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in exported.rglob("*")} == before
    assert main(["export", str(tmp_path / "none"), "--output", str(tmp_path / "x")]) == 2
    victim = run / "boosters" / "booster-1" / "adapter_model.safetensors"
    content = victim.read_bytes()
    victim.unlink()
    try:
        with pytest.raises(InputError, match="booster-1"):
            export_run(run, tmp_path / "partial")
    finally:
        victim.write_bytes(content)
    assert list(tmp_path.iterdir()) == []


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as a push asks of it; every file goes into the commit itself."""

    calls: list[tuple[str, str, bytes]]
    refuse = False

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        self.calls.append((self.path, self.headers.get("authorization", ""), body))
        address = f"http://127.0.0.1:{self.server.server_address[1]}/me/adapters"
        answer: dict[str, Any] = {}
        if self.refuse:
            self.send_response(403)
        else:
            self.send_response(200)
            if self.path.endswith("/repos/create"):
                answer = {"url": address, "name": "me/adapters", "id": "me/adapters"}
            elif "/preupload/" in self.path:
                asked = json.loads(body)["files"]
                answer = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]}
            elif "/commit/" in self.path:
                answer = {"commitUrl": f"{address}/commit/{'0' * 40}", "commitOid": "0" * 40, "success": True}
        self.end_headers_with(json.dumps(answer).encode())

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers_with(json.dumps({"id": "me/adapters", "sha": "1" * 40, "siblings": []}).encode())

    def end_headers_with(self, content: bytes) -> None:
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch):
    handler = type("Handler", (Hub,), {"calls": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setenv("HF_TOKEN", "hf_abc")
    yield handler
    server.shutdown()
    server.server_close()


def test_a_push_sends_the_folder_and_nothing_goes_out_without_the_flag(run, hub, tmp_path, capsys):
    assert main(["export", str(run), "--output", str(tmp_path / "plain")]) == 0
    assert hub.calls == []
    assert main(["export", str(run), "--output", str(tmp_path / "pushed"), "--push-to-hub", "me/adapters"]) == 0
    assert "pushed to" in capsys.readouterr().out
    created = next(json.loads(body) for path, _, body in hub.calls if path.endswith("/repos/create"))
    assert created.get("private") is True or created.get("visibility") == "private"
    assert {token for _, token, _ in hub.calls} == {"Bearer hf_abc"}
    commits = [body for path, _, body in hub.calls if "/commit/" in path]
    sent = {
        line["value"]["path"]
        for body in commits
        for line in map(json.loads, body.splitlines())
        if line["key"] == "file"
    }
    assert sent == {str(p.relative_to(tmp_path / "pushed")) for p in (tmp_path / "pushed").rglob("*") if p.is_file()}


def test_a_push_that_is_refused_leaves_the_folder(run, hub, tmp_path, capsys):
    hub.refuse = True
    assert main(["export", str(run), "--output", str(tmp_path / "folder"), "--push-to-hub", "me/adapters"]) == 1
    error = capsys.readouterr().err
    assert "hf upload me/adapters" in error
    assert "hf_abc" not in error
    assert (tmp_path / "folder" / "README.md").exists()


def test_a_push_that_cannot_be_is_refused_before_anything_is_written(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    for repository, word in (("me/adapters", "HF_TOKEN"), ("not a repository", "owner/name")):
        assert main(["export", str(run), "-o", str(tmp_path / "folder"), "--push-to-hub", repository]) == 2
        assert word in capsys.readouterr().err
    assert not (tmp_path / "folder").exists()


def test_predict_py_is_a_program(exported, tiny_model, monkeypatch, capsys):
    command = [str(exported / "predict.py"), "films", json.dumps(TEXT), "--base", str(tiny_model), "--merged"]
    monkeypatch.setattr(sys, "argv", command)
    runpy.run_path(command[0], run_name="__main__")
    assert sum(json.loads(capsys.readouterr().out.splitlines()[-1]).values()) == pytest.approx(1)
