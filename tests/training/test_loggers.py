"""Loggers show the rows of the log, and a resumed training replaces what an interrupted one wrote."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from ray_ensemble import InputError
from ray_ensemble.training import loggers


def scalars(folder: Path) -> list[tuple[str, int, float]]:
    """(name, step, value) of every scalar in a folder of TensorBoard files, as a reader shows them."""
    from tensorboardX.proto.event_pb2 import Event

    found: list[tuple[str, int, float]] = []
    for file in sorted(folder.iterdir()):
        content = file.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            event = Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]
            if event.HasField("session_log") and event.session_log.status == 1:  # START: later steps are dropped
                found = [row for row in found if row[1] < event.step]
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
    return found


def test_tensorboard_has_every_step_once_after_a_resume(tmp_path):
    rows = [{"step": step, "loss": 1.0 - step / 8, "tokens": 10 * step} for step in range(6)]
    for first, last in ((0, 4), (2, 6)):
        with loggers.open_loggers(["tensorboard"], tmp_path, "a+b#0 (6 steps)", "0123456789abcdef", first) as log:
            for row in rows[first:last]:
                log(row)
    [folder] = (tmp_path / "tensorboard").iterdir()
    assert sorted(scalars(folder)) == sorted((k, r["step"], r[k]) for r in rows for k in ("loss", "tokens"))


@pytest.mark.parametrize("name", ["../../up", "a/b", ".hidden", "#" * 300])
def test_names_of_adapters_never_leave_the_folder(tmp_path, name):
    with loggers.open_loggers(["tensorboard"], tmp_path, name, "0123456789abcdef", 0) as log:
        log({"step": 0, "loss": 1.0})
    assert [path.name for path in tmp_path.iterdir()] == ["tensorboard"]
    [folder] = (tmp_path / "tensorboard").iterdir()
    assert folder.is_dir()


def test_a_logger_that_is_not_installed_is_refused_with_what_to_install(monkeypatch):
    monkeypatch.setattr(loggers, "_MODULES", {"mlflow": "no_such_package"})
    with pytest.raises(InputError, match=r"training\.loggers: mlflow needs the package 'no_such_package'"):
        loggers.check_loggers(["mlflow"])
