"""Fixtures: a tokenizer, an empty cache and wheels; nothing here needs a network."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from task_data import MakeWheel, byte_tokenizer
from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer("<s> $A")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the project, and a pip that can reach nothing but `tmp_path/index`."""
    (tmp_path / "index").mkdir()
    monkeypatch.setenv("RAY_ENSEMBLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    (tmp_path / "cache/wheels").mkdir(parents=True)
    return tmp_path / "cache"


@pytest.fixture
def make_wheel(cache: Path, tmp_path: Path) -> MakeWheel:
    """`make_wheel(members, where="cache" | "index")` builds toysets 1.2 and returns its SHA-256."""

    def make(members: Mapping[str, str | bytes], where: str = "cache") -> str:
        folder = cache / "wheels" if where == "cache" else tmp_path / "index"
        path = folder / "toysets-1.2-py3-none-any.whl"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
            for name, content in members.items():
                wheel.writestr(name, content)
            wheel.writestr("toysets-1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: toysets\nVersion: 1.2\n")
            wheel.writestr(
                "toysets-1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            wheel.writestr("toysets-1.2.dist-info/RECORD", "")
        return hashlib.sha256(path.read_bytes()).hexdigest()

    return make
