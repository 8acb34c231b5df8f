"""The base's files: what of them a run depends on, and what is said where they are damaged."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ray_ensemble.errors import InputError
from ray_ensemble.models import base as base_module
from ray_ensemble.models import load_base, load_shapes, model_hash

CPU = torch.device("cpu")


@pytest.fixture
def base(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "base"))


def pickled(base: Path, shift: float) -> Path:
    """The base with weights as `pytorch_model.bin`, moved by `shift`."""
    model = AutoModelForCausalLM.from_pretrained(base)
    target = base.with_name(f"pickled-{shift}")
    shutil.copytree(base, target, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save({name: value + shift for name, value in model.state_dict().items()}, target / "pytorch_model.bin")
    return target


def test_weights_of_either_kind_are_in_the_hash(base):
    first, second = pickled(base, 0.0), pickled(base, 0.5)
    assert len({model_hash(folder) for folder in (base, first, second)}) == 3
    (first / "pytorch_model.bin").unlink()
    base_module.model_hash.cache_clear()
    with pytest.raises(InputError, match="no weights are there"):
        model_hash(first)


@pytest.mark.parametrize("harm", ["cut", "pointer", "another shape"])
@pytest.mark.parametrize(
    "load", [lambda folder: load_base(folder, "none", CPU), lambda folder: load_shapes(folder, CPU)]
)
def test_damaged_weights_are_wrong_input(base, harm, load):
    weights = base / "model.safetensors"
    if harm == "cut":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif harm == "pointer":
        weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    else:
        save_file({n: v[:-1] if "embed" in n else v for n, v in load_file(weights).items()}, weights, {"format": "pt"})
    with pytest.raises(InputError, match=str(base)):
        load(base)


def test_memory_that_is_lacking_is_no_wrong_input(base, monkeypatch):
    class Lacking:
        @staticmethod
        def from_pretrained(*_: object, **__: object) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        base_module.load_pretrained(Lacking, base, "none", CPU)


def test_a_file_is_converted_once_however_many_begin(tmp_path, monkeypatch):
    """Actors of a new node; here threads, each with a lock of its own on the file."""
    monkeypatch.setenv("RAY_ENSEMBLE_CACHE", str(tmp_path / "cache"))
    source, calls = tmp_path / "model.gguf", []
    source.write_bytes(b"weights")
    together = threading.Barrier(4)

    def convert(path: Path, folder: Path) -> None:
        calls.append(path)
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({}))

    monkeypatch.setattr(base_module, "_write_converted", convert)
    found = []

    def come() -> None:
        together.wait()
        found.append(base_module._convert_gguf(source))

    threads = [threading.Thread(target=come) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert len(set(found)) == 1
