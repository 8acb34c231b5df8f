"""Jobs on a Ray cluster that runs elsewhere, through Ray's job API: submit, follow, cancel.

    from ray_ensemble import submit
    submission = submit("job.yaml", address="http://127.0.0.1:8265", output="/shared/runs/first")
    exit_code = submission.follow()

Where the cluster asks for a token, Ray reads it from the file that RAY_AUTH_TOKEN_PATH names, if RAY_AUTH_MODE is `token`. No
value of an environment variable is sent with a job: Ray shows what is sent to whoever can list jobs.
"""

from __future__ import annotations

import asyncio
import logging
import os
import posixpath
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_ensemble.errors import InputError, RunError
from ray_ensemble.files import sha256_json
from ray_ensemble.job_metadata import submission_metadata
from ray_ensemble.job_package import JobPackage, pack_job, unpack_wheel
from ray_ensemble.progress import console
from ray_ensemble.storage import checked_url, is_url, without_settings
from ray_ensemble.submitted import arguments_for

_LOST_SECONDS = 60.0  # without a word from the job server before following ends
_ADDRESS = "RAY_API_SERVER_ADDRESS"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECRET_LENGTH = 8


class LogReader:
    """What is new in a log that comes from its start again after every loss of the connection."""

    def __init__(self) -> None:
        self._read = self._known = 0

    def restart(self) -> None:
        """The next text is the log's beginning."""
        self._read = 0

    def new(self, text: str) -> str:
        """What of the log's next piece was not there before."""
        known = min(max(self._known - self._read, 0), len(text))
        self._read += len(text)
        self._known = max(self._known, self._read)
        return text[known:]


@dataclass(frozen=True)
class Submission:
    """A job on a cluster: the address of its job server, and the job's id there."""

    address: str
    id: str

    def status(self) -> str:
        """PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED.

        Raises:
            InputError: the job server does not answer, refuses the token, or knows no such job.
        """
        return str(self._details(_client(self.address)).status.value)

    def follow(self, write: Callable[[str], object] = sys.stdout.write) -> int:
        """Write the job's log as it comes, until the job ends; returns the exit code of the job's command.

        Raises:
            InputError: as for `status`.
            RunError: the job was cancelled, or its command has no exit code because it never ran or its node was lost, or the
                job server has been silent for a minute.
        """
        client = _client(self.address)
        details = self._details(client)
        asyncio.run(self._tail(client, write))
        details = self._details(client)
        if details.status == "STOPPED":
            raise RunError(f"{self.id} was cancelled")
        if details.driver_exit_code is None:
            raise RunError(f"{self.id} failed: {details.message}")
        code = int(details.driver_exit_code)
        return code if code >= 0 else 128 - code

    def cancel(self) -> bool:
        """Stop the job; False if it had ended before. What it wrote stays, and a new submission goes on from there.

        Raises:
            InputError: as for `status`.
        """
        client = _client(self.address)
        self._details(client)
        with _answering(self.address):
            return bool(client.stop_job(self.id))

    def _details(self, client: Any) -> Any:
        with _answering(self.address):
            try:
                return client.get_job_info(self.id)
            except RuntimeError as error:
                raise InputError(f"--address {self.address}: no job {self.id} there ({error})") from None

    async def _tail(self, client: Any, write: Callable[[str], object]) -> None:
        import aiohttp

        log, lost = LogReader(), None
        while True:
            log.restart()
            try:
                async for text in client.tail_job_logs(self.id):
                    write(log.new(text))
                    sys.stdout.flush()
                    lost = None
                if client.get_job_info(self.id).status.is_terminal():
                    return
                lost = None
            except (RuntimeError, OSError, aiohttp.ClientError) as error:
                # Counted from when it was lost: a job may have been silent for long before.
                lost = time.monotonic() if lost is None else lost
                if time.monotonic() - lost > _LOST_SECONDS:
                    raise RunError(f"{self.address} is silent ({error}); the job may go on: {self.hint()}") from None
            await asyncio.sleep(1.0)

    def hint(self) -> str:
        """How to follow the job on, and how to cancel it."""
        return (
            f"follow it with\n  ray-ensemble submit --attach {self.id} --address {self.address}\n"
            f"cancel it with\n  ray-ensemble submit --cancel {self.id} --address {self.address}"
        )


def submit(
    job: str | Path,
    *,
    address: str,
    output: str,
    overrides: Sequence[str] = (),
    wheel: str | Path | None = None,
    environment: Sequence[str] = (),
    redo: bool = False,
) -> Submission:
    """Send a job to a cluster, where it is run as `ray-ensemble run` runs it.

    Sources of the job that are absolute paths are paths on the cluster. Relative ones are packed, and put to
    `<output>.inputs/` there, by path or by URL.

    Args:
        job: the job file.
        address: of the cluster's job server, such as `http://127.0.0.1:8265`.
        output: the run folder: a URL that the nodes reach, or an absolute path that all of them see.
        overrides: `"section.key=value"` strings that replace what the job file says.
        wheel: a wheel of this package for the cluster's workers; without it the cluster's image has to have the package.
        environment: names of variables that the cluster's nodes must have. Only names: values are never sent.
        redo: as for `Job.run`.

    Raises:
        InputError: the job, its files or the output are not right, another job is writing there, or the job server does not
            answer or refuses the token.
    """
    output = _checked_output(output)
    _refuse_values(environment)
    with tempfile.TemporaryDirectory(prefix="ray-ensemble-") as temporary:
        folder = Path(temporary, "job")
        folder.mkdir()
        package = pack_job(job, overrides, folder)
        for path in package.packed:
            console.print(f"{path}: sent with the job", markup=False, soft_wrap=True)
        for source in package.remote:
            console.print(f"{source}: taken as a path on the cluster", markup=False, soft_wrap=True)
        modules = unpack_wheel(wheel, Path(temporary, "wheel")) if wheel is not None else None
        client = _client(address)
        with _answering(address):
            try:
                identity = _next_id(output, client.list_jobs(), address)
                client.submit_job(
                    entrypoint=entrypoint(output, package, environment, redo),
                    submission_id=identity,
                    runtime_env=runtime_env(package, modules),
                    metadata=submission_metadata(output, package),
                )
            except RuntimeError as error:
                if "already exists" in str(error):
                    raise InputError(f"--output {output}: another submission came first ({error})") from None
                raise InputError(f"--address {address}: the job was refused ({error})") from None
    return Submission(address, identity)


def runtime_env(package: JobPackage, modules: Path | None) -> dict[str, Any]:
    """What Ray hands to the job's processes: its files and, from a wheel, this package. No environment variables."""
    found: dict[str, Any] = {"working_dir": str(package.folder)}
    if modules is not None:
        found["py_modules"] = [str(modules)]
    return found


def entrypoint(output: str, package: JobPackage, needed: Sequence[str], redo: bool) -> str:
    """The shell command of the job; `exec`, so that a cancel reaches Python and no shell stands between."""
    arguments = arguments_for(output, package.digest, needed, redo)
    return shlex.join(["exec", "python", "-m", "ray_ensemble.submitted", *arguments])


def _checked_output(output: str) -> str:
    if is_url(output):
        return checked_url(output)
    if not output.startswith("/"):
        raise InputError(
            f"--output {output}: give a URL, or the absolute path of a folder that every node of the cluster sees"
        )
    return posixpath.normpath(output)


def _refuse_values(names: Sequence[str]) -> None:
    """Take names of variables only: no `NAME=value`, and no value, which is what a shell makes of `--env $NAME`."""
    for given in names:
        if not _NAME.fullmatch(given) or (len(given) >= _SECRET_LENGTH and given in os.environ.values()):
            raise InputError(
                "--env: give only the name of a variable that the cluster's nodes have set, such as --env HF_TOKEN; a value "
                "would be shown to whoever can list jobs (docs/security.md tells how to give nodes a secret)"
            )


def _next_id(output: str, jobs: Sequence[Any], address: str) -> str:
    """An id for the next job with this output. The server takes an id only once, so of two at the same time one is refused."""
    name = re.sub(r"[^A-Za-z0-9]+", "-", posixpath.basename(without_settings(output))).strip("-").lower()[:40]
    stem = f"ray-ensemble-{name}-{sha256_json(output)[:8]}-"
    earlier = [job for job in jobs if (job.submission_id or "").startswith(stem)]
    for job in earlier:
        if not job.status.is_terminal():
            raise InputError(
                f"--output {output}: {job.submission_id} is writing there ({job.status.value}); "
                f"{Submission(address, job.submission_id).hint()}"
            )
    return f"{stem}{1 + max((int(job.submission_id.removeprefix(stem)) for job in earlier), default=0)}"


def _client(address: str) -> Any:
    """Ray's client for a job server.

    Raises:
        InputError: it does not answer, or refuses the token.
    """
    if not address.startswith(("http://", "https://")):
        raise InputError(f"--address {address}: expected http://<host>:<port> of the cluster's job server (port 8265)")
    _check_token()
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray.dashboard").setLevel(logging.WARNING)
    before = os.environ.get(_ADDRESS)
    # Ray lets RAY_ADDRESS replace the address that it is given; this variable replaces both.
    os.environ[_ADDRESS] = address
    try:
        with _answering(address):
            return JobSubmissionClient(address)
    except RuntimeError as error:
        raise InputError(f"--address {address}: no Ray job server of a fitting version ({error})") from None
    finally:
        if before is None:
            del os.environ[_ADDRESS]
        else:
            os.environ[_ADDRESS] = before


def _check_token() -> None:
    """Say what is wrong with the token's file before Ray reads it; there Ray ends the process."""
    if os.environ.get("RAY_AUTH_MODE") != "token" or os.environ.get("RAY_AUTH_TOKEN"):
        return
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    try:
        found = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"RAY_AUTH_TOKEN_PATH {path}: the token cannot be read ({error})") from None
    if not found:
        raise InputError(f"RAY_AUTH_TOKEN_PATH {path}: the file is empty; it has to hold the cluster's token")


@contextmanager
def _answering(address: str) -> Iterator[None]:
    """Turn what goes wrong between here and the job server into one line.

    Raises:
        InputError: it does not answer, or refuses the token.
    """
    import requests
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError as error:
        if "Authentication required" in str(error):
            wanted = "it asks for a token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=<the file that holds it>"
        else:
            wanted = "it refuses this token: RAY_AUTH_TOKEN_PATH must name a file with the token of the cluster"
        raise InputError(f"--address {address}: {wanted}") from None
    except (ConnectionError, requests.exceptions.RequestException) as error:
        first = str(error).splitlines()[0][:200]
        raise InputError(
            f"--address {address}: no Ray job server answers there ({first}); is the cluster up, and its port 8265 forwarded?"
        ) from None
